"""2:4 weights in TensorRT: which layers qualify, what the builder is told, and that no speed is claimed from it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import compress
from compress import hwprofiles
from compress.engine.layer_stats import LayerStats
from compress.export.tensorrt import building, flavours, record, sparsity, target
from compress.export.tensorrt.rules import EngineChoice
from compress.formats import parse_format
from compress.inputs.datasets import calibrate
from compress.layer import ActSpec, Layer, LayerKind, LayerSpec, Zeros
from compress.maths.masks import Pattern
from compress.models.model import Model
from compress.passes.magnitude import Magnitude
from compress.pipeline import Pipeline
from compress.target import Refusal
from helpers.tensorrt_machine import VERSIONS, Machine, becoming

H100, T4 = hwprofiles.load("nvidia-h100-sxm"), hwprofiles.load("nvidia-t4")
INT8 = {"format": parse_format("int8(channel)"), "act": ActSpec(parse_format("int8(tensor)"), static=True)}
INT4 = {"format": parse_format("int4(group=32)")}


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Machine:
    return becoming(monkeypatch, tmp_path / "cache")


@pytest.fixture(scope="module")
def model(make_llama: Callable[..., Path]) -> Model:
    return compress.load(make_llama("sparse", num_hidden_layers=1, intermediate_size=96, tie_word_embeddings=False))


def linear(zeros: str = "", **changes: Any) -> LayerSpec:
    found = Zeros(Pattern.parse(zeros), 0) if zeros else None
    return replace(LayerSpec("a", LayerKind.LINEAR, (32, 64), ("a",), zeros=found), **changes)


def choice(spec: LayerSpec, profile: hwprofiles.Profile = H100) -> EngineChoice:
    found = target.plan_layer(spec, profile)
    assert not isinstance(found, Refusal), found
    return found


@pytest.mark.parametrize(
    ("spec", "told"),
    [
        (linear("2:4"), sparsity.QUALIFIES),
        (linear("1:4"), sparsity.QUALIFIES),
        (linear("2:4", **INT8), sparsity.QUALIFIES),
        (linear("2:4", **INT4), "no kernel of TensorRT uses"),
        (linear("layer"), "pruned by layer, which no kernel of TensorRT uses"),
        (linear("4:8"), "pruned by 4:8, which no kernel"),
        (linear("2:4", kind=LayerKind.EMBEDDING), "no kernel of TensorRT uses"),
        (linear(), ""),
    ],
)
def test_a_plan_says_what_a_pattern_of_zeros_comes_to(spec: LayerSpec, told: str) -> None:
    note = choice(spec).note
    assert told in note and (bool(told) or "2:4" not in note)


def test_a_chip_without_sparse_tensor_cores_is_told_from_one_that_has_them() -> None:
    assert "SM 75 has no sparse tensor cores" in choice(linear("2:4"), T4).note
    having = {name for name in hwprofiles.names() if (gpu := hwprofiles.load(name).gpu) and gpu.has_sparse_cores}
    assert "nvidia-t4" not in having and {"nvidia-a100-80gb", "nvidia-l4", "nvidia-rtx-5090"} <= having


def test_sparse_storage_goes_into_the_graph_dense_and_a_plan_says_so() -> None:
    found = choice(linear("2:4", format=parse_format("sparse(mask=2:4, values=float16)")))
    plain = choice(linear("2:4", source_dtype=torch.float16))
    assert (found.stored_bytes, found.operator) == (plain.stored_bytes, plain.operator)
    assert "stored dense" in found.note and sparsity.QUALIFIES in found.note and found.decodes


def slow(weight: torch.Tensor) -> bool:
    """K, C, R, S: of every four channels two are zero, for each output channel and place in the kernel."""
    outputs, channels, high, wide = weight.shape
    return all(
        sum(bool(weight[k, c + i, r, s] != 0) for i in range(4)) <= 2
        for k in range(outputs)
        for c in range(0, channels, 4)
        for r in range(high)
        for s in range(wide)
    )


def test_fours_run_along_input_channels_not_along_the_taps_of_a_kernel() -> None:
    spec = LayerSpec("c", LayerKind.CONV, (6, 8 * 9), ("c",), kernel=(8, 3, 3))
    maker = torch.Generator().manual_seed(0)
    by_channel = torch.randn(6, 8, 3, 3, generator=maker)
    by_channel.view(6, 2, 4, 3, 3)[:, :, :2] = 0
    one = Layer("c", LayerKind.CONV, torch.randn(6, 72, generator=maker))
    by_columns = Magnitude(pattern="2:4").layer(one, LayerStats()).float_weight()
    for weight in (by_channel.flatten(1), by_columns, one.float_weight()):
        assert sparsity.holds(spec, replace(one, weight=weight)) == slow(weight.reshape(6, 8, 3, 3))
    assert sparsity.holds(spec, replace(one, weight=by_channel.flatten(1)))
    assert not sparsity.holds(spec, replace(one, weight=by_columns))


@pytest.mark.parametrize(
    "changes", [{"kernel": (6, 3, 3), "shape": (6, 54)}, {"kernel": (8, 3, 3), "shape": (8, 72), "groups": 8}]
)
def test_a_convolution_without_whole_fours_of_channels_does_not_qualify(changes: dict[str, Any]) -> None:
    spec = linear("2:4", kind=LayerKind.CONV, **changes)
    assert not sparsity.could(spec, choice(spec))


def test_the_builders_words_of_old_and_new_versions_are_read() -> None:
    new = "INFO: (Sparsity) Chose 2 layer(s) using sparse tactics: MatMul_1, MatMul_2"
    old = "INFO: (Sparsity) TRT inference plan picked sparse implementation for layers: Conv_0, Conv_1 + Relu_2"
    found = "INFO: (Sparsity) Found 3 layer(s) eligible to use sparse tactics: MatMul_1, MatMul_2, MatMul_3"
    assert sparsity.chosen([found, new]) == sparsity.chosen([old]) == 2
    assert sparsity.chosen([old.partition("layers:")[0] + "layers:"]) == 0
    assert sparsity.chosen([found]) is sparsity.chosen([]) is None
    assert "did not say that it took sparse kernels" in sparsity.told(["a"], [], "TensorRT 11")
    assert "chose sparse kernels for 2" in sparsity.told(["a"], [new], "TensorRT 11")


def exported(model: Model, text: str, folder: Path, data: Path | None = None) -> record.Record:
    calibration = None if data is None else calibrate(model, data, samples=2, length=16)
    target.write(Pipeline.parse(text).run(model, calibration).model, H100, folder)
    return record.read(folder)


def test_the_builder_is_told_of_two_of_four_and_its_answer_is_in_the_report(
    model: Model, machine: Machine, tmp_path: Path
) -> None:
    text = "magnitude(pattern=2:4, targets=[*.q_proj, *.up_proj]), magnitude(targets=[*.down_proj])"
    kept = exported(model, text, tmp_path / "out")
    assert kept.sparse == tuple(f"model.layers.0.{name}" for name in ("self_attn.q_proj", "mlp.up_proj"))
    assert "--sparsity=enable" in (tmp_path / "out" / target.COMMAND).read_text()
    assert "2 layer(s) are 2:4" in kept.notes[-1]
    for version in VERSIONS:
        machine(version)
        made = building.make(kept, flavours.FULL, tmp_path / "out", tmp_path / "out")
        assert made.settings["builder_flags"] == ["SPARSE_WEIGHTS", "TF32"]
        # as the stand-in counts them in the graph, along what is summed up
        assert "chose sparse kernels for 2. What that is worth is in the measured speed alone." in made.built[-1]
        assert "(Sparsity) Chose 2" in (tmp_path / "out" / made.engine).with_name(building.LOG).read_text()


def test_packed_weights_qualify_and_quantized_ones_with_rounded_inputs(
    model: Model, text_file: Path, tmp_path: Path
) -> None:
    pruned = "magnitude(pattern=2:4)"
    packed = exported(model, f"{pruned}, pack_sparse(format=sparse(mask=2:4))", tmp_path / "packed")
    rounding = "rtn(format=int8(channel)), act_quant(format=int8(tensor), static=true)"
    both = exported(model, f"{pruned}, {rounding}", tmp_path / "both", text_file)
    weights = exported(model, f"{pruned}, rtn(format=int4(group=32))", tmp_path / "weights")
    assert len(packed.sparse) == len(both.sparse) == 7 and not weights.sparse


def test_nothing_is_told_where_no_layer_qualifies(model: Model, machine: Machine, tmp_path: Path) -> None:
    kept = exported(model, "magnitude(pattern=4:8)", tmp_path / "out")
    assert not kept.sparse and "--sparsity" not in (tmp_path / "out" / target.COMMAND).read_text()
    machine()
    made = building.make(kept, flavours.FULL, tmp_path / "out", tmp_path / "out")
    assert made.settings["builder_flags"] == ["TF32"] and "2:4" not in " ".join(made.built)


def test_a_chip_without_sparse_tensor_cores_is_not_looked_at(model: Model) -> None:
    pruned = Pipeline.parse("magnitude(pattern=2:4)").run(model).model
    choices = {name: choice(spec, T4) for name, spec in pruned.structure.layers.items()}
    assert sparsity.layers(pruned, choices, T4) == () and len(sparsity.layers(pruned, choices, H100)) == 7
