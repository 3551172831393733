"""Codebooks that are trained: entries and scales move, codes stay."""

from __future__ import annotations

from pathlib import Path

import torch

import compress
from compress.formats.base import QuantTensor
from compress.formats.codebook import Codebook
from compress.inputs.datasets import calibrate
from compress.layer import Layer, LayerKind
from compress.pipeline import Pipeline
from compress.training.soft_codebook import SoftCodebook, soft_codebooks

START = "rtn(format=codebook(vector=4, entries=16, stages=2))"


def coded(form: Codebook, seed: int = 0, book: torch.Tensor | None = None) -> Layer:
    weight = torch.randn(6, 16, generator=torch.Generator().manual_seed(seed))
    params = form.fit(weight)
    if book is not None:
        params = form.params(book, params["scale"], 16)
    codes, _ = form.quantize(weight, params, torch.arange(16))
    return Layer(f"l{seed}", LayerKind.LINEAR, form.pack(codes, params, (6, 16)), users=(f"l{seed}",))


def test_untrained_it_is_the_stored_weight_and_packs_to_the_same_bytes() -> None:
    for form in (Codebook(4, 8, 2), Codebook(3, 8, 1, axis="out"), Codebook(4, 8, 1, scale="none", groups=2)):
        layer = coded(form)
        soft = SoftCodebook(layer, layer.weight.tensors["codebook"].float())  # type: ignore[union-attr]
        assert torch.equal(soft.weight(), layer.float_weight())
        again = soft.rounded().weight
        assert isinstance(again, QuantTensor) and isinstance(layer.weight, QuantTensor)
        assert all(torch.equal(again.tensors[name], tensor) for name, tensor in layer.weight.tensors.items())


def test_the_gradient_of_an_entry_is_the_sum_over_all_weights_that_it_stands_for() -> None:
    form = Codebook(4, 8, 1)
    layer = coded(form)
    assert isinstance(layer.weight, QuantTensor)
    soft = SoftCodebook(layer, layer.weight.tensors["codebook"].float().requires_grad_())
    slope = torch.randn(6, 16, generator=torch.Generator().manual_seed(3))
    (soft.weight() * slope).sum().backward()
    codes, _, scale = form.unpack(layer.weight.tensors, (6, 16))
    expected = torch.zeros(8, 4)
    for row in range(6):
        for unit in range(4):
            expected[codes[row, unit, 0]] += slope[row, unit * 4 : unit * 4 + 4] * scale[row, 0]
    assert soft.book.grad is not None and torch.allclose(soft.book.grad[0, 0], expected, atol=1e-6)


def test_layers_that_hold_a_codebook_in_common_train_one_tensor() -> None:
    form = Codebook(4, 8, 1, share=2)
    first = coded(form)
    assert isinstance(first.weight, QuantTensor)
    second = coded(form, 1, first.weight.tensors["codebook"].float())
    other = coded(Codebook(4, 8, 1), 2)
    soft = soft_codebooks([first, second, other])
    assert soft["l0"].book is soft["l1"].book
    assert soft["l2"].book is not soft["l0"].book


def test_tuning_moves_entries_and_scales_and_leaves_codes(llama: Path, text_file: Path) -> None:
    model = compress.load(llama)
    calibration = calibrate(model, text_file, samples=64, length=64)
    before = Pipeline.parse(START).run(model)
    tuned = Pipeline.parse(f"{START}, tune(parts=[codebooks], steps=25, lr=0.01)").run(model, calibration)
    name = "model.layers.1.mlp.up_proj"
    first, second = (one.model.layer(one.model.structure.layers[name]).weight for one in (before, tuned))
    assert isinstance(first, QuantTensor) and isinstance(second, QuantTensor)
    assert torch.equal(first.tensors["codes"], second.tensors["codes"])
    assert not torch.equal(first.tensors["codebook"], second.tensors["codebook"])
    assert not torch.equal(first.tensors["scale"], second.tensors["scale"])
    row = next(row for row in tuned.passes[1].layers if row.layer == name)
    start, end = row.notes[0].partition("loss ")[2].split(" → ")
    assert float(end.partition(",")[0]) < 0.9 * float(start)
