"""AWQ: its formulas against slow twins, its error measure against running the layers, and rounding against it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers

import compress
from compress.engine.blockpass import Block
from compress.engine.layer_stats import Stat
from compress.engine.stream import BlockStream
from compress.errors import UsageError
from compress.formats import parse_format
from compress.models.model import Model
from compress.models.skeleton import OUTER
from compress.passes.awq import AwqScale, _loss, balance, importances, relative
from compress.pipeline import Pipeline, Result
from compress.quality.evaluate import stream_logits
from compress.wiring.foldable import wire
from compress.wiring.folding import Bench
from helpers.models import SIZES, SPECIAL, calibration, tokens

GROUPED = {**SIZES, **SPECIAL}
GRID = "int3(group=16)"


@pytest.fixture(scope="module")
def model(save_random: Callable[..., Path]) -> Model:
    """A small Llama in which a few channels carry most of what enters the layers."""
    folder = save_random("salient-llama", transformers.LlamaConfig(**GROUPED))
    made = transformers.AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        for block in made.model.layers:
            for norm in (block.input_layernorm, block.post_attention_layernorm):
                norm.weight[[3, 9, 17]] *= 12
    made.save_pretrained(folder)
    return compress.load(folder)


def run(model: Model, text: str, ids: torch.Tensor | None = None) -> Result:
    return Pipeline.parse(text).run(model, calibration(tokens(8, 32) if ids is None else ids))


def difference(found: Model, expected: Model) -> float:
    """Of the outputs on other text, the root of the mean square over that of the expected ones."""
    ids = tokens(6, 32, seed=1)
    one, other = (torch.stack(list(stream_logits(item, ids))) for item in (found, expected))
    return float((one - other).norm() / other.norm())


def first_block(model: Model, item: AwqScale) -> tuple[Block, BlockStream]:
    stream = BlockStream(model, [tokens(4, 32)])
    stream.start(model.layers(OUTER))
    layers, plain = model.layers(0), model.plain(0)
    stream.load(0, layers, plain)
    stats = stream.collect(0, list(layers), {Stat.HESSIAN, Stat.ABS_MEAN})
    block = Block(
        name=model.structure.blocks[0],
        layers=layers,
        source=layers,
        chosen=dict.fromkeys(layers, item),
        plain=plain,
        stats=stats,
        runner=stream.runner(0),
    )
    return block, stream


@pytest.mark.parametrize("duo", [True, False])
@pytest.mark.parametrize("alpha", [0.0, 0.35, 0.95])
def test_the_scale_equals_its_slow_twin(duo: bool, alpha: float) -> None:
    maker = torch.Generator().manual_seed(0)
    inputs, weights = torch.rand(12, generator=maker) * 5, torch.rand(12, generator=maker)
    raw = [
        max(1e-4, float(x) ** alpha / ((float(w) ** (1 - alpha) + 1e-4) if duo else 1.0))
        for x, w in zip(inputs, weights, strict=True)
    ]
    middle = (max(raw) * min(raw)) ** 0.5
    assert balance(inputs, weights, alpha, duo).tolist() == pytest.approx([one / middle for one in raw], rel=1e-5)


def test_a_channel_that_is_never_on_keeps_its_scale() -> None:
    found = balance(torch.tensor([0.0, 1.0, 4.0]), torch.ones(3), 0.5)
    assert found[0] == 1.0 and found[1:].tolist() == pytest.approx([0.5**0.5, 2**0.5])
    assert balance(torch.zeros(2), torch.ones(2), 0.5).tolist() == [1.0, 1.0]


def test_weights_are_taken_as_shares_of_their_group() -> None:
    weight = torch.randn(3, 10, generator=torch.Generator().manual_seed(1))
    found = relative(weight, parse_format("int4(group=4)"))
    for row in range(3):
        for column in range(10):
            group = weight[row, column // 4 * 4 : column // 4 * 4 + 4].abs()  # the last one is short
            assert float(found[row, column]) == pytest.approx(float(weight[row, column].abs() / group.max()), rel=1e-4)
    whole = weight.abs() / weight.abs().amax(1, keepdim=True)
    torch.testing.assert_close(relative(weight, parse_format("int4(channel)")), whole, rtol=1e-4, atol=0)


def test_the_error_is_that_of_running_the_layers_on_every_token(model: Model) -> None:
    block, stream = first_block(model, AwqScale(format=parse_format(GRID)))
    names = [f"{block.name}.self_attn.{key}" for key in ("q_proj", "k_proj", "v_proj")]
    seen: list[torch.Tensor] = []
    child = stream.module.get_submodule(names[0])
    handle = child.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].reshape(-1, 32)))
    stream.runner(0).forward(0)
    handle.remove()
    columns = torch.rand(32, generator=torch.Generator().manual_seed(2)) + 0.5
    expected = 0.0
    for name in names:
        weight, form = block.layers[name].float_weight(), parse_format(GRID)
        _, rounded = form.quantize(weight * columns, form.fit(weight * columns), torch.arange(32))
        exact, found = seen[0] @ weight.T, (seen[0] / columns) @ rounded.T
        expected += float((found - exact).double().square().sum())
    assert _loss(Bench(block), names, columns) == pytest.approx(expected, rel=1e-3)


def test_the_scale_chosen_by_the_layers_error_serves_the_module_around_them(model: Model) -> None:
    """The paper's code measures the output of the parent (here the MLP): what we choose is near its own best there."""
    item = AwqScale(format=parse_format(GRID))
    block, stream = first_block(model, item)
    folding = next(one for one in wire(block, pairs=False).foldings if "post_attention" in one.producer)
    names, bench, runner = list(folding.consumers), Bench(block), stream.runner(0)
    inputs, weights = importances(bench, folding, names)
    exact = runner.forward(0)

    def error(scale: torch.Tensor) -> float:
        tried = Bench(block)
        tried.fold(folding, scale)
        form, layers = parse_format(GRID), {}
        for name in names:
            weight = tried.layer(name).float_weight()
            layers[name] = tried.layer(name).with_weight(form.quantize(weight, form.fit(weight), torch.arange(32))[1])
        stream.load(0, {**block.layers, **layers}, {**block.plain, **tried.changed_plain})
        found = float((runner.forward(0) - exact).square().sum())
        stream.load(0, block.layers, block.plain)
        return found

    chosen = item._search(bench, folding, names)
    assert chosen is not None
    best = min(error(balance(inputs, weights, step / 20)) for step in range(20))
    assert error(chosen) < 1.25 * best
    assert error(chosen) < 0.7 * error(torch.ones(32))


