"""Passes that prune: what they keep, what it costs, and that what they took away stays zero."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from safetensors.torch import load_file

import compress
from compress import export, hwprofiles
from compress.engine.layer_stats import LayerStats
from compress.engine.layerpass import LayerPass
from compress.engine.prune_pass import Pruning
from compress.errors import InputError, UsageError
from compress.formats import parse_format
from compress.formats.base import QuantTensor
from compress.inputs.datasets import Calibration, calibrate
from compress.layer import Layer, LayerKind, LayerSpec
from compress.maths.hessian import weighted_error
from compress.models.model import Model
from compress.passes import find, table
from compress.passes.gptq import Gptq
from compress.passes.magnitude import Magnitude
from compress.passes.ria import Ria
from compress.passes.rtn import Rtn
from compress.passes.sparsegpt import SparseGpt
from compress.passes.wanda import Wanda
from compress.pipeline import Pipeline, Result
from helpers.formats import SAMPLES
from helpers.gptq_twin import layer, moments

PASSES = (Magnitude, Wanda, Ria, SparseGpt)


def correlated(seed: int, columns: int = 48) -> torch.Tensor:
    """(400, columns): inputs of unlike size that share half as many causes."""
    maker = torch.Generator().manual_seed(seed)
    causes = torch.randn(columns // 2, columns, generator=maker) * torch.randn(columns, generator=maker).exp()
    return torch.randn(400, columns // 2, generator=maker) @ causes + torch.randn(400, columns, generator=maker) / 2


def stats_of(values: torch.Tensor) -> LayerStats:
    return LayerStats(hessian=moments(values), tokens=len(values))


def pruned(item: Pruning, one: Layer, stats: LayerStats) -> Layer:
    """By a pass that treats a layer alone, or a block."""
    if isinstance(item, LayerPass):
        return item.layer(one, stats)
    assert isinstance(item, SparseGpt)
    return item._pruned(one, stats, {})


def share_of_zeros(one: Layer) -> float:
    return float((one.float_weight() == 0).float().mean())


@pytest.mark.parametrize("pattern", ["layer", "row", "2:4", "4:8", "4x4"])
def test_sparsegpt_changes_a_layers_output_least_then_wanda_then_magnitude(pattern: str) -> None:
    total = dict.fromkeys(PASSES, 0.0)
    for seed in range(6):
        stats, one = stats_of(correlated(seed)), layer(32, 48, seed)
        assert stats.hessian is not None
        for kind in PASSES:
            found = pruned(kind(pattern=pattern), one, stats).float_weight()
            total[kind] += weighted_error(found - one.float_weight(), stats.hessian)
    assert total[SparseGpt] < 0.5 * total[Wanda] < 0.5 * total[Magnitude]
    assert total[Wanda] < total[Ria] < total[Magnitude]  # whose score has a lower power of the inputs


@pytest.mark.parametrize("kind", PASSES)
def test_as_many_weights_become_zero_as_was_asked(kind: type[Pruning]) -> None:
    one, stats = layer(32, 48), stats_of(correlated(0))
    for pattern, sparsity in [("layer", 0.3), ("row", 0.75), ("8x4", 0.5)]:
        found = pruned(kind(pattern=pattern, sparsity=sparsity), one, stats)
        assert share_of_zeros(found) == pytest.approx(sparsity, abs=0.02)
        assert f"{100 * share_of_zeros(found):.4g} % of the weights are zero ({pattern})" in found.notes[0]
    for pattern, kept in [("2:4", 2), ("1:4", 1), ("4:8", 4)]:
        runs = pruned(kind(pattern=pattern), one, stats).float_weight().reshape(32, -1, int(pattern[2]))
        assert bool(((runs != 0).sum(-1) == kept).all())


@pytest.mark.parametrize("kind", [Magnitude, Wanda, Ria])
def test_what_is_left_stays_as_it_was(kind: type[Pruning]) -> None:
    one = replace(layer(32, 48), weight=layer(32, 48).float_weight().half())
    found = pruned(kind(), one, stats_of(correlated(0))).weight
    assert isinstance(found, torch.Tensor) and found.dtype == torch.float16
    assert torch.equal(found[found != 0], one.float_weight().half()[found != 0])
    assert not torch.signbit(found[found == 0]).any()


def test_wanda_prunes_an_input_that_is_never_on_first() -> None:
    values = correlated(0)
    values[:, :24] = 0.0
    for kind in (Wanda, SparseGpt):
        assert not pruned(kind(), layer(32, 48), stats_of(values)).float_weight()[:, :24].any()


@pytest.mark.parametrize("kind", [Wanda, Ria, SparseGpt])
def test_a_layer_that_no_token_reached_is_pruned_by_its_weights_and_says_so(kind: type[Pruning]) -> None:
    found = pruned(kind(), layer(32, 48), LayerStats())
    assert share_of_zeros(found) == 0.5 and "no calibration token reached it" in found.notes[1]


def test_damping_that_had_to_grow_is_reported() -> None:
    broken = torch.eye(48)
    broken[0, 1] = broken[1, 0] = 1.2
    found = pruned(SparseGpt(), layer(32, 48), LayerStats(hessian=broken, tokens=20))
    assert "damping raised to 0.4" in found.notes[1] and "only 20 tokens" in found.notes[2]


@pytest.mark.parametrize("kind", [Wanda, Ria, SparseGpt])
def test_statistics_with_nan_stop_the_run(kind: type[Pruning]) -> None:
    with pytest.raises(InputError, match="NaN"):
        pruned(kind(), layer(32, 48), LayerStats(hessian=torch.full((48, 48), float("nan")), tokens=9))


@pytest.mark.parametrize("kind", [Wanda, Ria, SparseGpt])
def test_each_group_of_a_convolution_goes_by_its_own_inputs(kind: type[Pruning]) -> None:
    weight, values = layer(8, 18).float_weight(), correlated(1, 36)
    item = kind(pattern="row")
    both = Layer("conv", LayerKind.CONV, weight, users=("conv",), groups=2)
    found = pruned(item, both, stats_of(values)).float_weight()
    for rows, inputs in ((slice(0, 4), values[:, :18]), (slice(4, 8), values[:, 18:])):
        if kind is Ria:  # whose columns are those of the whole layer
            continue
        alone = Layer("conv", LayerKind.CONV, weight[rows], users=("conv",))
        assert torch.allclose(pruned(item, alone, stats_of(inputs)).float_weight(), found[rows], atol=1e-4)
    assert bool(((found == 0).sum(1) == 9).all())


HOLDING = [text for text in SAMPLES if parse_format(text).holds_zero]


def masked(rows: int = 12, columns: int = 64) -> Layer:
    found = Magnitude().layer(layer(rows, columns), LayerStats())
    return replace(found, mask=found.float_weight() != 0, notes=())


@pytest.mark.parametrize("text", HOLDING)
def test_a_format_that_says_so_holds_zero_exactly_through_rounding_and_gptq(text: str) -> None:
    one, stats = masked(), stats_of(correlated(2, 64))
    assert one.mask is not None
    for item in (Rtn(format=text), Rtn(format=text, clip=True), Gptq(format=text, mismatch=0)):
        found = item.layer(one, stats)
        assert isinstance(found.weight, QuantTensor)
        assert not found.float_weight()[~one.mask].any()
        assert found.float_weight().any()


@pytest.mark.parametrize("text", ["int4(group=32, float_zero)", "table(bits=3, group=16)", "codebook", "trellis"])
def test_formats_without_a_zero_of_their_own_say_so(text: str) -> None:
    assert not parse_format(text).holds_zero


@pytest.mark.parametrize("form", ["int4(group=16)", "int3(group=16, asymmetric)", "nf4(block=64)"])
def test_gptq_of_a_pruned_weight_beats_gptq_that_is_pruned_afterwards_and_rounding(form: str) -> None:
    """The error of a pruned place moves on; it is neither stored there nor dropped."""
    values = correlated(3, 64)
    one, stats = masked(32), stats_of(values)
    assert one.mask is not None and stats.hessian is not None
    cross = moments(values) * 0.1
    item = Gptq(format=form)
    wanted = item.target(one.float_weight(), replace(stats, cross=cross), item.prepare(stats.hessian))
    kept = item.layer(one, replace(stats, cross=cross)).float_weight()
    cut = item.layer(replace(one, mask=None), replace(stats, cross=cross)).float_weight() * one.mask
    rounded = Rtn(format=form).layer(one, stats).float_weight()
    errors = [weighted_error(found - wanted, stats.hessian) for found in (kept, cut, rounded)]
    assert errors[0] < 0.9 * min(errors[1:])


def test_ranges_are_fitted_to_what_is_left() -> None:
    weight = torch.full((1, 32), 0.01)
    weight[0, ::2] = torch.linspace(-0.02, 0.02, 16)
    one = Layer("block.linear", LayerKind.LINEAR, weight, mask=weight.abs() > 0.011)
    found = Gptq(format="int4(group=32)", mismatch=0, refit=0, clip=False).layer(one, LayerStats())
    assert isinstance(found.weight, QuantTensor)
    assert float(found.weight.tensors["scale"]) == pytest.approx(0.04 / 15, rel=1e-3)


def test_gptq_keeps_zeros_by_groups_of_rows_and_of_convolutions_too() -> None:
    one, values = masked(8, 32), correlated(4, 64)
    assert one.mask is not None
    plain = stats_of(values[:, :32])
    assert plain.hessian is not None
    guided = torch.stack([plain.hessian, plain.hessian * 2])
    item = Gptq(format="int4(group=16)", mismatch=0, guided=2)
    assert not item.layer(one, replace(plain, guided=guided)).float_weight()[~one.mask].any()
    conv = replace(one, kind=LayerKind.CONV, groups=2)
    found = Gptq(format="int4(group=16)", mismatch=0).layer(conv, stats_of(values))
    assert not found.float_weight()[~one.mask].any()


@pytest.fixture(scope="module")
def model(make_llama: Callable[..., Path]) -> Model:
    return compress.load(make_llama("pruning", num_hidden_layers=1, intermediate_size=96))


@pytest.fixture(scope="module")
def calibration(model: Model, text_file: Path) -> Calibration:
    return calibrate(model, text_file, samples=8, length=32)


def weights(result: Result) -> dict[str, torch.Tensor]:
    """Of the layers inside the block."""
    structure = result.model.structure
    return {
        name: result.model.layer(spec).float_weight() for name, spec in structure.layers.items() if spec.segment >= 0
    }


@pytest.mark.parametrize("first", ["magnitude(pattern=2:4)", "sparsegpt(sparsity=0.6)"])
def test_whatever_comes_after_keeps_the_zeros(first: str, model: Model, calibration: Calibration) -> None:
    zeros = {name: weight == 0 for name, weight in weights(Pipeline.parse(first).run(model, calibration)).items()}
    for rest in (
        "rtn(format=int4(group=32))",
        "gptq(format=int4(group=32, asymmetric)), bias_correct(add=true)",
        "gptq(format=int4(group=32)), act_quant(static=true), tune(steps=2)",
        "rtn(format=int4(group=32)), block_tune(steps=2)",
    ):
        found = weights(Pipeline.parse(f"{first}, {rest}").run(model, calibration))
        assert all(not found[name][zero].any() for name, zero in zeros.items()), rest
        assert any((weight != 0).any() for weight in found.values())


REFUSED = {
    "rtn(format=int4(float_zero))": "cannot store zero exactly",
    "gptq(format=table(bits=3, group=16))": "cannot store zero exactly",
    "hqq": "would not keep at zero",
    "rtn(format=int4(group=32)), autoround(steps=2)": "would not keep at zero",
    "rtn(format=int4(group=32)), adaquant(steps=2)": "would not keep at zero",
    "rtn(format=int4(group=32)), pv_tuning(steps=2)": "would not keep at zero",
    "vptq": "would not keep at zero",
    "aqlm": "would not keep at zero",
    "trellis(format=trellis(bits=3, block=32))": "would not keep at zero",
    "awq": "must come before magnitude",
    "rotate": "must come before magnitude",
    "wanda": "both set the weight values",
}


@pytest.mark.parametrize("text", REFUSED)
def test_a_pass_that_would_not_keep_the_zeros_is_refused_before_the_work(text: str, model: Model) -> None:
    with pytest.raises(UsageError, match=REFUSED[text]):
        Pipeline.parse(f"magnitude, {text}").resolve(model)


def test_layers_that_were_not_pruned_take_any_format(model: Model) -> None:
    Pipeline.parse("magnitude(targets=[*.k_proj]), hqq(ignore=[*.k_proj]), rtn(targets=[*.k_proj])").resolve(model)


def test_every_pass_was_either_shown_to_keep_zeros_or_says_nothing_of_it() -> None:
    assert {name for name in table() if find(name).keeps_zeros} == {
        *("rtn", "gptq", "bnb4", "llm_int8", "pack_sparse", "act_quant", "bias_correct", "tune", "block_tune"),
        *("heal", "magnitude", "wanda", "ria"),
    }


@pytest.mark.parametrize("text", ["bnb4", "llm_int8"])
def test_the_rounding_of_bitsandbytes_keeps_zeros(text: str) -> None:
    one = masked(8, 64)
    found = find(text)().layer(one, LayerStats())  # type: ignore[attr-defined]
    assert one.mask is not None and not found.float_weight()[~one.mask].any()


class Careless(Rtn):
    """Says that it keeps zeros, and does not."""

    name: ClassVar[str] = "careless"

    def layer(self, layer: Layer, stats: LayerStats) -> Layer:
        return super().layer(layer.with_weight(layer.float_weight() + 0.1), stats)


def test_a_pass_that_gives_a_pruned_weight_a_value_stops_the_run(model: Model) -> None:
    with pytest.raises(InputError, match=r"careless gave .* weights of .* a value that were pruned"):
        Pipeline(Magnitude(), Careless(format="int4(group=32)")).run(model)
    Pipeline(Magnitude(targets=("*.k_proj",)), Careless(format="int4(group=32)", targets=("*.q_proj",))).run(model)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("magnitude(sparsity=0)", "greater than 0"),
        ("magnitude(sparsity=1)", "less than 1"),
        ("wanda(sparsity=1.5)", "less than 1"),
        ("wanda(sparsity=half)", "valid number"),
        ("sparsegpt(pattern=2:4, sparsity=0.7)", "contradict each other"),
        ("ria(pattern=diagonal)", "ria: pattern=diagonal is not a pattern"),
        ("rtn(format=int4(group=32)), magnitude", "magnitude must come before rtn"),
        ("magnitude(pattern=5:7)", "runs of 7 input columns, and there are 64.*ignore="),
        ("sparsegpt(pattern=7x4)", "runs of 7 output rows"),
        ("wanda(sparsity=0.999)", "64 x 64, rounds to all of it"),
        ("magnitude(pattern=32x64, sparsity=0.1)", "rounds to nothing"),
    ],
)
def test_what_cannot_be_is_refused_in_words(text: str, told: str, model: Model) -> None:
    with pytest.raises(UsageError, match=told):
        laid = Pipeline.parse(text).resolve(model)
        for name, passes in laid.passes.items():
            for _, item in passes:
                item.plan(laid.structure.layers[name])


def test_a_share_that_the_pattern_implies_may_be_said() -> None:
    assert Wanda(pattern="1:4", sparsity=0.75).parsed().fixed == 0.75


def test_runs_of_columns_that_are_taps_of_a_kernel_are_refused() -> None:
    spec = LayerSpec("conv", LayerKind.CONV, (8, 36), ("conv",), kernel=(4, 3, 3))
    with pytest.raises(UsageError, match="taps of a 3x3 kernel"):
        Magnitude(pattern="2:4").plan(spec)
    assert Magnitude(pattern="2:4").plan(replace(spec, kernel=(36, 1, 1))).name == "conv"
    with pytest.raises(UsageError, match="each of its groups has 4"):
        SparseGpt(pattern="8x4").plan(replace(spec, kernel=(36, 1, 1), groups=2))


def test_an_override_that_asks_for_the_second_stream_gets_it() -> None:
    assert SparseGpt(mismatch=0).wants < SparseGpt(mismatch=0, overrides={"*": {"mismatch": 0.5}}).wants


def test_an_export_holds_the_pruned_values_as_they_are(model: Model, tmp_path: Path) -> None:
    rounded = "rtn(format=int8(group=32), targets=[*.up_proj])"
    result = Pipeline.parse(f"magnitude(pattern=1:4, targets=[*.mlp.*]), {rounded}").run(model)
    export.find("checkpoint").write(result.model, hwprofiles.load("nvidia-l4"), tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    for name, weight in weights(result).items():
        if "gate_proj" in name or "down_proj" in name:
            assert torch.equal(stored[f"{name}.weight"].float(), weight) and int((weight == 0).sum()) == 4608
