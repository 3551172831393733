"""HQQ against a slow twin and against rounding; grids with float zero points, in memory and in ONNX."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import compress
from compress import export, hwprofiles
from compress.engine.layer_stats import LayerStats
from compress.errors import UsageError
from compress.export.onnx import target
from compress.export.onnx.lowering import Choice, choose
from compress.export.onnx.runtime import Session
from compress.formats import parse_format
from compress.layer import ActSpec, Layer, LayerKind, LayerSpec
from compress.models.model import Model
from compress.passes.hqq import Hqq, shrink
from compress.passes.rtn import Rtn
from compress.pipeline import Pipeline
from compress.quality.verification import agreement
from compress.target import Refusal
from helpers.stored import stored_bytes

PROFILE = hwprofiles.load("cpu-x86-avx512-vnni")
RUNTIME = PROFILE.runtime("onnxruntime")


def gaussian(rows: int = 64, columns: int = 200) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))


def heavy_tailed(rows: int = 64, columns: int = 200) -> torch.Tensor:
    """Student's t with 3 degrees of freedom."""
    maker = torch.Generator().manual_seed(0)
    normal, chi = torch.randn(4, rows, columns, generator=maker).split([1, 3])
    return (normal[0] / (chi.square().sum(0) / 3).sqrt()).float()


def layer(weight: torch.Tensor) -> Layer:
    return Layer("block.linear", LayerKind.LINEAR, weight, users=("block.linear",))


def slow_hqq(row: np.ndarray, scale: float, zero: float, top: int) -> list[float]:
    """Zero points of one group after each iteration, entry by entry, with the defaults of the pass."""
    found, beta = [], 10.0
    for _ in range(20):
        moved = []
        for value in row:
            code = min(max(round(value / scale + zero), 0), top)
            error = value / scale - (code - zero)
            left = max(0.0, abs(error) - abs(error) ** (0.7 - 1) / beta) if error else 0.0
            moved.append(code - (value / scale - float(np.sign(error)) * left))
        zero = float(np.float16(np.mean(moved)))
        found.append(zero)
        beta *= 1.01
    return found


def test_the_zero_points_are_those_of_a_twin_that_takes_entry_by_entry() -> None:
    weight = gaussian(6, 40)
    form = parse_format("int3(group=16, float_zero)")
    solved = Hqq(format=form).layer(layer(weight), LayerStats()).weight
    _, scale, zero = form.unpack(solved.tensors, (6, 40))
    start = form.fit(weight)["zero"]
    for row in range(6):
        for group, stop in enumerate((16, 32, 40)):  # the last group is short
            part = weight[row, 16 * group : stop].double().numpy()
            first = float(start[row, group])
            tried = [float(round(first)), first, *slow_hqq(part, float(scale[row, group]), first, 7)]
            unit = part / float(scale[row, group])
            errors = [np.sum(np.abs(unit - np.clip(np.round(unit + z), 0, 7) + z) ** 0.7) for z in tried]
            chosen = float(zero[row, group])
            own = np.sum(np.abs(unit - np.clip(np.round(unit + chosen), 0, 7) + chosen) ** 0.7)
            assert own == pytest.approx(min(errors), rel=2e-3)


def test_the_soft_threshold_shrinks_towards_zero_and_takes_small_errors_away() -> None:
    error = torch.tensor([-2.0, -0.01, 0.0, 0.01, 0.5])
    found = shrink(error, 10.0, 0.7)
    assert found[1:4].tolist() == [0.0, 0.0, 0.0]
    assert float(found[0]) == pytest.approx(-(2 - 2**-0.3 / 10)) and 0 < float(found[4]) < 0.5
    assert torch.allclose(shrink(error, 10.0, 1.0), torch.tensor([-1.9, 0.0, 0.0, 0.0, 0.4]))


