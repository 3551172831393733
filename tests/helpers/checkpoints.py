"""Checkpoints written, read back and compared with the model in memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from compress.export.checkpoint.target import COMPRESSED_TENSORS as TARGET
from compress.hwprofiles import Profile
from compress.models.model import Model
from compress.pipeline import Pipeline
from compress.profiles import as_profile
from compress.quality.verification import verify_export
from compress.records import Verification
from compress.target import Lowered

PROFILE: Profile = as_profile("cpu-x86-avx2", "checkpoint")


def compressed(model: Model, text: str, folder: Path) -> tuple[Model, Lowered]:
    made = Pipeline.parse(text).run(model).model if text else model
    return made, TARGET.write(made, PROFILE, folder)


def config_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return found


def keys_of(folder: Path) -> set[str]:
    with safe_open(folder / "model.safetensors", framework="pt") as handle:
        return set(handle.keys())


def verified(made: Model, lowered: Lowered) -> Verification:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, made.vocabulary, (16, 32), generator=generator)
    found = verify_export(made, lowered.folder, PROFILE, ids, lowered.bounds)
    assert found.agrees, found
    return found


def assert_same_weights(made: Model, module: Any) -> None:
    """Every layer that is a module of its own holds what our decoder makes of the stored codes."""
    for spec in made.structure.layers.values():
        weight = made.layer(spec).float_weight()
        for user in spec.users:
            assert torch.equal(module.get_submodule(user).weight, weight), user
