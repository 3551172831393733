"""What every registered lowering gets for free: what it declares, and that nothing else of a layer is ever dropped."""

from __future__ import annotations

from dataclasses import fields, replace
from itertools import product
from typing import Any

import onnx_ir as ir
import pytest
import torch

from compress import hwprofiles
from compress.export import TARGETS, find
from compress.export.onnx import LOWERINGS, float_matmul, half
from compress.export.onnx.graph import GraphBuilder
from compress.export.onnx.lowering import Asked, Choice, Lowering, Source, choose, lowerings
from compress.formats import NAMES, parse_format
from compress.honours import WANTED, Honours, combined
from compress.hwprofiles import Runtime
from compress.layer import ActSpec, Layer, LayerKind, LayerSpec
from compress.target import Refusal, honoured, plan_layers
from compress.transforms import Hadamard

PROFILE = hwprofiles.load("cpu-x86-avx512-vnni")
RUNTIME = PROFILE.runtime("onnxruntime")
# what a layer is, by which no target computes anything else
DESCRIBING = {"name", "kind", "shape", "users", "source_dtype", "format", "segment", "turned", "routed", "kernel"}
DESCRIBING |= {"groups", "bias_dtype", "zeros"}
CHECKED = {"act", "pre", "has_bias"}
TEXTS = [None, *(f"{name}(group=32)" for name in ("int4", "int3", "int8")), "int8(channel)", "int4(group=32, signed)"]
TEXTS += [name for name in NAMES if name not in ("table",)]
ACTS = [None, ActSpec(parse_format("int8(tensor, asymmetric)")), ActSpec(parse_format("int8(token)"))]
ACTS += [ActSpec(parse_format("int8(tensor)"), static=True)]


def spec(kind: LayerKind, **changes: Any) -> LayerSpec:
    kernel = (8, 2, 4) if kind is LayerKind.CONV else None
    return replace(LayerSpec("a", kind, (16, 64), ("a",), kernel=kernel), **changes)


def variants(kind: LayerKind) -> list[LayerSpec]:
    """Layers of every format, inputs, transforms and biases."""
    made = []
    for text, act, pre, bias in product(TEXTS, ACTS, ((), (Hadamard(32),)), (False, True)):
        form = None if text is None else parse_format(text)
        made.append(spec(kind, format=form, act=act, pre=pre, has_bias=bias))
    return made


@pytest.fixture(params=LOWERINGS)
def lowering(request: pytest.FixtureRequest) -> Asked:
    return lowerings()[LOWERINGS.index(str(request.param))]


def test_a_lowering_declares_what_it_writes_and_takes_some_layer_of_each_kind(lowering: Asked) -> None:
    assert isinstance(lowering.LOWERS, Lowering) and lowering.__doc__
    taken = {
        one.kind for kind in LayerKind for one in variants(kind) if isinstance(lowering.choose(one, RUNTIME), Choice)
    }
    assert taken == lowering.LOWERS.honours.kinds


def test_what_a_lowering_takes_it_says_by_what_operator_and_how_large(lowering: Asked) -> None:
    for one in (each for kind in LayerKind for each in variants(kind)):
        answer = lowering.choose(one, RUNTIME)
        if isinstance(answer, Choice):
            assert answer.operator and answer.stored_bytes > 0 and answer.lowers is lowering.LOWERS
            assert answer.rounds_inputs <= (one.act is None) and answer.kernel != "no"


@pytest.mark.parametrize("kind", LayerKind)
def test_a_layer_that_is_taken_is_declared_in_all_it_asks_for(kind: LayerKind) -> None:
    answers = [(one, choose(one, RUNTIME)) for one in variants(kind)]
    assert any(isinstance(answer, Choice) for _, answer in answers)
    for one, answer in answers:
        assert isinstance(answer, Refusal) or answer.lowers.honours.lacking(one) == ""


def test_every_field_of_a_layer_is_either_checked_or_only_describes_it() -> None:
    """A new field (a mask) fails here until it is declared in compress/honours.py, or is told to change nothing."""
    assert {field.name for field in fields(LayerSpec)} == DESCRIBING | CHECKED
    assert {field.name for field in fields(Honours)} == {"kinds", *WANTED}
    assert len(WANTED) == len(CHECKED)


class Forgetful:
    """A lowering that takes all layers, whatever they ask for, and declares linear ones alone."""

    def choose(self, one: LayerSpec, runtime: Runtime) -> Choice | Refusal | None:
        return Choice("Forgetful", "fast", __name__, 1) if one.format is not None else None


LOWERS = Lowering(Honours(frozenset({LayerKind.LINEAR})), linear=float_matmul.linear)


