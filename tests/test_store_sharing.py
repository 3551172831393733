"""Tensors that several layers hold in common: stored once, read by all, counted once."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import compress
from compress.engine import segment_files, store
from compress.errors import InputError
from compress.formats.codebook import Codebook
from compress.layer import Layer
from compress.pipeline import Pipeline

FORM = Codebook(vector=4, entries=16, stages=2, share=7)


@pytest.fixture
def shared(llama: Path, tmp_path: Path) -> Path:
    """A store whose first block holds one codebook in common."""
    made = Pipeline.parse("rtn(format=int8(channel))").run(compress.load(llama), folder=tmp_path / "m").model
    book = torch.randn(1, 2, 16, 4, generator=torch.Generator().manual_seed(0))
    layers: dict[str, Layer] = {}
    for spec in made.structure.segment_layers(0):
        layer = made.layer(spec)
        weight = layer.float_weight()
        params = FORM.params(book, FORM.fit_scale(weight), weight.shape[1])
        codes, _ = FORM.quantize(weight, params, torch.arange(weight.shape[1]))
        packed = FORM.pack(codes, params, layer.shape)
        layers[spec.name] = replace(layer, weight=packed)
    assert len(layers) == FORM.share
    segment_files.write_segment(tmp_path / "m", 0, layers, made.plain(0))
    return tmp_path / "m"


def test_a_codebook_of_a_whole_block_is_in_its_file_once_and_in_every_layer(shared: Path) -> None:
    with safe_open(shared / "block-0000.safetensors", framework="pt") as file:
        assert sum(name.endswith(".codebook") for name in file.keys()) == 1  # noqa: SIM118
    model = store.open_store(shared)
    layers = [model.layer(spec) for spec in model.structure.segment_layers(0)]
    books = [layer.weight.tensors["codebook"] for layer in layers]  # type: ignore[union-attr]
    assert all(torch.equal(book, books[0]) for book in books)
    assert sum(layer.weight.nbytes for layer in layers) == sum(  # type: ignore[union-attr]
        FORM.stored_bytes(layer.shape) for layer in layers
    )


def test_a_block_that_is_read_and_written_again_still_shares(shared: Path, tmp_path: Path) -> None:
    model = store.open_store(shared)
    (tmp_path / "again").mkdir()
    layers = {spec.name: model.layer(spec) for spec in model.structure.segment_layers(0)}
    segment_files.write_segment(tmp_path / "again", 0, layers, model.plain(0))
    again = tmp_path / "again" / "block-0000.safetensors"
    assert again.read_bytes() == (shared / "block-0000.safetensors").read_bytes()


@pytest.mark.parametrize("aliases", [{"block": 3}, ["a"], "x", None])
def test_a_file_whose_aliases_are_wrong_is_refused_by_name(shared: Path, aliases: object) -> None:
    path = shared / "block-0000.safetensors"
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        header = json.loads(file.metadata()[segment_files.HEADER])
    header["aliases"] = aliases if not isinstance(aliases, dict) else dict.fromkeys(header["aliases"], "nothing")
    save_file(tensors, path, metadata={segment_files.HEADER: json.dumps(header)})
    with pytest.raises(InputError, match="block-0000"):
        model = store.open_store(shared)
        for spec in model.structure.segment_layers(0):
            model.layer(spec)
