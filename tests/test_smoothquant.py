"""SmoothQuant: the scale's formula, what it does to activations, and that the float model stays what it was."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import compress
from compress.engine.layer_stats import LayerStats, Stat
from compress.engine.stream import BlockStream
from compress.errors import UsageError
from compress.models.model import Model
from compress.models.skeleton import OUTER
from compress.passes.smoothquant import SMALLEST, smoothing
from compress.pipeline import Pipeline, Result
from compress.quality.evaluate import stream_logits
from helpers.models import SIZES, SPECIAL, calibration, tokens

GROUPED = {**SIZES, **SPECIAL}
BERT = {key: value for key, value in GROUPED.items() if key != "num_key_value_heads"}
W8A8 = "rtn(format=int8(channel)), act_quant(format=int8(tensor, asymmetric))"


def with_outliers(folder: Path) -> Path:
    """The same model, some channels of its norms large, as they grow in large models."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        for block in model.model.layers:
            for norm in (block.input_layernorm, block.post_attention_layernorm):
                norm.weight[[3, 17]] *= 40
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(save_random: Callable[..., Path]) -> Model:
    return compress.load(with_outliers(save_random("smooth-llama", transformers.LlamaConfig(**GROUPED))))


@pytest.fixture(scope="module")
def mixture(save_random: Callable[..., Path]) -> Model:
    config = transformers.MixtralConfig(**GROUPED, num_local_experts=4, num_experts_per_tok=2)
    return compress.load(save_random("smooth-mixtral", config))


def smoothed(model: Model, text: str, ids: torch.Tensor | None = None) -> Result:
    return Pipeline.parse(text).run(model, calibration(tokens(8, 16) if ids is None else ids))


def difference(found: Model, expected: Model, ids: torch.Tensor) -> float:
    """Of the outputs, the root of the mean square over that of the expected ones."""
    one, other = (torch.stack(list(stream_logits(item, ids))) for item in (found, expected))
    return float((one - other).norm() / other.norm())


def test_the_scale_equals_its_slow_twin() -> None:
    maker = torch.Generator().manual_seed(0)
    inputs, weights = torch.rand(20, generator=maker) * 9, torch.rand(20, generator=maker)
    for alpha in (0.0, 0.5, 0.8, 1.0):
        expected = [float(x) ** alpha / float(w) ** (1 - alpha) for x, w in zip(inputs, weights, strict=True)]
        assert smoothing(inputs, weights, alpha).tolist() == pytest.approx(expected, rel=1e-5)


def test_dead_channels_keep_their_scale_and_no_scale_is_extreme() -> None:
    inputs, weights = torch.tensor([0.0, 3.0, 1e-30, 1e9]), torch.tensor([2.0, 0.0, 1e9, 1e-30])
    found = smoothing(inputs, weights, 0.5).tolist()
    assert found[:2] == [1.0, 1.0] and found[2:] == pytest.approx([SMALLEST, 1 / SMALLEST])


def norm_inputs(model: Model, ids: torch.Tensor) -> LayerStats:
    """Statistics of what enters the first block's queries."""
    stream = BlockStream(model, [ids])
    stream.start(model.layers(OUTER))
    stream.load(0, model.layers(0), model.plain(0))
    return stream.collect(0, ["model.layers.0.self_attn.q_proj"], {Stat.ABS_MAX})["model.layers.0.self_attn.q_proj"]


def test_what_enters_the_layers_becomes_flat_and_the_model_stays_what_it_was(model: Model) -> None:
    ids = tokens(8, 16)
    result = smoothed(model, "smoothquant(alpha=0.5)", ids)
    assert difference(result.model, model, tokens(4, 16, seed=1)) < 1e-5
    before, after = norm_inputs(model, ids).abs_max, norm_inputs(result.model, ids).abs_max
    assert before is not None and after is not None
    assert float(before.max() / before.median()) > 20
    assert float(after.max() / after.median()) < 8
    # with α = 1 all of the range moves: every channel reaches 1
    whole = norm_inputs(smoothed(model, "smoothquant(alpha=1)", ids).model, ids).abs_max
    torch.testing.assert_close(whole, torch.ones(32))


def test_w8a8_is_closer_to_the_original_with_smoothing(model: Model) -> None:
    ids = tokens(8, 16, seed=1)
    plain, smooth = (smoothed(model, text).model for text in (W8A8, f"smoothquant, {W8A8}"))
    assert difference(smooth, model, ids) < 0.8 * difference(plain, model, ids)


