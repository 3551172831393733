"""prune_channels: an image classifier whose layers become narrower, in the store and in the exported graph."""

from __future__ import annotations

import json
from copy import deepcopy
from math import prod
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor

import compress
from compress.artifact import verify
from compress.engine import store
from compress.errors import InputError, UnsupportedError, UsageError
from compress.inputs.datasets import Calibration, calibrate
from compress.models.model import Model
from compress.models.placing import whole_module
from compress.passes.prune_channels import PruneChannels
from compress.pipeline import Pipeline, Result

BARE = {"by": "l2", "refit": "none"}


@pytest.fixture(scope="module")
def model(cnn: str) -> Model:
    return compress.load(cnn)


@pytest.fixture(scope="module")
def calibration(model: Model, images_file: Path) -> Calibration:
    return calibrate(model, images_file, samples=64)


@pytest.fixture(scope="module")
def halved(model: Model) -> Result:
    """Half of the channels gone, in multiples of four."""
    return Pipeline(PruneChannels(multiple=4, **BARE)).run(model)  # type: ignore[arg-type]


def logits(model: Model, images: Tensor | None = None) -> Tensor:
    if images is None:
        images = torch.randn(5, 3, 12, 12, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found: Tensor = whole_module(model)(images)
    return found


def test_the_model_left_is_the_one_in_which_nothing_reads_the_smallest_channels(halved: Result, model: Model) -> None:
    twin = deepcopy(whole_module(model))  # whose weights are the model's own tensors
    for maker, reader, count in (("stem.0", "point", 4), ("twice", "head", 8)):
        norms = twin.get_submodule(maker).weight.flatten(1).norm(dim=1)  # type: ignore[operator, union-attr]
        gone = torch.argsort(norms)[:count]
        weight = twin.get_submodule(reader).weight
        weight.data.view(len(weight), len(norms), -1)[:, gone] = 0.0  # type: ignore[arg-type, operator, union-attr]
    images = torch.randn(5, 3, 12, 12, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(logits(halved.model, images), twin(images), rtol=1e-4, atol=1e-4)


def test_every_shape_that_follows_is_narrower(halved: Result, model: Model) -> None:
    layers = halved.model.structure.layers
    assert {name: (spec.shape, spec.kernel, spec.groups) for name, spec in layers.items()} == {
        "stem.0": ((4, 27), (3, 3, 3), 1),
        "depth": ((4, 9), (1, 3, 3), 4),
        "point": ((16, 4), (4, 1, 1), 1),
        "grouped": ((16, 36), (4, 3, 3), 4),
        "twice": ((8, 64), (16, 2, 2), 1),
        "head": ((5, 288), None, 1),
    }
    assert halved.model.plain_shapes["kept.weight"][0] == (8,) == halved.model.plain_shapes["last.running_var"][0]
    products = 4 * 27 * 144 + 4 * 9 * 36 + (16 * 4 + 16 * 36 + 8 * 64) * 36 + 5 * 288
    assert halved.model.image is not None and halved.model.image.multiplications == products


def test_each_layer_is_told_with_what_became_of_it_or_why_it_stayed(halved: Result) -> None:
    rows = {row.layer: row for row in halved.passes[0].layers}
    assert {name for name, row in rows.items() if row.changed} == {"stem.0", "depth", "point", "twice", "head"}
    assert rows["stem.0"].notes == ("output channels 8 → 4, by l2",)
    assert rows["head"].notes == ("input channels 576 → 288, by l2",)
    assert "convolution of 4 groups" in rows["grouped"].reason


def test_the_plan_has_the_shape_that_is_made(halved: Result, model: Model) -> None:
    laid = Pipeline(PruneChannels(multiple=4)).lay(model)[1].model
    assert {name: spec.shape for name, spec in laid.structure.layers.items()} == {
        name: spec.shape for name, spec in halved.model.structure.layers.items()
    }
    assert laid.weights is None and laid.source_bytes < model.source_bytes


def test_a_store_of_a_narrower_classifier_opens_again(model: Model, tmp_path: Path) -> None:
    made = Pipeline(PruneChannels(multiple=4, **BARE)).run(model, folder=tmp_path / "model")  # type: ignore[arg-type]
    again = store.open_store(tmp_path / "model")
    assert again.edits == made.model.edits and torch.equal(logits(again), logits(made.model))
    assert again.image is not None and made.model.image is not None
    assert again.image.multiplications == made.model.image.multiplications
    path = tmp_path / "model" / "structure.json"
    info = json.loads(path.read_text())
    info["edits"][0]["path"] = "no_such"
    path.write_text(json.dumps(info))
    with pytest.raises(InputError, match="'no_such', which the model does not have"):
        store.open_store(tmp_path / "model")
    info["edits"] = [{"path": "twice", "kind": "resized", "shape": [0, 16, 2, 2]}]
    path.write_text(json.dumps(info))
    with pytest.raises(InputError, match="to nothing"):
        store.open_store(tmp_path / "model")
    info["edits"] = [{"path": "twice", "kind": "resized", "shape": [8, 16]}]
    path.write_text(json.dumps(info))
    with pytest.raises(InputError, match="resizes 'twice', a Conv2d, to"):
        store.open_store(tmp_path / "model")
    info["edits"] = [{"path": "stem", "kind": "no attention", "shape": []}]
    path.write_text(json.dumps(info))
    with pytest.raises(InputError, match="only blocks of a language model"):
        store.open_store(tmp_path / "model")


def test_a_recipe_goes_on_with_the_narrower_layers_and_exports_them(
    model: Model, calibration: Calibration, tmp_path: Path
) -> None:
    text = "prune_channels(multiple=4), prune_channels(multiple=4, only=[twice]), rtn(format=int8(channel))"
    result = Pipeline.parse(text).run(model, calibration)
    assert result.model.structure.layers["head"].shape == (5, 144)
    compress.export(result, profile="cpu-x86-avx512-vnni", out=tmp_path / "out")
    graph = onnx.load(tmp_path / "out" / "onnx" / "model.onnx").graph
    sizes = [
        prod(each.dims)
        for each in graph.initializer
        if each.data_type in (onnx.TensorProto.INT8, onnx.TensorProto.UINT8)
    ]
    assert {4 * 27, 4 * 9, 4 * 16 * 2 * 2, 5 * 144} <= set(sizes)
    assert verify(tmp_path / "out").agrees


def test_least_squares_and_the_error_of_what_is_read_keep_more_than_norms(
    model: Model, calibration: Calibration
) -> None:
    images = torch.cat(calibration.batches())
    before = logits(model, images)

    def lost(**settings: object) -> float:
        item = PruneChannels(multiple=4, keep=("twice",), **settings)  # type: ignore[arg-type]
        found = logits(Pipeline(item).run(model, calibration).model, images)
        return float((found - before).square().mean() / before.square().mean())

    bare, bias, whole = lost(**BARE), lost(by="l2", refit="bias"), lost(by="l2", refit="weights")
    assert whole < bias < bare
    assert (
        lost(refit="weights") <= whole
        and lost() < bare
        and lost(by="activation", refit="none") != lost(by="l1", refit="none")
    )


def test_shares_and_widths_are_those_asked_for(model: Model) -> None:
    def widths(**settings: object) -> tuple[int, int]:
        laid = Pipeline(PruneChannels(**settings)).lay(model)[1].model.structure.layers  # type: ignore[arg-type]
        return laid["stem.0"].shape[0], laid["twice"].shape[0]

    assert widths(share=0.3, multiple=1) == (6, 11)
    assert widths(share=0.99, multiple=1) == (1, 1)
    assert widths(share=0.5) == (8, 8)
    assert widths(share=0.25, shares={"twice": 0.75}, multiple=2) == (6, 4)
    assert widths(share=0.25, keep=["stem.*"], multiple=1) == (8, 12)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"share": 1}, "share=1"),
        ({"share": 0}, "share=0"),
        ({"shares": {"twice": 1.5}}, "shares.twice=1.5"),
        ({"targets": ["twice"]}, "takes no targets"),
        ({"keep": ["no_such"]}, "'no_such' in keep matches no layer"),
        ({"only": ["head"]}, "head stays as wide: the model puts it out"),
        ({"shares": {"grouped": 0.3}}, "grouped stays as wide: grouped is a convolution of 4 groups"),
        ({"keep": ["stem.0", "twice"]}, "no layer can become narrower"),
        ({"multiple": 16}, "stem.0: 8 channels are as many as share and multiple=16 leave"),
    ],
)
def test_settings_that_leave_nothing_to_do_or_too_little_are_refused(
    settings: dict[str, object], message: str, model: Model
) -> None:
    with pytest.raises(UsageError, match=message):
        Pipeline(PruneChannels.build(settings)).lay(model)


