"""Folders of any layout: written as planned, and read back by whatever decoded them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from compress.export.checkpoint.target import CheckpointTarget
from compress.formats import codebook_columns
from compress.formats.base import Format, QuantTensor
from compress.formats.codebook import Codebook
from compress.formats.codebook_columns import Piece
from compress.layer import Layer, LayerKind, LayerSpec
from compress.models.model import Model
from compress.pipeline import Pipeline
from compress.profiles import as_profile
from compress.quality import verification
from compress.records import Verification
from compress.speed.footprint import deployable_bytes

PROFILE = as_profile("cpu-x86-avx2")
# rows that no vector of 4 divides; columns whose codes end within a word
ROWS, COLUMNS = 13, 42


def written(target: CheckpointTarget, model: Model, text: str, folder: Path) -> Model:
    made = Pipeline.parse(text).run(model).model
    lowered = target.write(made, PROFILE, folder)
    predicted = target.predict_bytes(made.structure.layers.values(), made, PROFILE)
    assert deployable_bytes(lowered.folder) == pytest.approx(predicted, rel=0.005)
    return made


def assert_read_back(made: Model, tensors: Mapping[str, torch.Tensor], exact: bool = True) -> None:
    packed = [spec for spec in made.structure.layers.values() if spec.format is not None]
    assert packed
    for spec in packed:
        found, expected = tensors[f"{spec.name}.weight"], made.layer(spec).float_weight()
        if exact:
            assert torch.equal(found, expected), spec.name
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


def config_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())["quantization_config"]
    return found


def verified(model: Model, target: CheckpointTarget, form: str, folder: Path) -> Verification:
    made = Pipeline.parse(f"rtn(format={form})").run(model).model
    lowered = target.write(made, PROFILE, folder)
    ids = torch.randint(3, 256, (2, 16), generator=torch.Generator().manual_seed(0))
    profile = as_profile(PROFILE, f"checkpoint-{target.layout.name}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verification, "GREEDY_TOKENS", 2)  # kept beside the verdict, which they are no part of
        found = verification.verify_export(made, folder, profile, ids, lowered.bounds)
    assert found.agrees and found.exact_relative_difference is not None and found.exact_relative_difference < 1e-5
    return found


def layer_of(form: Codebook, rows: int = ROWS, columns: int = COLUMNS) -> Layer:
    """One with any codes, its last code always used."""
    generator = torch.Generator().manual_seed(form.bits * 10 + form.stages)
    if form.extras:
        return _layer_of_pieces(form, rows, columns, generator)
    count = columns // form.step * form.stages
    codes = torch.randint(0, form.entries, (form.code_rows(rows), count), generator=generator)
    codes[0, 0], codes[-1, -1] = form.entries - 1, form.entries - 1
    book = torch.randn(form.groups, form.stages, form.entries, form.vector, generator=generator)
    shape = {"row": (rows, 1), "column": (1, columns), "none": (1, 1)}[form.scale]
    scale = torch.rand(shape, generator=generator).half().float() + 0.5 if form.scale != "none" else torch.ones(1, 1)
    kept = codes.to(torch.uint8 if form.bits <= 8 else torch.int32)
    weight = form.pack(kept, form.params(book, scale.half().float(), columns), (rows, columns))
    return Layer("m", LayerKind.LINEAR, weight)


def _layer_of_pieces(form: Codebook, rows: int, columns: int, generator: torch.Generator) -> Layer:
    order = codebook_columns.ordered(form, torch.rand(columns, generator=generator))
    count = codebook_columns.outlier_count(form, columns)
    parts = []
    for places, own in ((order[:count], codebook_columns.outlier_form(form)), (order[count:], form.main)):
        if not len(places):
            continue
        plain = layer_of(own, rows, len(places)).weight
        assert isinstance(plain, QuantTensor)
        size = (rows, 1) if form.bias == "row" else (1, len(places))
        bias = torch.randn(size, generator=generator).half().float() if form.bias != "none" else None
        parts.append(Piece(own, plain.tensors, plain.shape, places, bias))
    weight = QuantTensor(form, codebook_columns.joined(form, parts), (rows, columns))
    return Layer("m", LayerKind.LINEAR, weight)


def spec_of(form: Format | None, rows: int = 64, columns: int = 64, **more: Any) -> LayerSpec:
    return LayerSpec("m", LayerKind.LINEAR, (rows, columns), ("m",), format=form, segment=0, **more)
