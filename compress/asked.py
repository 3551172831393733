"""What a run was asked for, as the report keeps it, so that `compress reproduce` can repeat the run."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from pydantic import JsonValue
from pydantic_core import to_jsonable_python

from compress import hwprofiles, manifest
from compress.models.model import Model
from compress.models.user_module import is_reference
from compress.records import Asked

if TYPE_CHECKING:
    from compress.run_report import Request

ELSEWHERE = frozenset({"model", "recipe", "profile", "out", "overwrite", "command"})
"""Fields of a request that a report holds otherwise, or that say where to write."""


def record(request: Request, model: Model) -> Asked:
    """Everything of a request that its report does not say already."""
    options: dict[str, JsonValue] = {
        each.name: to_jsonable_python(getattr(request, each.name))
        for each in fields(request)
        if each.name not in ELSEWHERE
    }
    return Asked(
        task=str(model.task),
        is_local=is_reference(request.model) or Path(request.model).exists(),
        # what was left out stays left out: a default may depend on the kind of model
        recipe=request.recipe.model_dump(mode="json", exclude_unset=True),
        profile=request.profile.model_dump(mode="json"),
        options=options,
        machine=hwprofiles.machine_summary(),
        threads=torch.get_num_threads(),
        code_digest=manifest.code_digest(),
    )
