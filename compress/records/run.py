"""The record of what a run was asked for and where it ran: what `compress reproduce` needs beside the files named."""

from __future__ import annotations

from pydantic import Field, JsonValue

from compress.records.base import Record


class Asked(Record):
    """What a run was asked for, and what it depended on beside its model and its data."""

    task: str = Field(description="causal-lm, encoder, image-classifier")
    is_local: bool = Field(description="the source is a path of the machine that ran it, and no id on the hub")
    recipe: dict[str, JsonValue] = Field(description="as in a recipe file, with the passes for the target")
    profile: dict[str, JsonValue] = Field(description="the hardware profile, whole")
    options: dict[str, JsonValue] = Field(description="all other options, by their names in the Python API")
    machine: dict[str, str] = Field(default_factory=dict, description="that ran it")
    threads: int = Field(description="that computed the passes")
    code_digest: str = Field(description="of the source files of compress")