def test_other_kinds_of_models_are_refused(llama: Path) -> None:
    with pytest.raises(UnsupportedError, match="For those take prune_width"):
        Pipeline(PruneChannels()).lay(compress.load(llama))


STREAM = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.odd, self.head = nn.Conv2d(8, 4, 1), nn.Linear(4, 3)

    def forward(self, x):
        x = self.stem(x).relu()
        x = x + self.b(self.a(x).relu())
        return self.head(self.odd(x).mean((2, 3)).view(-1, 4))


class Chain(nn.Sequential):
    def __init__(self):
        layers = [nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 4, 3)]
        super().__init__(*layers)


def net():
    torch.manual_seed(0)
    return Net().eval()


def chain():
    torch.manual_seed(0)
    return Chain().eval()


def sample_inputs(batch=2):
    return (torch.randn(batch, 3, 6, 6, generator=torch.Generator().manual_seed(0)),)
"""


@pytest.fixture(scope="module")
def code(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("code") / "stream.py"
    path.write_text(STREAM)
    return path


@pytest.fixture(scope="module")
def stream(code: Path) -> Model:
    return compress.load(f"{code}:net")


def test_a_layer_narrower_on_both_sides_is_solved_for_the_outputs_that_it_keeps(code: Path, tmp_path: Path) -> None:
    model = compress.load(f"{code}:chain")
    maker = np.random.default_rng(0)
    pixels = maker.integers(0, 256, (300, 6, 6, 3), dtype=np.uint8)
    np.savez(tmp_path / "images.npz", images=pixels, labels=maker.integers(0, 3, 300))
    calibration = calibrate(model, tmp_path / "images.npz", samples=300)
    images = torch.cat(calibration.batches())
    before = logits(model, images)

    def lost(refit: str) -> float:
        result = Pipeline.parse(f"prune_channels(multiple=2, refit={refit})").run(model, calibration)
        assert [result.model.structure.layers[name].shape for name in "025"] == [(4, 27), (4, 36), (3, 16)]
        return float((logits(result.model, images) - before).square().mean())

    assert lost("all") == lost("weights") < lost("bias") < lost("none")  # every layer after the first lost inputs


def test_a_residual_stream_is_left_alone_unless_asked_for(stream: Model) -> None:
    bare = Pipeline.parse("prune_channels(multiple=2, by=l2, refit=none)").run(stream)
    rows = {row.layer: row for row in bare.passes[0].layers}
    assert {name for name, row in rows.items() if row.changed} == {"a", "b"}
    assert "residual stream that 2 layers add to" in rows["stem"].reason
    assert rows["odd"].reason == "the module's code counts on its number of channels"
    whole = Pipeline.parse("prune_channels(multiple=2, by=l2, refit=none, residual=true)").run(stream)
    layers = whole.model.structure.layers
    assert [layers[name].shape for name in ("stem", "a", "b", "odd")] == [(4, 3), (4, 36), (4, 36), (4, 4)]
    assert "the same channels as b" in whole.passes[0].layers[0].notes


def test_a_pattern_that_would_cut_a_residual_stream_is_refused(stream: Model) -> None:
    with pytest.raises(UsageError, match="added to a residual stream of 2 layers, which would be cut"):
        Pipeline.parse("prune_channels(multiple=2, only=[b])").lay(stream)
    with pytest.raises(UsageError, match="only names stem, but not b"):
        Pipeline.parse("prune_channels(multiple=2, only=[stem], residual=true)").lay(stream)
