"""The record of several recipes run on one model: `report.json` of a sweep."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from compress.records import Footprint, Gate, Interval, Quality, Record, Timing, Verification
from compress.sweep.front import Axis

SWEEP_SCHEMA = 1


class Limits(Record):
    """What the user asked of the choice, as it was given, and read: seconds, bytes and shares of the baseline."""

    loss: float | None = None
    latency: str = ""
    size: str = ""
    prefer: tuple[Axis, ...] = ()
    read: dict[str, float] = Field(default_factory=dict)


class Figure(Record):
    """One figure of a variant on an axis of the front; lower is better."""

    value: float
    low: float
    high: float
    unit: str


class Variant(Record):
    """One recipe of a sweep. Its own report.json, in `folder` below the sweep's, has everything else."""

    name: str
    recipe: str
    state: Literal["done", "failed"]
    reason: str = Field(default="", description="why it failed")
    exit_code: int = Field(default=0, description="of `compress run` with this recipe alone, where it failed")
    folder: str = ""
    artifact_bytes: int | None = None
    quality: Quality | None = Field(default=None, description="of the artifact in its runtime, headline figures")
    timings: tuple[Timing, ...] = Field(default=(), description="taken in the same rounds as those of the others")
    footprint: Footprint | None = None
    verification: Verification | None = None
    gates: tuple[Gate, ...] = ()
    figures: dict[Axis, Figure] = Field(default_factory=dict)
    passes: int = 0
    operators: int = Field(default=0, description="kinds of lowered operators")
    seconds: float | None = Field(default=None, description="to compress, export and check it")
    reused: tuple[str, ...] = Field(default=(), description="stages taken from a variant that begins alike")


class Difference(Record):
    """Two variants measured side by side: first minus second; of latency the logarithm of the ratio of times, widened
    by the noise floor."""

    axis: Axis
    first: str
    second: str
    value: float
    interval: Interval


class Picked(Record):
    """The choice."""

    front: tuple[str, ...]
    recommended: str | None
    sentence: str
    tied: tuple[str, ...] = ()
    allowed: tuple[str, ...] = Field(default=(), description="those that meet every gate and every limit")
    reasons: dict[str, str] = Field(default_factory=dict, description="why each other variant was not taken")


class Sweep(Record):
    """Several recipes, one baseline, one choice."""

    schema_version: int = SWEEP_SCHEMA
    kind: Literal["sweep"] = "sweep"
    title: str
    source: str
    source_digest: str
    source_bytes: int
    profile: str
    target: str
    created: str
    versions: dict[str, str]
    seed: int
    loss_metric: str = Field(default="", description="what the axis loss is made of, with its unit")
    setting: str = Field(default="", description="that the axis latency is taken at")
    baseline_s: float | None = Field(default=None, description="of the baseline at that setting")
    baseline_quality: Quality | None = None
    baseline_footprint: Footprint | None = None
    runtime: str = ""
    threads: int = 0
    machine: dict[str, str] = Field(default_factory=dict)
    variants: tuple[Variant, ...]
    differences: tuple[Difference, ...] = ()
    limits: Limits = Limits()
    choice: Picked
    notes: tuple[str, ...] = ()
    command: str = ""

    @property
    def done(self) -> tuple[Variant, ...]:
        """The variants that have an artifact."""
        return tuple(each for each in self.variants if each.state == "done")
