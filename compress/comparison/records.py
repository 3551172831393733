"""The records of a comparison of two reports: what changed, and the conditions that were held against it."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from compress.comparison.figures import Figure
from compress.records.base import Record

Word = Literal["better", "worse", "lower", "higher", "same", "no clear change", "not compared"]
"""lower, higher: of figures without an interval, of which no more can be said."""
Kind = Literal["size", "quality", "latency", "speedup", "memory", "load"]
Better = Literal["lower", "higher"]
End = Literal["upper end", "lower end", "value without an interval"]


class Change(Record):
    """One figure in both reports. `difference` (after - before, in its unit) and `ratio` (after over before) are null
    where it was not compared that way."""

    name: str = Field(description="as a condition names it")
    kind: Kind
    unit: str
    better: Better
    detail: bool = Field(default=False, description="left out of the first table of a page")
    before: Figure | None
    after: Figure | None
    difference: Figure | None = None
    ratio: Figure | None = None
    word: Word
    note: str = Field(default="", description="how it was compared, or why it was not")


class Side(Record):
    """Which report it was."""

    title: str
    source: str
    source_digest: str
    recipe: str
    profile: str
    target: str
    created: str


class Judged(Record):
    """A condition held against one figure."""

    condition: str
    figure: str = Field(description="what it was held against")
    is_change: bool = Field(description="of B against A, as against B's own value")
    unit: str = Field(description="of found and bound; a relative change is a fraction")
    found: float
    bound: float
    end: End
    failed: bool


class Comparison(Record):
    """The earlier report, the newer one, what changed between them, and the conditions."""

    before: Side
    after: Side
    changes: tuple[Change, ...]
    notes: tuple[str, ...] = ()
    conditions: tuple[Judged, ...] = ()

    @property
    def failed(self) -> bool:
        """Whether a condition failed."""
        return any(each.failed for each in self.conditions)
