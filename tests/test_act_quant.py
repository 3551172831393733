"""Rounded layer inputs: grids fitted at run time or beforehand, what is stored of them, and what is refused."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers

import compress
from compress.engine.layer_stats import LayerStats
from compress.engine.stream import BlockStream
from compress.errors import UsageError
from compress.formats import parse_format
from compress.formats.int_grid import IntGrid
from compress.inputs.datasets import Calibration, calibrate
from compress.layer import ActSpec, Layer, LayerKind
from compress.maths.histogram import Histogram
from compress.models.model import Model
from compress.models.placing import whole_module
from compress.passes import ActQuant
from compress.pipeline import Pipeline
from compress.quality.evaluate import stream_logits


@pytest.fixture(scope="module")
def model(llama: Path) -> Model:
    return compress.load(llama)


@pytest.fixture(scope="module")
def calibration(model: Model, text_file: Path) -> Calibration:
    return calibrate(model, text_file, samples=8, length=64)


def seen(values: torch.Tensor) -> LayerStats:
    histogram = Histogram()
    histogram.add(values)
    return LayerStats(histogram=histogram)


LAYER = Layer("layer", LayerKind.LINEAR, torch.zeros(2, 3), users=("layer",))


def fitted(text: str, values: torch.Tensor) -> ActSpec:
    (item,) = Pipeline.parse(f"act_quant({text})").passes
    assert isinstance(item, ActQuant)
    act = item.layer(LAYER, seen(values)).act
    assert act is not None and act.params is not None
    return act


@pytest.mark.parametrize("form", ["int8(tensor)", "int8(tensor, asymmetric)", "int5(tensor)", "fp8_e4m3(tensor)"])
@pytest.mark.parametrize("observer", ["minmax", "percentile", "mse"])
def test_a_static_grid_holds_what_the_calibration_held_and_clips_the_rest(form: str, observer: str) -> None:
    values = torch.randn(4000, generator=torch.Generator().manual_seed(0)) * 3 + 1
    act = fitted(f"format={form}, static=true, observer={observer}", values)
    step = 0.6 if form.startswith("int5") else 0.5 if form.startswith("fp8") else 0.06
    inside = values[values.abs() < 0.8 * values.abs().max()] if observer != "minmax" else values
    assert float((act.round(inside) - inside).abs().max()) < step
    far = act.round(torch.tensor([1e4, -1e4]))
    assert float(far.abs().max()) < 1.2 * float(values.abs().max())
    assert torch.equal(act.round(act.round(values)), act.round(values))


def test_a_static_integer_grid_has_the_codes_of_quantize_linear() -> None:
    values = torch.tensor([-1.0, 0.0, 0.3, 2.0])
    act = fitted("static=true, observer=minmax", values)
    assert act.params is not None and act.params["zero"].dtype == torch.uint8
    scale, zero = float(act.params["scale"]), int(act.params["zero"])
    assert (scale, zero) == (pytest.approx(3 / 255), 85)
    expected = [(min(max(round(float(v) / scale) + zero, 0), 255) - zero) * scale for v in values]
    assert act.round(values).tolist() == pytest.approx(expected)
    symmetric = fitted("format=int8(tensor), static=true, observer=minmax", values)
    assert symmetric.params is not None and symmetric.params.keys() == {"scale"}
    assert float(symmetric.round(torch.tensor(-50.0))) == pytest.approx(-128 * 2 / 127)


def test_outliers_are_clipped_by_every_observer_but_the_extremes() -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.cat([torch.randn(50_000, generator=generator), torch.tensor([30.0])])
    reach = {}
    for observer in ("minmax", "percentile", "mse", "entropy"):
        act = fitted(f"format=int4(tensor), static=true, observer={observer}", values)
        reach[observer] = float(act.round(torch.tensor(1e4)))
    assert reach["minmax"] == pytest.approx(30.0)
    assert all(limit < 8 for name, limit in reach.items() if name != "minmax")


def test_what_is_clipped_is_noted() -> None:
    item = ActQuant(static=True, observer="percentile", percentile=90.0)
    values = torch.randn(10_000, generator=torch.Generator().manual_seed(0))
    (note,) = item.layer(LAYER, seen(values)).notes
    assert "clipped to -1.6" in note and "% of them" in note
    assert not ActQuant(static=True, observer="minmax").layer(LAYER, seen(values)).notes


def test_static_grids_are_stored_and_used_again(model: Model, calibration: Calibration, tmp_path: Path) -> None:
    text = "rtn(format=int8(channel)), act_quant(static=true)"
    made = Pipeline.parse(text).run(model, calibration, folder=tmp_path / "model")
    again = compress.engine.store.open_store(tmp_path / "model")
    spec = again.structure.layers["model.layers.1.mlp.down_proj"]
    act = again.layer(spec).act
    assert act is not None and act.static and act.params is not None and act.params.keys() == {"scale", "zero"}
    assert spec.act == ActSpec(parse_format("int8(tensor, asymmetric)"), static=True)
    ids = calibration.windows.ids[:2]
    for first, second in zip(stream_logits(made.model, ids), stream_logits(again, ids), strict=True):
        assert torch.equal(first, second)
    dynamic = Pipeline.parse("rtn(format=int8(channel)), act_quant").run(model).model
    for first, second in zip(stream_logits(again, ids), stream_logits(dynamic, ids), strict=True):
        assert 0 < float((first - second).abs().max()) < 0.2 * float(second.abs().max())


def test_ranges_are_those_of_the_inputs_as_the_passes_before_left_them(model: Model, calibration: Calibration) -> None:
    made = Pipeline.parse("rtn(format=int2(channel)), act_quant(static=true, observer=minmax)").run(model, calibration)
    stream = BlockStream(made.model, calibration.batches())
    stream.start(made.model.layers(-1))
    stream.load(0, made.model.layers(0), made.model.plain(0))
    inputs: list[torch.Tensor] = []
    child = stream.module.get_submodule("model.layers.0.self_attn.q_proj")
    child.register_forward_pre_hook(lambda _m, values: inputs.append(values[0]), prepend=True)
    stream.advance(0)
    act = made.model.layer(made.model.structure.layers["model.layers.0.self_attn.q_proj"]).act
    assert act is not None and act.params is not None
    whole = torch.cat([values.flatten() for values in inputs])
    assert float(act.params["scale"]) == pytest.approx(float(whole.max() - whole.min()) / 255, rel=1e-5)


def test_some_layers_may_be_static_and_others_not(model: Model, calibration: Calibration) -> None:
    for text, static in (
        ('act_quant(overrides={"*.down_proj": {static: true}})', True),
        ('act_quant(static=true, observer=entropy, overrides={"*.down_proj": {static: false}})', False),
    ):
        made = Pipeline.parse(f"rtn(format=int8(channel)), {text}").run(model, calibration).model
        for name, spec in made.structure.layers.items():
            if spec.act is not None:
                assert spec.act.static is (static == name.endswith("down_proj")), name


def test_a_convolution_has_a_grid_for_its_outputs_too(cnn: str, images_file: Path) -> None:
    model = compress.load(cnn)
    data = calibrate(model, images_file, samples=64)
    made = Pipeline.parse("rtn(format=int8(channel)), act_quant(static=true, observer=minmax)").run(model, data).model
    for spec in made.structure.layers.values():
        act = made.layer(spec).act
        assert act is not None and act.params is not None
        grids = {"scale", "zero", "output_scale", "output_zero"} if spec.kind is LayerKind.CONV else {"scale", "zero"}
        assert act.params.keys() == grids


@pytest.mark.parametrize(
    "after",
    ["", ", bias_correct", ", adaquant(steps=4, lr_scale=0.5, lr_bias=0.5)", ", tune(steps=2, lr=0.05)"],
    ids=["alone", "bias_correct", "adaquant", "tune"],
)
def test_output_grids_are_those_of_what_the_finished_model_puts_out(cnn: str, images_file: Path, after: str) -> None:
    model = compress.load(cnn)
    data = calibrate(model, images_file, samples=64)
    start = "rtn(format=int3(channel)), act_quant(static=true, observer=minmax, format=int4(tensor, asymmetric))"
    made = Pipeline.parse(start + after).run(model, data).model
    module = whole_module(made)
    seen: dict[str, list[torch.Tensor]] = {}
    for name, spec in made.structure.layers.items():
        if spec.kind is LayerKind.CONV:
            kept = seen.setdefault(name, [])
            module.get_submodule(name).register_forward_hook(lambda _m, _i, output, kept=kept: kept.append(output))
    with torch.no_grad():
        for batch in data.batches():
            module(batch)
    for name, kept in seen.items():
        act, whole = made.layer(made.structure.layers[name]).act, torch.cat(kept)
        assert act is not None and act.params is not None
        wanted = IntGrid(4, "tensor", "asymmetric").fit_activation(whole.min(), whole.max())
        assert float(act.params["output_scale"]) == pytest.approx(float(wanted["scale"]), rel=1e-4), name
        assert torch.equal(act.params["output_zero"], wanted["zero"]), name


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("act_quant(observer=minmax)", "observer does nothing without static=true"),
        ("act_quant(static=true, percentile=99)", "percentile does nothing without observer=percentile"),
        ("act_quant(static=true, format=int8(token))", r"int8\(token\) has no static grid"),
        ("act_quant(static=true, format=fp8_e4m3(tensor), observer=entropy)", "Allowed: minmax, percentile, mse"),
        ("act_quant(static=true, observer=median)", "minmax"),
        ("act_quant(format=int8(channel))", "cannot round activations"),
        ("act_quant(format=int8(tensor, signed))", "cannot round activations"),
    ],
)
def test_settings_that_do_nothing_or_do_not_fit_are_refused(text: str, told: str) -> None:
    with pytest.raises(UsageError, match=told):
        Pipeline.parse(text)


def test_a_static_grid_needs_data(model: Model) -> None:
    with pytest.raises(UsageError, match="needs calibration data"):
        Pipeline.parse("rtn(format=int8(channel)), act_quant(static=true)").run(model)
    with pytest.raises(UsageError, match="no calibration data reached layer"):
        ActQuant(static=True).layer(LAYER, LayerStats())


def test_experts_are_left_alone_with_a_reason(save_random: Callable[..., Path]) -> None:
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 2}
    model = compress.load(save_random("mixture", transformers.MixtralConfig(**sizes, **heads)))
    skipped = Pipeline.parse("act_quant").resolve(model).skipped[0]
    assert "does not treat expert layers" in skipped["model.layers.0.mlp.experts.down_proj.0"]
