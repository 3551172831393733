"""The records of labelled tasks: scores of the original and the compressed model on the same samples."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from compress.records.base import Interval, Record
from compress.records.quality import Gate


class TaskScore(Record):
    """One metric of one task, paired by sample."""

    task: str
    metric: str
    filter: str = Field(description="what the harness does to an answer before it is judged; `none` mostly")
    unit: Literal["score", "nats"] = Field(description="nats: of a perplexity, its logarithm")
    better: Literal["higher", "lower"]
    samples: int
    baseline: float
    variant: float
    change: float = Field(description="variant - baseline")
    interval: Interval | None = Field(description="of the change; none of a single sample")
    gained: int | None = Field(default=None, description="samples that only the compressed model answers rightly")
    lost: int | None = Field(default=None, description="samples that only the original answers rightly")
    p_value: float | None = None
    p_holm: float | None = Field(default=None, description="p_value after Holm over everything that was scored")
    test: str = ""
    detectable: float | None = Field(
        default=None, description="the least true change that so many samples show in 80 % of all cases"
    )
    chance: float | None = Field(default=None, description="what guessing would score, where answers are offered")
    recovery: float | None = Field(
        default=None, description="variant / baseline in percent; none of nats, or where the original is near chance"
    )
    recovery_interval: Interval | None = None
    recovery_over_chance: float | None = Field(default=None, description="the same of what exceeds chance")

    @property
    def name(self) -> str:
        """`arc_easy acc_norm`."""
        return f"{self.task} {self.metric}" + ("" if self.filter == "none" else f" ({self.filter})")


class Tasks(Record):
    """Everything that the harness scored. gates: of --max-loss, at the worse end of each interval."""

    harness: str
    where: str
    limit: int | None = None
    chat_template: bool = False
    scores: tuple[TaskScore, ...]
    gates: tuple[Gate, ...] = ()
    notes: tuple[str, ...] = ()