def test_the_default_smooths_what_norms_feed_and_names_why_the_rest_is_left(model: Model) -> None:
    rows = {row.layer: row for row in smoothed(model, "smoothquant").passes[0].layers if ".0." in row.layer}
    changed = {name.rpartition(".")[2] for name, row in rows.items() if row.changed}
    assert changed == {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"}
    assert "no norm of this block feeds it" in rows["model.layers.0.mlp.down_proj"].reason
    every = smoothed(model, "smoothquant(folds=all)").passes[0].layers
    assert sum(row.changed for row in every) == 14


def test_layers_that_the_pass_was_not_asked_to_treat_are_rescaled_along_and_reported_once(model: Model) -> None:
    result = smoothed(model, 'smoothquant(targets=["*.q_proj"])')
    assert difference(result.model, model, tokens(4, 16, seed=1)) < 1e-5
    rows = [row for row in result.passes[0].layers if row.layer.startswith("model.layers.0.")]
    assert len({row.layer for row in rows}) == len(rows) == 7
    changed = {row.layer.rpartition(".")[2]: row for row in rows if row.changed}
    assert changed.keys() == {"q_proj", "k_proj", "v_proj"}
    assert not changed["q_proj"].notes
    assert "model.layers.0.input_layernorm feeds it too" in changed["v_proj"].notes[0]


def test_only_the_chosen_layers_weights_count(model: Model) -> None:
    """Layers that stay float need no range of their own."""
    one = smoothed(model, 'smoothquant(targets=["*.q_proj"], alpha=0)').model
    query = one.layer(one.structure.layers["model.layers.0.self_attn.q_proj"]).float_weight()
    torch.testing.assert_close(query.abs().amax(0), torch.ones(32))


def test_a_router_still_chooses_the_same_experts(mixture: Model) -> None:
    result = smoothed(mixture, "smoothquant(folds=all)", tokens(2, 6))  # few tokens: not every expert is reached
    assert difference(result.model, mixture, tokens(8, 16, seed=1)) < 1e-5
    name = "model.layers.0.mlp.gate.weight"
    before, after = (item.reader.plain([name])[name] for item in (mixture, result.model))
    gain = "model.layers.0.post_attention_layernorm.weight"
    scale = mixture.reader.plain([gain])[gain] / result.model.reader.plain([gain])[gain]
    assert float(scale.max() / scale.min()) > 1.5
    torch.testing.assert_close(after, before * scale)


def test_experts_without_a_token_are_rescaled_with_the_others(mixture: Model) -> None:
    result = smoothed(mixture, "smoothquant(folds=all)", torch.full((1, 6), 7))  # the same two experts all along
    assert difference(result.model, mixture, tokens(8, 16, seed=1)) < 1e-5
    rows = {row.layer.removeprefix("model.layers.0.mlp.experts."): row for row in result.passes[0].layers}
    assert all(rows[f"gate_up_proj.{expert}"].changed for expert in range(4))
    unseen = [expert for expert in range(4) if not rows[f"down_proj.{expert}"].changed]
    assert len(unseen) == 2
    assert all("no calibration token reached it" in rows[f"down_proj.{expert}"].reason for expert in unseen)


def test_a_model_of_post_norms_stays_as_it_is_with_the_reason(save_random: Callable[..., Path]) -> None:
    model = compress.load(save_random("smooth-bert", transformers.BertConfig(**BERT), "AutoModel"))
    result = smoothed(model, "smoothquant")
    rows = {row.layer: row for row in result.passes[0].layers}
    assert not any(row.changed for row in rows.values())
    assert "attention.output.LayerNorm" in rows["encoder.layer.1.intermediate.dense"].reason
    for name, spec in model.structure.layers.items():
        again = result.model.layer(result.model.structure.layers[name])
        assert torch.equal(again.float_weight(), model.layer(spec).float_weight())


def test_where_only_a_layers_rows_change_it_says_so(save_random: Callable[..., Path]) -> None:
    model = compress.load(save_random("smooth-bert-pairs", transformers.BertConfig(**BERT), "AutoModel"))
    result = smoothed(model, "smoothquant(folds=all)")
    rows = {row.layer: row for row in result.passes[0].layers if row.changed and ".0." in row.layer}
    assert set(rows) == {f"encoder.layer.0.attention.{name}" for name in ("self.value", "output.dense")}
    assert "only what it puts out was rescaled" in rows["encoder.layer.0.attention.self.value"].notes[0]
    assert not rows["encoder.layer.0.attention.output.dense"].notes
    assert difference(result.model, model, tokens(4, 16, seed=1)) < 1e-5


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("rtn(format=int8(channel)), smoothquant", "smoothquant must come before rtn, which sets the weight"),
        ("act_quant, smoothquant", "smoothquant must come before act_quant, which sets the input rounding"),
        ("smoothquant(alpha=1.5)", "alpha=1.5"),
        ("smoothquant(folds=some)", "folds='some'"),
    ],
)
def test_what_cannot_be_is_refused(model: Model, text: str, sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        Pipeline.parse(text).resolve(model)


def test_overrides_that_part_one_scale_are_refused(model: Model) -> None:
    overrides: dict[str, Any] = {"*.q_proj": {"alpha": 0.8}}
    pipeline = Pipeline(compress.passes.SmoothQuant(overrides=overrides))
    with pytest.raises(UsageError, match=r"q_proj alpha=0\.8 and .*k_proj alpha=0\.5, but .* feeds both"):
        pipeline.run(model, calibration(tokens(2, 16)))
