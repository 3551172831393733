"""The JSON Schema of report.json, made from the records (`docs/report.schema.json`; scripts/write_schema writes it)."""

from __future__ import annotations

import json
from typing import Any

from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue
from pydantic_core import core_schema

from compress.records import REPORT_SCHEMA, Record, Report

DIALECT = "https://json-schema.org/draft/2020-12/schema"
NO_NUMBERS = ("NaN", "Infinity", "-Infinity")
"""How a figure that is no number is written: JSON has no sign for it."""


class _Schema(GenerateJsonSchema):
    """As pydantic's, and with the texts that stand for what is no number."""

    def float_schema(self, schema: core_schema.FloatSchema) -> JsonSchemaValue:
        return {"anyOf": [super().float_schema(schema), {"enum": list(NO_NUMBERS)}]}


def schema_of(record: type[Record], version: int, title: str) -> dict[str, Any]:
    """What a file of this record and version holds; parts that older files of the same version lack are optional."""
    found = record.model_json_schema(schema_generator=_Schema, mode="validation")
    found["properties"]["schema_version"] = {"const": version, "title": "Schema Version"}
    found["required"] = ["schema_version", *found["required"]]
    return {"$schema": DIALECT, **found, "title": title}


def report_schema() -> dict[str, Any]:
    """Of one run."""
    return schema_of(Report, REPORT_SCHEMA, "report.json of compress")


def as_text(schema: dict[str, Any]) -> str:
    """The file, whole."""
    return json.dumps(schema, indent=1) + "\n"


def schema_text() -> str:
    """`docs/report.schema.json`."""
    return as_text(report_schema())
