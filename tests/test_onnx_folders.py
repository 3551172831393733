"""What lies beside an ONNX graph is read, and what cannot be compressed is refused by name."""

from __future__ import annotations

import runpy
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from compress.errors import InputError, ResourceError, UnsupportedError, UsageError
from compress.models import onnx_prepare
from compress.models.loading import load
from compress.models.model import Task

onnx_graphs = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("onnx_graphs.py"))))


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = onnx_graphs.save_folder(onnx_graphs.encoder(), tmp_path_factory.mktemp("encoder") / "encoder")
    return folder


def test_images_of_any_size_are_fixed_by_the_config_beside_them(tmp_path: Path) -> None:
    model = onnx_graphs.classifier()
    for dim, name in zip(model.graph.input[0].type.tensor_type.shape.dim[1:], "chw", strict=True):
        dim.dim_param = name
    folder = onnx_graphs.save_folder(
        model, tmp_path / "vit", image_size=12, architectures=["ViTForImageClassification"]
    )
    (folder / "preprocessor_config.json").write_text('{"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}')
    found = load(folder)
    assert found.task is Task.IMAGE and found.image and found.image.shape == (3, 12, 12)
    assert found.image.preprocess.mean == (0.5, 0.5, 0.5) and not found.warnings
    (folder / "preprocessor_config.json").write_text('{"image_mean": [0, 0, 0], "rescale_factor": 1.0}')
    with pytest.raises(UnsupportedError, match="does not take pixels from 0 to 1"):
        load(folder)


def _with_cache() -> onnx.ModelProto:
    model = onnx_graphs.encoder("logits")
    model.graph.input.append(helper.make_tensor_value_info("past_key_values.0.key", TensorProto.FLOAT, ["batch", 2]))
    return model


@pytest.mark.parametrize(
    ("make", "config", "said"),
    [
        (_with_cache, {}, "decoder language model, whose cache is past_key_values.0.key"),
        (onnx_graphs.encoder, {"architectures": ["GPT2LMHeadModel"]}, "Compress the PyTorch checkpoint"),
        (onnx_graphs.encoder, {"is_encoder_decoder": True}, "is an encoder-decoder"),
        (onnx_graphs.encoder, {"vision_config": {}, "text_config": {}}, "vision-language model"),
    ],
)
def test_what_generates_is_refused_by_name(
    tmp_path: Path, make: Callable[[], onnx.ModelProto], config: dict[str, Any], said: str
) -> None:
    folder = onnx_graphs.save_folder(make(), tmp_path / "model", **config)
    with pytest.raises(UnsupportedError, match=said):
        load(folder)


def test_folders_of_several_graphs_are_refused_by_name(encoder: Path, tmp_path: Path) -> None:
    names = ("decoder_model.onnx", "encoder_model.onnx")
    for name in names:
        (tmp_path / name).write_bytes((encoder / "model.onnx").read_bytes())
        with pytest.raises(UnsupportedError, match=r"a decoder|encoder-decoder or multi-modal"):
            load(tmp_path)
    for name, other in zip(names, ("a.onnx", "b.onnx"), strict=True):
        (tmp_path / name).rename(tmp_path / other)
    with pytest.raises(UsageError, match=r"holds a.onnx, b.onnx and no model.onnx"):
        load(tmp_path)
    for text in ("{", "[]"):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(InputError, match=r"config.json"):
            load(tmp_path / "a.onnx")


def _two_axes() -> onnx.ModelProto:
    model = onnx_graphs.encoder()
    model.graph.input[1].type.tensor_type.shape.dim[1].dim_param = "other"
    return model


def _doubled() -> onnx.ModelProto:
    model = onnx_graphs.encoder(name="h")
    model.graph.node.append(helper.make_node("Concat", ["h", "h"], ["twice"], axis=1))
    model.graph.output[0].CopyFrom(helper.make_tensor_value_info("twice", TensorProto.FLOAT, ["batch", "twice", 16]))
    return model


def _halves() -> onnx.ModelProto:
    model = onnx_graphs.table()
    model.graph.input[0].type.tensor_type.elem_type = TensorProto.FLOAT16
    return model


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (_two_axes, "make_dynamic_shape_fixed --dim_param length"),
        (_doubled, "Supported are outputs of the input's length"),
        (_halves, "numbers is FLOAT16"),
    ],
)
def test_inputs_and_outputs_that_are_no_samples_are_refused(
    tmp_path: Path, make: Callable[[], onnx.ModelProto], said: str
) -> None:
    with pytest.raises(UnsupportedError, match=said):
        load(onnx_graphs.save(make(), tmp_path / "model.onnx"))


def test_a_graph_that_asks_for_too_much_memory_is_stopped(tmp_path: Path) -> None:
    g = onnx_graphs.Graph()
    x = g.node("MatMul", ["input", g.weight("w", 4, 4)], "m")
    many = g.node("Expand", [x, g.constant("shape", np.array([2**16, 2**16, 1, 1]))], "huge")
    g.node("ReduceMax", [many], "output", axes=[0, 1], keepdims=0)
    model = g.model(["batch", 4], {"output": ["batch", 4]})
    with pytest.raises(ResourceError, match="the most that a graph may take"):
        load(onnx_graphs.save(model, tmp_path / "model.onnx"))


def test_a_graph_that_is_not_simplified_says_so(encoder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not load(encoder).warnings
    monkeypatch.setattr(onnx_prepare, "RUN_DOMAINS", frozenset({"none"}))
    assert "compressed as it was written" in load(encoder).warnings[0]