def output_errors(result: Result, place: int = -1) -> dict[str, float]:
    return {row.layer: row.output_error for row in result.passes[place].layers if row.output_error is not None}


@pytest.mark.parametrize("text", [GRID, "int4(group=16, asymmetric)", "int4(channel)"])
def test_awq_beats_rounding_where_channels_are_salient(model: Model, text: str) -> None:
    rounded, scaled = run(model, f"rtn(format={text}, clip=true)"), run(model, f"awq(format={text})")
    assert difference(scaled.model, model) < 0.9 * difference(rounded.model, model)
    for name, spec in scaled.model.structure.layers.items():
        assert (spec.format is not None) == (spec.segment != OUTER), name


def test_scaling_alone_leaves_the_model_what_it_was_and_rounds_to_the_same_codes(model: Model) -> None:
    scaled = run(model, f"awq_scale(format={GRID})")
    assert difference(scaled.model, model) < 1e-5
    assert all(spec.format is None for spec in scaled.model.structure.layers.values())
    assert {row.error_after for row in scaled.passes[0].layers if row.changed} == {0.0}
    first = model.structure.segment_layers(0)  # the second block's inputs are those of the rounded first in `awq` alone
    apart, at_once = (
        run(model, f"awq_scale(format={GRID}), rtn(format={GRID})"),
        run(model, f"awq(format={GRID}, clip=false)"),
    )
    for spec in first:
        one, other = (item.model.layer(item.model.structure.layers[spec.name]) for item in (apart, at_once))
        assert torch.equal(one.float_weight(), other.float_weight()), spec.name


