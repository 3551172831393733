"""The frozen records that the steps of a run hand to each other, and the versioned report made of them.

Everything here is data: no torch, no files. Sizes are bytes, times are seconds, fractions are 0 to 1.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from pydantic import Field

from compress.records.base import Interval, Record
from compress.records.quality import Gate, Metric, Quality
from compress.records.run import Asked
from compress.records.sparsity import Sparsity
from compress.records.speed import Footprint, Speed, SpeedVerdict, Timing
from compress.records.task import Tasks

# imported from here by everything else
__all__ = ["Asked", "Footprint", "Gate", "Interval", "Metric", "Quality", "Record", "Speed", "SpeedVerdict", "Timing"]

REPORT_SCHEMA = 1
REMOVED = "removed"
"""The format of a module that a pass took out of the model."""
UNDECIDED = "is decided on the calibration data"
"""In a plan's notes: what a run's report then tells itself."""

Kernel = Literal["fast", "works", "no"]
OutputReference = Literal["", "same inputs", "reference stream"]


class LayerResult(Record):
    """What one pass did to one layer."""

    layer: str
    users: tuple[str, ...]
    pass_text: str
    changed: bool
    reason: str = ""
    format: str = ""
    bits_per_weight: float | None = None
    error_before: float | None = Field(default=None, description="relative squared error against the source weight")
    error_after: float | None = None
    output_error: float | None = Field(
        default=None, description="relative squared error of what the layer puts out on the calibration data"
    )
    output_reference: OutputReference = Field(
        default="",
        description="what output_error is taken against: the source weight's output on the same inputs, or on those of "
        "the uncompressed model where the walk carried its stream",
    )
    seconds: float | None = None
    notes: tuple[str, ...] = ()


class PassResult(Record):
    """One pass over the whole model. `matches` counts layers per pattern."""

    pass_text: str
    matches: dict[str, int]
    layers: tuple[LayerResult, ...]
    seconds: float


class PlannedLayer(Record):
    """One layer as `plan` sees it: which passes touch it, how the target stores it."""

    layer: str
    users: tuple[str, ...]
    kind: str
    shape: tuple[int, ...]
    passes: tuple[str, ...]
    reason: str = Field(default="", description="why no pass touches it")
    format: str
    operator: str
    kernel: Kernel
    note: str = ""
    stored_bytes: int


class PredictedLatency(Record):
    """One setting by the profile's figures of its kernels, else by a roofline (compress/speed/roofline.py). Never
    measured."""

    phase: Literal["prefill", "decode", "encode"]
    batch: int
    prompt: int
    variant_s: float
    baseline_s: float
    bound: Literal["memory", "arithmetic", "overhead"] = Field(
        description="what most of the variant's time is spent on; overhead: of the graph's nodes"
    )


class Plan(Record):
    """What a run would do, computed before anything expensive and without the weights in memory."""

    model: str
    profile: str
    recipe: str
    layers: tuple[PlannedLayer, ...]
    matches: dict[str, dict[str, int]]
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = Field(default=(), description="what is to be known and is no fault")
    target: str = ""
    refusals: tuple[str, ...] = ()
    other_targets: tuple[str, ...] = Field(default=(), description="that would store what this one refuses")
    refused_settings: bool = Field(default=False, description="another setting of the recipe would be stored")
    source_bytes: int
    predicted_artifact_bytes: int
    predicted_model_bytes: int
    predicted_peak_memory_bytes: int
    predicted_disk_bytes: int
    predicted_seconds: float
    predicted_latency: tuple[PredictedLatency, ...] = Field(default=(), description="over the profile's grid")


class Bounds(Record):
    """Largest relative logit differences that an export's lowerings publish: with the kernels as shipped, and with
    their own rounding of activations switched off (0: exact arithmetic, then 1e-3 for float32 summation order)."""

    shipped: float = 0.0
    exact: float = 0.0

    @classmethod
    def loosest(cls, found: Iterable[Bounds]) -> Bounds:
        """As wide as the widest of several, each way; zero for none."""
        kept = list(found)
        shipped = max((each.shipped for each in kept), default=0.0)
        return cls(shipped=shipped, exact=max((each.exact for each in kept), default=0.0))


class Verification(Record):
    """How far the artifact was checked here: `ran`, `built` or `checked` (design §2)."""

    level: Literal["ran", "built", "checked"]
    runtime: str
    agrees: bool
    positions: int
    max_relative_difference: float
    bound: float
    exact_relative_difference: float | None = Field(
        default=None, description="the same graph with the kernels' own rounding of activations off: the lowering alone"
    )
    exact_bound: float = 0.0
    exact_top1_agreement: float | None = Field(
        default=None, description="share of positions whose margin exceeds the exact bound, same top token"
    )
    top1_agreement: float
    decided_positions: int = Field(description="positions whose margin exceeds twice the largest difference")
    decided_agreement: float
    greedy_tokens: tuple[int, ...] = ()
    notes: tuple[str, ...] = ()


class RunCost(Record):
    """What the run itself took, measured. Peaks are resident memory of the whole process."""

    seconds: float
    passes_peak_memory_bytes: int
    peak_memory_bytes: int


class Report(Record):
    """One run, whole. Terminal, Markdown and HTML are pure functions of it."""

    schema_version: int = REPORT_SCHEMA
    title: str
    source: str
    source_digest: str
    recipe: str
    profile: str
    target: str
    created: str
    versions: dict[str, str]
    seed: int
    calibration: dict[str, str | int]
    source_bytes: int
    artifact_bytes: int
    passes: tuple[PassResult, ...]
    plan: Plan | None = None
    operators: dict[str, int] = Field(default_factory=dict, description="compressible layers per lowered operator")
    float_layers: tuple[str, ...] = ()
    baseline_quality: Quality | None = None
    artifact_quality: Quality | None = None
    memory_quality: Quality | None = Field(default=None, description="the compressed model in torch, before lowering")
    sparsity: Sparsity | None = Field(default=None, description="where a pass prunes, of the final weights")
    tasks: Tasks | None = Field(default=None, description="labelled tasks, where the recipe names some")
    speed: Speed | None = None
    verification: Verification | None = None
    gates: tuple[Gate, ...] = ()
    cost: RunCost | None = None
    verdict: str
    warnings: tuple[str, ...] = ()
    command: str = ""
    request: Asked | None = Field(default=None, description="what `compress reproduce` repeats; none in older reports")
    files: dict[str, str] = Field(
        default_factory=dict, description="sha256 of each file of the model and of what is deployed, by its path in OUT"
    )

    def __str__(self) -> str:
        from compress.report import to_markdown

        return to_markdown(self)