@pytest.mark.parametrize(
    ("asked", "named"),
    [
        (spec(LayerKind.LINEAR, act=ACTS[2]), r"inputs in int8\(token\) of a layer of kind linear"),
        (spec(LayerKind.LINEAR, pre=(Hadamard(32),)), "inputs transformed by .*32.* of a layer of kind linear"),
        (spec(LayerKind.LINEAR, has_bias=True), "the bias of a layer of kind linear"),
        (spec(LayerKind.CONV), "layers of kind conv"),
        (spec(LayerKind.EXPERT), "layers of kind expert"),
    ],
)
def test_a_field_that_a_lowering_forgets_is_refused_by_name(
    monkeypatch: pytest.MonkeyPatch, asked: LayerSpec, named: str
) -> None:
    monkeypatch.setattr("compress.export.onnx.lowering.lowerings", lambda: (Forgetful(),))
    plain = spec(LayerKind.LINEAR, format=parse_format("int8(channel)"))
    assert isinstance(choose(plain, RUNTIME), Choice)
    answer = choose(replace(asked, format=plain.format), RUNTIME)
    assert isinstance(answer, Refusal)
    with pytest.raises(AssertionError, match=f"Forgetful does not write {named}; leave out the pass that sets it"):
        raise AssertionError(answer.reason)


@pytest.mark.parametrize(
    ("kind", "missing"),
    [
        (LayerKind.LINEAR, "linear"),
        (LayerKind.EXPERT, "linear"),
        (LayerKind.CONV, "conv"),
        (LayerKind.EMBEDDING, "gather and linear"),
    ],
)
def test_a_kind_that_is_declared_without_its_function_is_told_when_the_module_is_imported(
    kind: LayerKind, missing: str
) -> None:
    with pytest.raises(TypeError, match=f"layers of kind {kind} offers {missing}"):
        Lowering(Honours(frozenset({kind})))


@pytest.mark.parametrize("name", TARGETS)
def test_no_target_drops_the_transforms_of_layers_that_it_writes_none_for(name: str) -> None:
    """A mixture's experts and an embedding: their `pre` was once left out of the graph without a word."""
    target = find(name)
    profiles = [hwprofiles.load(each) for each in hwprofiles.names()]
    profile = next((each for each in profiles if target.RUNTIME in each.runtimes), PROFILE)
    for kind in (LayerKind.EXPERT, LayerKind.EMBEDDING, LayerKind.CONV):
        one = spec(kind, pre=(Hadamard(32),))
        assert isinstance(plan_layers(target, {"a": one}, profile)["a"], Refusal)


@pytest.mark.parametrize("name", TARGETS)
def test_a_target_declares_what_it_writes(name: str) -> None:
    honours = find(name).HONOURS
    assert LayerKind.LINEAR in honours.kinds & honours.bias
    assert honours.act | honours.pre | honours.bias <= honours.kinds


def test_a_refusal_stays_what_it_was_and_several_declarations_add_up() -> None:
    one, none = Honours(frozenset({LayerKind.LINEAR})), Honours(frozenset())
    refused = Refusal("a reason")
    assert honoured(spec(LayerKind.CONV), refused, one) is refused
    both = combined([one, Honours(frozenset({LayerKind.CONV}), bias=frozenset({LayerKind.CONV}))])
    assert both == Honours(frozenset({LayerKind.LINEAR, LayerKind.CONV}), bias=frozenset({LayerKind.CONV}))
    assert combined([]) == none


def test_it_is_the_lowering_that_says_whether_its_kernel_rounds_inputs_and_computes_in_half() -> None:
    exact = RUNTIME.model_copy(
        update={"formats": tuple(entry.model_copy(update={"accuracy_level": 0}) for entry in RUNTIME.formats)}
    )
    layer = spec(LayerKind.LINEAR, format=parse_format("int4(group=32)"))
    found = [choose(layer, runtime) for runtime in (RUNTIME, exact)]
    assert [isinstance(each, Choice) and each.rounds_inputs for each in found] == [True, False]
    assert isinstance(found[0], Choice) and found[0].lowers.half == {"MatMulNBits", "GatherBlockQuantized"}
    plain = choose(spec(LayerKind.LINEAR), RUNTIME)
    assert isinstance(plain, Choice) and not plain.rounds_inputs and not plain.lowers.half


def test_a_table_of_rows_is_marked_whatever_its_tensor_is_called() -> None:
    one = spec(LayerKind.EMBEDDING, name="anything", source_dtype=torch.float16)
    answer = choose(one, RUNTIME)
    assert isinstance(answer, Choice)
    ids = ir.Value(name="ids", type=ir.TensorType(ir.DataType.INT64))
    graph = ir.Graph([ids], [], nodes=[], name="rows")
    builder = GraphBuilder(graph)
    layer = Layer("anything", one.kind, torch.zeros(16, 64, dtype=torch.float16))
    rows = float_matmul.gather(builder, Source(one, answer, lambda: layer), ids)
    gathered = rows.producer()
    assert gathered is not None and gathered.op_type == "Gather" and half.TABLE in gathered.meta
