"""The frozen records that the steps of a run hand to each other, and the versioned report made of them.

Everything here is data: no torch, no files. Sizes are bytes, times are seconds, fractions are 0 to 1.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

REPORT_SCHEMA = 1

SpeedVerdict = Literal["faster", "slower", "same", "inconclusive"]
Kernel = Literal["fast", "works", "no"]


class Record(BaseModel):
    """Frozen, closed, JSON-able."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=True, ser_json_inf_nan="strings")


class Interval(Record):
    """A two-sided interval at `level`."""

    low: float
    high: float
    level: float = 0.95


class Metric(Record):
    """One figure with its uncertainty. `samples` counts independent clusters (windows, documents)."""

    value: float
    interval: Interval | None = None
    samples: int
    unit: str
    protocol: str
    better: Literal["lower", "higher"]


class Quality(Record):
    """Metrics of one model on one data set. `where` says what computed them."""

    subject: Literal["baseline", "compressed"]
    where: str
    metrics: dict[str, Metric]
    data_digest: str


class Timing(Record):
    """Paired latency of baseline and variant at one setting; every figure here was measured."""

    phase: Literal["prefill", "decode", "encode", "infer"] = Field(description="infer: images, of which one is a token")
    batch: int
    prompt: int
    rounds: int
    baseline_s: float = Field(description="median seconds per call")
    variant_s: float = Field(description="median seconds per call")
    baseline_tokens_per_s: float
    variant_tokens_per_s: float
    speedup: float = Field(description="trimmed mean of paired log ratios, as a ratio")
    interval: Interval
    control: Interval = Field(description="baseline against itself: the noise floor")
    verdict: SpeedVerdict
    warnings: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """`decode batch 1 prompt 128`, `infer batch 4`."""
        if self.phase == "infer":
            return f"{self.phase} batch {self.batch}"
        return f"{self.phase} batch {self.batch} prompt {self.prompt}"


class Footprint(Record):
    """What one arm takes: bytes of the deployable files, seconds to load, peak resident memory of a run."""

    disk_bytes: int
    load_s: float | None = None
    peak_memory_bytes: int | None = None


class Speed(Record):
    """All timings of a run, against `baseline` of the same runtime, threads and graph optimizations."""

    runtime: str
    threads: int
    machine: dict[str, str]
    timings: tuple[Timing, ...]
    baseline: Footprint
    variant: Footprint

    def __str__(self) -> str:
        from compress.report.parts import speed_text

        return speed_text(self)


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
    output_error: float | None = Field(default=None, description="the same weighted by the input's second moment")
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
    """Roofline of one setting (compress/roofline.py): at best so fast. Never measured."""

    phase: Literal["prefill", "decode", "encode"]
    batch: int
    prompt: int
    variant_s: float
    baseline_s: float
    bound: Literal["memory", "arithmetic"] = Field(description="what most of the variant's time is spent on")


class Plan(Record):
    """What a run would do, computed before anything expensive and without the weights in memory."""

    model: str
    profile: str
    recipe: str
    layers: tuple[PlannedLayer, ...]
    matches: dict[str, dict[str, int]]
    warnings: tuple[str, ...] = ()
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
    predicted_latency: tuple[PredictedLatency, ...] = Field(default=(), description="roofline on the profile")


class Bounds(Record):
    """Largest relative logit differences that an export's lowerings publish: with the kernels as shipped, and with
    their own rounding of activations switched off (0: exact arithmetic, then 1e-3 for float32 summation order)."""

    shipped: float = 0.0
    exact: float = 0.0


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


class Gate(Record):
    """One gate of the recipe: the bound that was asked for and what was found (the worse end of the interval)."""

    name: str
    bound: float
    found: float
    met: bool


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
    speed: Speed | None = None
    verification: Verification | None = None
    gates: tuple[Gate, ...] = ()
    cost: RunCost | None = None
    verdict: str
    warnings: tuple[str, ...] = ()
    command: str = ""

    def __str__(self) -> str:
        from compress.report import to_markdown

        return to_markdown(self)
