"""The JSON Schema of report.json, made from the records (`docs/report.schema.json`; scripts/write_schema writes it)."""

from __future__ import annotations

import json
from typing import Any

from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue
from pydantic_core import core_schema

from compress.records import REPORT_SCHEMA, Report

DIALECT = "https://json-schema.org/draft/2020-12/schema"
NO_NUMBERS = ("NaN", "Infinity", "-Infinity")
"""How a figure that is no number is written: JSON has no sign for it."""


class _Schema(GenerateJsonSchema):
    """As pydantic's, and with the texts that stand for what is no number."""

    def float_schema(self, schema: core_schema.FloatSchema) -> JsonSchemaValue:
        return {"anyOf": [super().float_schema(schema), {"enum": list(NO_NUMBERS)}]}


def report_schema() -> dict[str, Any]:
    """What a report of this version holds; parts that older reports of the same version lack are optional."""
    found = Report.model_json_schema(schema_generator=_Schema, mode="validation")
    found["properties"]["schema_version"] = {"const": REPORT_SCHEMA, "title": "Schema Version"}
    found["required"] = ["schema_version", *found["required"]]
    return {"$schema": DIALECT, **found, "title": "report.json of compress"}


def schema_text() -> str:
    """The file, whole."""
    return json.dumps(report_schema(), indent=1) + "\n"
