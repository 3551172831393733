"""ONNX files that are broken or hostile: refused by what is wrong with them, before anything outside is read."""

from __future__ import annotations

import os
import runpy
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from compress.errors import CompressError, InputError, UnsupportedError, UsageError
from compress.models.onnx_file import open_file, tensors

onnx_graphs = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("onnx_graphs.py"))))


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """A model folder, with one `stem.weight` in a file of its own; beside the folder a file that is not for it."""
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "secret").write_bytes(bytes(4096))
    point(folder, "weights.bin", data=True)
    return folder


def point(folder: Path, location: str, data: bool = False, **more: str) -> Path:
    """Write a model whose `stem.weight` lies at a place. data: also put it there."""
    model = onnx_graphs.classifier()
    tensor = next(each for each in model.graph.initializer if each.name == "stem.weight")
    if data:
        (folder / location).write_bytes(tensor.raw_data)
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in {"location": location, **more}.items():
        entry = tensor.external_data.add()
        entry.key, entry.value = key, value
    path: Path = onnx_graphs.save(model, folder / "model.onnx")
    return path


def test_weights_beside_the_model_are_read_into_it(outside: Path) -> None:
    opened = open_file(outside / "model.onnx")
    expected = next(t for t in onnx_graphs.classifier().graph.initializer if t.name == "stem.weight")
    found = next(t for t in tensors(opened.model) if t.name == "stem.weight")
    assert found.raw_data == expected.raw_data and found.data_location == TensorProto.DEFAULT
    assert opened.nbytes == (outside / "model.onnx").stat().st_size + len(expected.raw_data)
    whole = open_file(onnx_graphs.save(onnx_graphs.classifier(), outside / "whole.onnx"))
    assert whole.sha256 != opened.sha256


def test_the_digest_covers_weights_in_other_files(outside: Path) -> None:
    before = open_file(outside / "model.onnx").sha256
    data = outside / "weights.bin"
    data.write_bytes(b"\0" * 4 + data.read_bytes()[4:])
    assert open_file(outside / "model.onnx").sha256 != before


@pytest.mark.parametrize(
    "location",
    ["../secret", "a/../../secret", "/etc/passwd", "..\\secret", "C:\\secret", "", "a\0b", "\\\\host\\share"],
)
def test_names_that_lead_out_of_the_folder_are_not_followed(outside: Path, location: str) -> None:
    with pytest.raises(InputError, match="not inside its folder"):
        open_file(point(outside, location))


def _link(folder: Path) -> None:
    (folder / "weights.bin").unlink()
    (folder / "weights.bin").symlink_to(folder.parent / "secret")


def _linked_folder(folder: Path) -> None:
    (folder / "sub").symlink_to(folder.parent)
    point(folder, "sub/secret")


def _hard_link(folder: Path) -> None:
    (folder / "weights.bin").unlink()
    os.link(folder.parent / "secret", folder / "weights.bin")


def _folder(folder: Path) -> None:
    (folder / "weights.bin").unlink()
    (folder / "weights.bin").mkdir()


def _pipe(folder: Path) -> None:
    (folder / "weights.bin").unlink()
    os.mkfifo(folder / "weights.bin")


def _short(folder: Path) -> None:
    (folder / "weights.bin").write_bytes(b"1234")


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (_link, "link out of its folder"),
        (_linked_folder, "link out of its folder"),
        (_hard_link, "hard links"),
        (_folder, "regular file|cannot be read"),
        (_pipe, "not a regular file"),
        (_short, "has 4 bytes"),
        (lambda folder: (folder / "weights.bin").unlink(), "not there"),
        (lambda folder: point(folder, "weights.bin", offset="-4"), "offset -4"),
        (lambda folder: point(folder, "weights.bin", offset="9223372036854775807"), "has 864 bytes"),
        (lambda folder: point(folder, "weights.bin", offset="x"), "no numbers"),
        (lambda folder: point(folder, "weights.bin", length="4"), "length 4"),
        (lambda folder: point(folder, "weights.bin", __class__="x"), "allowed once each"),
    ],
)
def test_ranges_and_files_that_are_not_what_they_say_are_refused(
    outside: Path, spoil: Callable[[Path], None], said: str
) -> None:
    spoil(outside)
    with pytest.raises(InputError, match=said):
        open_file(outside / "model.onnx")


def test_values_that_overlap_in_part_are_refused_and_shared_ones_are_not(outside: Path) -> None:
    def both(offset: int) -> Path:
        model = onnx_graphs.classifier()
        for name, start in (("deep.bias", 0), ("bn.s", offset)):
            tensor = next(each for each in model.graph.initializer if each.name == name)
            tensor.ClearField("raw_data")
            tensor.data_location = TensorProto.EXTERNAL
            for key, value in (("location", "weights.bin"), ("offset", str(start))):
                entry = tensor.external_data.add()
                entry.key, entry.value = key, value
        path: Path = onnx_graphs.save(model, outside / "model.onnx")
        return path

    with pytest.raises(InputError, match="overlap"):
        open_file(both(4))
    assert open_file(both(0)) and open_file(both(32))