def test_gptq_after_the_scaling_is_better_than_either_rounding(model: Model) -> None:
    solved = run(model, f"awq_scale(format={GRID}), gptq(format={GRID})")
    assert difference(solved.model, model) < difference(run(model, f"rtn(format={GRID}, clip=true)").model, model)
    # on the same inputs, so that the errors of the layers before do not count
    errors = output_errors(run(model, f"awq_scale(format={GRID}), gptq(format={GRID}, mismatch=0)"))
    assert len(errors) == 14 and max(errors.values()) < 0.02


def test_errors_are_taken_against_the_rescaled_weights_and_inputs(model: Model) -> None:
    rows = [row for row in run(model, f"awq(format={GRID})").passes[0].layers if row.changed]
    assert len(rows) == 14
    for row in rows:
        assert row.error_before == 0.0 and row.error_after is not None and row.error_after < 0.1
        assert row.output_error is not None and row.output_error < 0.1
    later = run(model, "awq(format=int8(channel)), act_quant").passes[1].layers
    assert all(row.error_after is not None and row.error_after < 1e-3 for row in later if row.changed)


def test_weighting_the_range_search_by_the_inputs_helps(model: Model) -> None:
    with_clip, without = (output_errors(run(model, f"awq(format={GRID}, clip={flag})")) for flag in ("true", "false"))
    assert sum(with_clip.values()) < sum(without.values())


def test_a_layer_without_a_scale_is_rounded_with_the_reason(save_random: Callable[..., Path]) -> None:
    settings = {key: value for key, value in SIZES.items() if key != "num_key_value_heads"}
    model = compress.load(save_random("awq-bert", transformers.BertConfig(**settings), "AutoModel"))
    rows = {row.layer: row for row in run(model, f"awq(format={GRID})").passes[0].layers if row.changed}
    note = rows["encoder.layer.0.intermediate.dense"].notes[0]
    assert note.startswith("rounded without a scale of its own: what encoder.layer.0.attention.output.LayerNorm")
    assert rows["encoder.layer.0.intermediate.dense"].format == GRID


def test_experts_that_no_token_reached_are_rounded_and_named(save_random: Callable[..., Path]) -> None:
    config = transformers.MixtralConfig(**GROUPED, num_local_experts=4, num_experts_per_tok=2)
    model = compress.load(save_random("awq-mixtral", config))
    result = run(model, f"awq(format={GRID})", torch.full((1, 6), 7))  # the same two experts all along
    notes = {row.layer: " ".join(row.notes) for row in result.passes[0].layers if row.changed}
    unseen = [name for name, note in notes.items() if "no calibration token reached it" in note]
    assert len(unseen) == 4 and all("down_proj" in name for name in unseen)  # two of each block
    assert all(result.model.structure.layers[name].format is not None for name in notes if "experts" in name)


def test_formats_may_differ_among_layers_that_share_a_scale(model: Model) -> None:
    pipeline = Pipeline(
        compress.passes.Awq(format=parse_format(GRID), overrides={"*.v_proj": {"format": "int8(channel)"}})
    )
    result = pipeline.run(model, calibration(tokens(4, 32)))
    layers = result.model.structure.layers
    assert str(layers["model.layers.0.self_attn.v_proj"].format) == "int8(channel)"
    assert str(layers["model.layers.0.self_attn.q_proj"].format) == GRID


def test_layers_fed_one_tensor_share_the_scale_that_their_format_shares(model: Model) -> None:
    result = run(model, "awq(format=nvfp4)")
    for names in (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj")):
        found = set()
        for name in names:
            weight = result.model.layer(result.model.structure.layers[f"model.layers.0.{name}"]).weight
            assert not isinstance(weight, torch.Tensor)
            found.add(float(weight.tensors["global_scale"]))
        assert len(found) == 1


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("rtn(format=int4(group=16)), awq_scale", "awq_scale must come before rtn"),
        ("awq, rtn(format=int4(group=16))", "rtn and awq both set the weight"),
        ("act_quant, awq", "awq must come before act_quant"),
        ("awq(grid=0)", "grid=0"),
    ],
)
def test_what_cannot_be_is_refused(model: Model, text: str, sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        Pipeline.parse(text).resolve(model)
