"""What every record is, and the interval that most of them carry."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Record(BaseModel):
    """Frozen, closed, JSON-able."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=True, ser_json_inf_nan="strings")


class Interval(Record):
    """A two-sided interval at `level`."""

    low: float
    high: float
    level: float = 0.95
