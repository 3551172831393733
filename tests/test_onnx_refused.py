"""ONNX files that cannot be compressed, or not by what was asked: refused by name; what is no layer is told."""

from __future__ import annotations

import runpy
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from compress.__main__ import main
from compress.errors import InputError, UnsupportedError
from compress.models.loading import load
from compress.models.onnx_interface import Feed, Interface
from compress.progress import Progress

onnx_graphs = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("onnx_graphs.py"))))
PROFILE = "cpu-x86-avx512-vnni"
INT8 = "rtn(format=int8(channel)), act_quant(static=true)"


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = onnx_graphs.save(onnx_graphs.classifier(), tmp_path_factory.mktemp("onnx") / "classifier.onnx")
    return path


def _with_input(model: onnx.ModelProto, dims: list[int | str]) -> onnx.ModelProto:
    model.graph.input[0].CopyFrom(helper.make_tensor_value_info(model.graph.input[0].name, TensorProto.FLOAT, dims))
    return model


def _second_input() -> onnx.ModelProto:
    model = onnx_graphs.classifier()
    model.graph.input.append(helper.make_tensor_value_info("mask", TensorProto.FLOAT, [1]))
    return model


def _quantized() -> onnx.ModelProto:
    g = onnx_graphs.Graph()
    scale, zero = g.constant("s", np.float32(0.1)), g.constant("z", np.uint8(0))
    x = g.node("QuantizeLinear", ["input", scale, zero], "q")
    g.node("DequantizeLinear", [x, scale, zero], "output")
    return g.model(["batch", *onnx_graphs.SIZE], {"output": ["batch", *onnx_graphs.SIZE]})  # type: ignore[no-any-return]


def _without_layers() -> onnx.ModelProto:
    g = onnx_graphs.Graph()
    g.node("Relu", ["input"], "output")
    return g.model(["batch", *onnx_graphs.SIZE], {"output": ["batch", *onnx_graphs.SIZE]})  # type: ignore[no-any-return]


def _suppressed() -> onnx.ModelProto:
    g = onnx_graphs.Graph()
    x = g.node("Conv", ["input", g.weight("w", 1, 3, 3, 3)], "c")
    g.node("Cast", [g.node("NonZero", [x], "n")], "output", to=TensorProto.FLOAT)
    return g.model([1, *onnx_graphs.SIZE], {"output": ["axes", "found"]})  # type: ignore[no-any-return]


def _endless() -> onnx.ModelProto:
    """A loop of 2^62 turns: it is refused, not run."""
    g = onnx_graphs.Graph()
    scalar = {"turn": TensorProto.INT64, "go": TensorProto.BOOL, "more": TensorProto.BOOL, "found": TensorProto.INT64}
    turn, go, more, found = (helper.make_tensor_value_info(name, kind, []) for name, kind in scalar.items())
    pairs = (("go", "more"), ("turn", "found"))
    body = [helper.make_node("Identity", [value], [copy]) for value, copy in pairs]
    turns, yes = g.constant("turns", np.int64(2**62)), g.constant("yes", np.bool_(True))
    inner = helper.make_node("Loop", [turns, yes], ["all"])
    inner.attribute.append(helper.make_attribute("body", helper.make_graph(body, "body", [turn, go], [more, found])))
    branches = [
        helper.make_graph([*nodes, helper.make_node("Relu", ["input"], ["out"])], name, [], [_any("out")])
        for name, nodes in (("then", [inner]), ("otherwise", []))
    ]
    g.node("If", ["yes"], "output", then_branch=branches[0], else_branch=branches[1])
    return g.model(["batch", *onnx_graphs.SIZE], {"output": ["batch", *onnx_graphs.SIZE]})  # type: ignore[no-any-return]


def _any(name: str) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, None)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (_endless, "has loops"),
        (lambda: _with_input(onnx_graphs.classifier(), [1, 3, 2**40, 2**20]), "more than 2 GiB"),
        (lambda: _with_input(onnx_graphs.classifier(), ["batch", 3, "height", "width"]), "make_dynamic_shape_fixed"),
        (_second_input, "first axes differ"),
        (_quantized, "quantized already"),
        (_without_layers, "no layer to compress"),
        (_suppressed, "non-maximum suppression"),
    ],
)
def test_graphs_that_cannot_be_compressed_are_refused_by_name(
    tmp_path: Path, make: Callable[[], onnx.ModelProto], said: str
) -> None:
    path = onnx_graphs.save(make(), tmp_path / "model.onnx")
    with pytest.raises(UnsupportedError, match=said):
        load(path)
    assert main(["plan", str(path), "--passes", INT8, "--profile", PROFILE]) == 4


def test_names_out_of_a_file_drive_no_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = onnx_graphs.classifier()
    model.graph.input[0].type.tensor_type.shape.dim[2].dim_param = "\x1b[31m\u202eh"
    path = onnx_graphs.save(model, tmp_path / "model.onnx")
    assert main(["plan", str(path), "--passes", INT8, "--profile", PROFILE]) == 4
    told = capsys.readouterr().err
    assert "\\x1b[31m\\u202eh" in told and not {"\x1b", "\u202e"} & set(told)
    Progress().note("warning: \x1b[2J")
    assert capsys.readouterr().err == "warning: \\x1b[2J\n"


def test_what_looks_like_a_layer_and_is_none_is_told_of(tmp_path: Path) -> None:
    g = onnx_graphs.Graph()
    x = g.node("Conv", ["input", g.weight("w", 4, 3, 3, 3)], "c", "first", pads=[1, 1, 0, 0])
    x = g.node("ConvTranspose", [x, g.weight("v", 4, 2, 2, 2)], "t", "up")
    shared = g.weight("u", 2, 2, 1, 1)
    x = g.node("Conv", [g.node("Conv", [x, shared], "d", "one"), shared], "output", "two")
    model = load(onnx_graphs.save(g.model(["n", 3, 12, 12], {"output": ["n", 2, 12, 12]}), tmp_path / "model.onnx"))
    assert list(model.structure.layers) == ["one", "two"]
    told = " ".join(model.warnings)
    assert "first (padding" in told and "ConvTranspose up" in told and "2 layers share a weight" in told


@pytest.mark.parametrize("passes", ["smoothquant, " + INT8, "rotate, rtn(bits=4)", "rtn(bits=8), tune"])
def test_passes_that_trace_or_differentiate_are_refused_by_name(
    classifier: Path, passes: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", str(classifier), "--passes", passes, "--profile", PROFILE]) == 4
    said = capsys.readouterr().err
    assert "is an ONNX graph" in said and "rtn, gptq" in said


def test_targets_that_take_no_graph_say_so(classifier: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = ["plan", str(classifier), "--passes", INT8]
    for choice in (["--profile", "nvidia-t4"], ["--profile", PROFILE, "--target", "checkpoint"]):
        assert main([*plan, *choice]) == 4
        assert "target onnx only" in capsys.readouterr().err
    assert main([*plan, "--profile", PROFILE]) == 0


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"input": "i", "shape": [1], "batch": 0, "outputs": []}', "[" * 99_999]
)
def test_an_interface_that_is_none_is_an_input_error(text: str) -> None:
    with pytest.raises(InputError, match="tell no interface"):
        Interface.read(text)
    whole = Interface((Feed("images", "float32", (3, 4, 5)),), 0, (("a", (2,)),))
    assert Interface.read(whole.text) == whole
    with pytest.raises(InputError, match="tell no interface"):
        Interface.read(whole.text.replace("4", "-4"))
