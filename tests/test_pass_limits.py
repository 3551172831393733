"""What passes refuse before work starts, instead of doing nothing or failing late."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import compress
from compress.describe import describe_pass
from compress.engine.quantizing import Quantizing
from compress.errors import InputError, UnsupportedError, UsageError
from compress.formats.int_grid import IntGrid
from compress.inputs.datasets import Calibration
from compress.inputs.windows import Windows
from compress.layer import LayerKind, LayerSpec
from compress.maths.histogram import Histogram
from compress.models.model import Model
from compress.passes import Gptq, Rtn, find
from compress.pipeline import Pipeline, Result, planned
from compress.plan import make_plan
from compress.profiles import as_profile
from compress.recipe import of_passes
from compress.run import refuse


@pytest.fixture(scope="module")
def model(llama: Path) -> Model:
    return compress.load(llama)


def run(model: Model, passes: str) -> Result:
    ids = torch.randint(0, 256, (8, 12), generator=torch.Generator().manual_seed(0))
    return Pipeline.parse(passes).run(model, Calibration(Windows(ids, tuple(range(8)), "given", "given"), 0, "given"))


@pytest.mark.parametrize("late", ["autoround(steps=1)", "adaquant(steps=1)", "bias_correct(add=true)"])
def test_what_learns_against_the_stages_own_input_must_come_before_tune(model: Model, late: str) -> None:
    with pytest.raises(UsageError, match="must come before tune"):
        Pipeline.parse(f"rtn(format=int4(group=32)), tune(steps=1), {late}").resolve(model)


def test_inputs_are_rounded_before_biases_make_up_for_it(model: Model) -> None:
    with pytest.raises(UsageError, match="act_quant must come before bias_correct"):
        Pipeline.parse("rtn(bits=4), bias_correct(add=true), act_quant").resolve(model)


class Triples(IntGrid):
    """A format that decides three columns together, as a codebook of vectors does."""

    @property
    def step(self) -> int:
        return 3


@pytest.mark.parametrize("item", [Rtn, Gptq])
def test_columns_that_a_format_cannot_take_together_are_refused_before_work_starts(
    model: Model, item: type[Quantizing]
) -> None:
    with pytest.raises(UsageError, match=r"decides 3 input columns together, and model\..* has 64"):
        planned(Pipeline(item(format=Triples())).resolve(model))
    spec = LayerSpec("up", LayerKind.LINEAR, (64, 63), ("up",), segment=0)
    assert item(format=Triples()).plan(spec).format == Triples()


@pytest.mark.parametrize("name", ["autoround", "adaquant"])
def test_learned_rounding_outside_the_blocks_is_refused_before_work_starts(model: Model, name: str) -> None:
    text = f"rtn(format=int4(group=32), targets=[kind:embedding]), {name}(steps=1, targets=[kind:embedding])"
    with pytest.raises(UsageError, match="no layer is left"):
        Pipeline.parse(text).resolve(model)


@pytest.mark.parametrize("text", ["autoround(overrides={*: {steps: 2}})", "tune(overrides={*: {steps: 2}})"])
def test_overrides_that_would_do_nothing_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="overrides would do nothing"):
        Pipeline.parse(f"rtn(bits=4), {text}")


def test_layers_that_share_their_input_share_a_peak_where_only_an_override_asks_for_it(model: Model) -> None:
    result = run(model, "rtn(format=int8(channel), overrides={*.self_attn.*: {format: nvfp4}})")
    names = [f"model.layers.0.self_attn.{part}_proj" for part in "qkv"]
    layers = result.model.layers(0)
    scales = {float(layers[name].weight.tensors["global_scale"]) for name in names}  # type: ignore[union-attr]
    assert len(scales) == 1


@pytest.mark.parametrize("name", ["smoothquant", "awq"])
def test_an_override_keeps_the_scales_of_a_pair_of_layers_out(model: Model, name: str) -> None:
    own = "" if name == "smoothquant" else ", format=int4(group=32)"
    text = f"{name}(folds=all{own}, overrides={{*.down_proj: {{folds: norms}}}})"
    rows = {row.layer: row for row in run(model, text).passes[0].layers}
    row = rows["model.layers.0.mlp.down_proj"]
    told = row.reason if name == "smoothquant" else " ".join(row.notes)
    assert "folds=norms" in (told or "")


def test_a_layer_without_anything_to_tune_is_skipped_and_says_so(model: Model) -> None:
    result = run(model, "rtn(format=mxfp4), tune(steps=1, parts=[scales, norms])")
    rows = [row for row in result.passes[1].layers if "self_attn" in row.layer]
    assert rows and all(not row.changed and "nothing of what is trained" in (row.reason or "") for row in rows)


def test_rotate_refuses_an_image_classifier_before_work_starts(cnn: str) -> None:
    with pytest.raises(UnsupportedError, match="no stream of hidden states"):
        Pipeline.parse("rotate, rtn(bits=4)").resolve(compress.load(cnn))


def test_a_rescaled_layer_that_stays_float_keeps_its_type(make_llama: Callable[..., Path]) -> None:
    model = compress.load(make_llama("half-llama", dtype="bfloat16"))
    result = run(model, "smoothquant(folds=all), rtn(format=int8(group=32), targets=[*.q_proj])")
    weight = result.model.layers(0)["model.layers.0.mlp.up_proj"].weight
    assert isinstance(weight, torch.Tensor) and weight.dtype is torch.bfloat16


def test_counting_values_that_are_not_finite_is_an_error_of_the_input() -> None:
    with pytest.raises(InputError, match="NaN or infinite"):
        Histogram().add(torch.tensor([1.0, float("nan")]))


def test_a_pass_that_needs_data_with_a_switch_says_with_which() -> None:
    assert "no data, with static=true calibration data" in describe_pass(find("act_quant"))
    assert "hessian" in describe_pass(find("gptq"))


def test_a_refused_plan_names_the_targets_that_would_store_it(llama: Path) -> None:
    model, profile = compress.load(llama), as_profile("cpu-x86-avx512-vnni", "checkpoint-gptq")
    plan = make_plan(model, of_passes("rtn(format=nf4)"), profile)
    assert plan.other_targets == ("onnx",)
    with pytest.raises(UsageError, match=r"Target\(s\) that would store it: onnx"):
        refuse(plan)