@pytest.mark.parametrize("weight", [gaussian(), heavy_tailed()], ids=["gaussian", "heavy_tailed"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_hqq_is_below_rounding_to_the_asymmetric_grid_in_the_norm_it_is_after(weight: torch.Tensor, bits: int) -> None:
    rounded = Rtn(format=f"int{bits}(group=64, asymmetric)").layer(layer(weight), LayerStats()).float_weight()
    solved = Hqq(format=f"int{bits}(group=64, float_zero)").layer(layer(weight), LayerStats()).float_weight()
    before, after = ((each - weight).abs().pow(0.7).sum() for each in (rounded, solved))
    assert after < 0.98 * before
    assert (solved - weight).square().sum() < 0.98 * (rounded - weight).square().sum()


def test_no_group_gets_worse_than_rounding() -> None:
    weight = heavy_tailed(40, 128)
    rounded = Rtn(format="int2(group=16, asymmetric)").layer(layer(weight), LayerStats()).float_weight()
    solved = Hqq(format="int2(group=16, float_zero)").layer(layer(weight), LayerStats()).float_weight()
    errors = [(each - weight).abs().pow(0.7).reshape(40, 8, 16).sum(-1) for each in (rounded, solved)]
    assert bool((errors[1] <= errors[0] * (1 + 1e-4)).all())


def test_a_zero_point_that_is_rounded_again_gains_nothing() -> None:
    """Why the pass asks for float_zero: a whole step moves the grid onto itself."""
    weight, form = gaussian(), parse_format("int4(group=64, asymmetric)")
    params = form.fit(weight)
    rounded = (form.quantize(weight, params, torch.arange(200))[1] - weight).square().sum()
    solved = Hqq(format="int4(group=64, float_zero)").layer(layer(weight), LayerStats()).weight
    zero = solved.format.unpack(solved.tensors, (64, 200))[2].float().round().clamp(0, 15)
    again = (form.quantize(weight, params | {"zero": zero}, torch.arange(200))[1] - weight).square().sum()
    assert again > 0.999 * rounded


@pytest.mark.parametrize("granularity", ["group=16", "group=60", "channel", "tensor"])
def test_every_granularity_of_a_float_zero_is_stored_as_chosen(granularity: str) -> None:
    form, weight = parse_format(f"int3({granularity}, float_zero)"), gaussian(6, 100)
    packed = Hqq(format=form).layer(layer(weight), LayerStats()).weight
    assert {name: (tuple(t.shape), t.dtype) for name, t in packed.tensors.items()} == form.tensor_specs((6, 100))
    params = form.fit(weight, search=True)
    codes, values = form.quantize(weight, params, torch.arange(100))
    assert torch.equal(form.pack(codes, params, (6, 100)).dequantize(), values)
    rounded = parse_format(f"int3({granularity}, asymmetric)").stored_bytes((6, 100))
    assert form.stored_bytes((6, 100)) > rounded


@pytest.mark.parametrize("form", ["int4(group=64)", "int4(group=64, asymmetric)", "nf4(block=64)", "fp8_e4m3(channel)"])
def test_a_format_without_a_float_zero_is_refused_with_one_that_has_it(form: str) -> None:
    with pytest.raises(UsageError, match="float_zero"):
        Hqq(format=form)


def test_bits_and_group_size_are_shorthand_here_too() -> None:
    assert str(Hqq(bits=3, group_size=32).resolved_format()) == "int3(group=32, float_zero)"


def test_a_float_zero_does_not_round_activations() -> None:
    with pytest.raises(UsageError, match="float_zero"):
        parse_format("int8(tensor, float_zero)").round_activation(torch.ones(2, 3))


@pytest.fixture(scope="module")
def model(make_llama: Callable[..., Path]) -> Model:
    return compress.load(make_llama("hqq", num_hidden_layers=2, attention_bias=True, intermediate_size=96))


@pytest.fixture(scope="module")
def graph(model: Model) -> bytes:
    return target.capture(model, PROFILE)


@pytest.mark.parametrize(
    "form", ["int4(group=32, float_zero)", "int3(channel, float_zero)", "int2(group=32, float_zero)"]
)
def test_the_graph_adds_float_zeros_beside_the_fast_kernel(
    model: Model, graph: bytes, tmp_path: Path, form: str
) -> None:
    made = Pipeline.parse(f"hqq(format={form})").run(model).model
    lowered = target.write(made, PROFILE, tmp_path, graph)
    assert lowered.operators == {"Gather": 1, "MatMulNBits": 14}
    stored = stored_bytes(tmp_path / "model.onnx")
    for name, spec in made.structure.layers.items():
        choice = choose(spec, RUNTIME)
        assert isinstance(choice, Choice) and stored[name] == choice.stored_bytes
    windows = torch.randint(0, 256, (8, 64), generator=torch.Generator().manual_seed(1))
    found = agreement(Session(tmp_path, 1), made, windows, lowered.bounds, Session(tmp_path, 1, exact=True))
    assert found.agrees and found.exact_relative_difference is not None and found.exact_relative_difference < 1e-4


def spec(form: str, kind: LayerKind, columns: int = 64, act: str | None = None) -> LayerSpec:
    inputs = ActSpec(parse_format(act)) if act else None
    return LayerSpec("layer", kind, (32, columns), ("layer",), format=parse_format(form), act=inputs)


@pytest.mark.parametrize(
    ("one", "told"),
    [
        (spec("int4(group=32, float_zero)", LayerKind.EMBEDDING), "an embedding"),
        (spec("int4(group=32, float_zero)", LayerKind.LINEAR, 80), "80 columns"),
        (
            spec("int8(channel, float_zero)", LayerKind.LINEAR, 64, "int8(tensor, asymmetric)"),
            "not this group or scheme",
        ),
        (spec("int4(channel, float_zero)", LayerKind.CONV), "float zero points are not stored"),
    ],
)
def test_where_float_zeros_are_not_stored_they_are_refused(one: LayerSpec, told: str) -> None:
    answer = choose(one, RUNTIME)
    assert isinstance(answer, Refusal) and told in answer.reason


@pytest.mark.parametrize("name", sorted(set(export.TARGETS) - {"onnx", "openvino"}))
def test_targets_without_float_zeros_do_not_take_one_for_a_whole_one(name: str) -> None:
    answer = export.find(name).plan_layer(spec("int4(group=32, float_zero)", LayerKind.LINEAR), PROFILE)
    assert isinstance(answer, Refusal)