def _shape(model: onnx.ModelProto) -> None:
    model.graph.initializer[0].dims[0] = 9


def _negative(model: onnx.ModelProto) -> None:
    model.graph.initializer[0].dims[0] = -8


def _huge(model: onnx.ModelProto) -> None:
    model.graph.initializer[0].dims[:] = [2**31, 2**31, 2**31]


def _type(model: onnx.ModelProto) -> None:
    model.graph.initializer[0].data_type = 99


def _cycle(model: onnx.ModelProto) -> None:
    model.graph.node[0].input[0] = "q"


def _twice(model: onnx.ModelProto) -> None:
    model.graph.node[1].output[0] = model.graph.node[0].output[0]


def _custom(model: onnx.ModelProto) -> None:
    model.graph.node[0].domain = "acme"
    model.opset_import.append(helper.make_opsetid("acme", 1))


def _old(model: onnx.ModelProto) -> None:
    model.opset_import[0].version = 6


def _empty(model: onnx.ModelProto) -> None:
    del model.graph.node[:]


@pytest.mark.parametrize(
    ("spoil", "kind", "said"),
    [
        (_shape, InputError, "its shape"),
        (_negative, InputError, "has the shape"),
        (_huge, InputError, "has the shape"),
        (_type, InputError, "unknown type 99"),
        (_cycle, InputError, "not valid ONNX"),
        (_twice, InputError, "not valid ONNX"),
        (_custom, UnsupportedError, "acme::Conv"),
        (_old, UnsupportedError, "opset 6"),
        (_empty, InputError, "no graph"),
    ],
)
def test_broken_graphs_are_refused_by_what_is_wrong(
    tmp_path: Path, spoil: Callable[[onnx.ModelProto], None], kind: type[CompressError], said: str
) -> None:
    model = onnx_graphs.classifier()
    spoil(model)
    with pytest.raises(kind, match=said):
        open_file(onnx_graphs.save(model, tmp_path / "model.onnx"))


def _functions(called: list[list[str]]) -> onnx.ModelProto:
    """A graph that calls the last of functions f0, f1, …, each of which calls, one after another, what is listed."""
    own, standard = helper.make_opsetid("own", 1), helper.make_opsetid("", 17)

    def chain(names: list[str]) -> list[onnx.NodeProto]:
        values = ["x", *(f"t{place}" for place in range(len(names) - 1)), "y"]
        domains = ["own" if name.startswith("f") else "" for name in names]
        return [
            helper.make_node(name, [values[place]], [values[place + 1]], domain=domains[place])
            for place, name in enumerate(names)
        ]

    made = [
        helper.make_function("own", f"f{place}", ["x"], ["y"], chain(names), [standard, own])
        for place, names in enumerate(called)
    ]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 3, 4, 4]) for name in "xy"]
    graph = helper.make_graph(chain([f"f{len(called) - 1}"]), "calls", ends[:1], ends[1:])
    return helper.make_model(graph, functions=made, opset_imports=[standard, own], ir_version=8)


@pytest.mark.parametrize(
    ("called", "kind", "said"),
    [
        ([["Neg"] * 10, *([f"f{place}"] * 10 for place in range(40))], UnsupportedError, "more than 1,000,000"),
        ([["Neg"], ["f2"], ["f1"]], InputError, "calls itself"),
        ([["Neg"], *([f"f{place}"] for place in range(5000))], InputError, "too deeply"),
    ],
)
def test_functions_that_do_not_end_or_do_not_fit_are_refused_before_they_are_written_out(
    tmp_path: Path, called: list[list[str]], kind: type[CompressError], said: str
) -> None:
    with pytest.raises(kind, match=said):
        open_file(onnx_graphs.save(_functions(called), tmp_path / "model.onnx"))


def test_operators_of_other_domains_are_refused_in_branches_too(tmp_path: Path) -> None:
    model = onnx_graphs.classifier()
    inner = helper.make_graph([helper.make_node("Odd", [], ["o"], domain="acme")], "inner", [], [])
    node = helper.make_node("If", [model.graph.node[0].output[0]], ["z"], then_branch=inner, else_branch=inner)
    model.graph.node.append(node)
    with pytest.raises(UnsupportedError, match="acme::Odd"):
        open_file(onnx_graphs.save(model, tmp_path / "model.onnx"))


def test_a_few_functions_are_written_out(tmp_path: Path) -> None:
    model = _functions([["Neg"] * 10, ["f0"] * 10])
    assert open_file(onnx_graphs.save(model, tmp_path / "model.onnx")).model.functions


def test_files_that_are_no_onnx_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    with pytest.raises(UsageError, match="No such file"):
        open_file(path)
    content = onnx_graphs.classifier().SerializeToString()
    for broken in (b"", b"not a model", np.random.default_rng(0).bytes(999), content[: len(content) // 2]):
        path.write_bytes(broken)
        with pytest.raises(InputError, match=r"model\.onnx"):
            open_file(path)
