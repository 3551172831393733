"""The JSON Schema of a sweep's report.json, made from the records (`docs/sweep.schema.json`)."""

from __future__ import annotations

from typing import Any

from compress.report.schema import as_text, schema_of
from compress.sweep.records import SWEEP_SCHEMA, Sweep


def sweep_schema() -> dict[str, Any]:
    """Of several recipes in one run, which the field `kind` tells from one run alone."""
    found = schema_of(Sweep, SWEEP_SCHEMA, "report.json of a sweep of compress")
    return {**found, "required": ["schema_version", "kind", *found["required"][1:]]}


def schema_text() -> str:
    """`docs/sweep.schema.json`."""
    return as_text(sweep_schema())
