"""Learned scorers of tokens: a head looks at a token as it is written, and what it says is what the cache drops by."""

import copy
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache

import compress
from compress.engine import kv_heads, store
from compress.errors import InputError, UsageError
from compress.inputs.datasets import Calibration, calibrate
from compress.kv import heads, importance, scorers
from compress.kv.cache import KvCache
from compress.kv.layer import KvLayer
from compress.kv.observed import Attended
from compress.kv.spec import KvSpec
from compress.models.model import Model
from compress.pipeline import Pipeline
from compress.training import retaining

LENGTH, KV, HIDDEN, PROJECTED = 48, 2, 64, 128
KINDS: dict[str, dict[str, Any]] = {
    "locret": {"scorer": "locret", "head_width": 24},
    "kvzap, linear": {"scorer": "kvzap"},
    "kvzap": {"scorer": "kvzap", "head_width": 24},
}


def head_of(spec: KvSpec, layer: int) -> dict[str, Tensor]:
    """One with random weights, of what the spec wants."""
    generator = torch.Generator().manual_seed(layer)
    inputs = PROJECTED if spec.scorer == "locret" else HIDDEN
    shapes: dict[str, tuple[int, ...]] = {
        "head.first": (spec.head_width, inputs),
        "head.first_bias": (spec.head_width,),
        "head.second": (KV, spec.head_width or inputs),
        "head.second_bias": (KV,),
    }
    return {name: 0.3 * torch.randn(shapes[name], generator=generator) for name in spec.wants}


@pytest.fixture(scope="module")
def model(llama: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32, attn_implementation="eager").eval()


@pytest.fixture(scope="module")
def ids() -> Tensor:
    """No token twice in a row: in the first layer it would have the same score again, but for rounding."""
    generator = torch.Generator().manual_seed(0)
    return torch.stack([torch.randperm(255, generator=generator)[:LENGTH] + 1 for _ in range(4)])


@torch.no_grad()
def through(model: Any, cache: Any, ids: Tensor, chunk: int = 1, mask: Tensor | None = None) -> Tensor:
    """Logits of all tokens, so many at a time."""
    found = []
    for at in range(0, ids.shape[1], chunk):
        more: dict[str, Any] = {}
        if mask is not None:
            seen = mask[:, : at + chunk]
            more = {"attention_mask": seen, "position_ids": (seen.cumsum(1) - 1).clamp(min=0)[:, at:]}
        found.append(model(ids[:, at : at + chunk], past_key_values=cache, use_cache=True, **more).logits)
    return torch.cat(found, 1)


def cache_of(model: Any, **settings: Any) -> KvCache:
    spec = KvSpec(**settings)
    layers = range(model.config.num_hidden_layers)
    return KvCache.attach(model, [spec] * len(layers), [head_of(spec, layer) for layer in layers])


def held(layer: KvLayer) -> list[list[int]]:
    """The positions in the slots of each head of each row."""
    kept: list[list[int]] = layer.position.sort(-1).values.flatten(0, 1).tolist()
    return kept


@pytest.mark.parametrize("kind", KINDS)
def test_a_head_is_two_layers_or_one(kind: str) -> None:
    """A slow twin, number by number."""
    spec = KvSpec(budget=64, **KINDS[kind])
    tensors = {name: tensor.double() for name, tensor in head_of(spec, 0).items()}
    features = torch.randn(2, 3, PROJECTED if kind == "locret" else HIDDEN, generator=torch.Generator().manual_seed(9))
    found = heads.scores_of(features, head_of(spec, 0))
    assert found.shape == (2, KV, 3) and found.dtype == torch.float32
    for row in range(2):
        for token in range(3):
            inner = features[row, token].tolist()
            if spec.head_width:
                biases = tensors.get("head.first_bias", torch.zeros(spec.head_width)).tolist()
                summed = [
                    sum(a * b for a, b in zip(line, inner, strict=True)) + bias
                    for line, bias in zip(tensors["head.first"].tolist(), biases, strict=True)
                ]
                inner = [each / (1 + math.exp(-each)) for each in summed]
            for head in range(KV):
                bias = float(tensors["head.second_bias"][head]) if spec.scorer == "kvzap" else 0.0
                line = tensors["head.second"][head].tolist()
                expected = sum(a * b for a, b in zip(line, inner, strict=True)) + bias
                assert math.isclose(float(found[row, head, token]), expected, rel_tol=1e-4, abs_tol=1e-4)


@pytest.mark.parametrize("chunk", [7, LENGTH])
@pytest.mark.parametrize("kind", KINDS)
def test_with_room_for_everything_logits_are_those_of_no_compression(
    model: Any, ids: Tensor, kind: str, chunk: int
) -> None:
    model.set_attn_implementation("eager")
    expected = through(model, DynamicCache(), ids, chunk)
    assert torch.equal(through(model, cache_of(model, budget=LENGTH, recent=4, **KINDS[kind]), ids, chunk), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_what_the_head_makes_of_what_the_attention_computed(model: Any, ids: Tensor, kind: str) -> None:
    """A twin of the first layer by hand: its features do not depend on what was dropped."""
    settings: dict[str, Any] = {"budget": 16, "sinks": 2, "recent": 4, **KINDS[kind]}
    cache = cache_of(model, **settings)
    through(model, cache, ids)
    block = model.model.layers[0]
    with torch.no_grad():
        hidden = block.input_layernorm(model.model.embed_tokens(ids))
        attend = block.self_attn
        sides = torch.cat([attend.q_proj(hidden), attend.k_proj(hidden), attend.v_proj(hidden)], -1)
        features = sides if kind == "locret" else hidden
        scores = heads.scores_of(features, head_of(KvSpec(**settings), 0))
    kept = []
    for row in range(len(ids)):
        for head in range(KV):
            alive: list[int] = []
            for now in range(LENGTH):
                alive.append(now)
                if len(alive) > 16:
                    free = [place for place in alive if 2 <= place <= now - 4]
                    alive.remove(min(free, key=lambda place: float(scores[row, head, place])))
            kept.append(alive)
    assert held(cache.layers[0]) == kept


@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_in_pieces_leaves_what_one_token_after_another_does(model: Any, ids: Tensor, kind: str) -> None:
    """In the first layer; what later ones compute hangs on what a piece could still see."""
    found = []
    for chunk in (1, 6, 16, LENGTH):
        cache = cache_of(model, budget=16, sinks=2, recent=4, **KINDS[kind])
        through(model, cache, ids, chunk)
        found.append(held(cache.layers[0]))
    assert all(each == found[0] for each in found)


@pytest.mark.parametrize("kind", KINDS)
def test_padded_rows_are_as_alone(model: Any, ids: Tensor, kind: str) -> None:
    settings: dict[str, Any] = {"budget": 16, "sinks": 2, "recent": 4, **KINDS[kind]}
    mask = torch.ones_like(ids)
    for row, count in enumerate((0, 6, 12, 24)):
        mask[row, :count] = 0
    found = through(model, cache_of(model, **settings), ids, 6, mask)
    for row, count in enumerate((0, 6, 12, 24)):
        alone = through(model, cache_of(model, **settings), ids[row : row + 1, count:], 6)
        torch.testing.assert_close(found[row : row + 1, count:], alone, rtol=1e-3, atol=1e-3)


def test_a_model_that_was_watched_is_as_before(model: Any, ids: Tensor) -> None:
    """Hooks are there once, also in a copy, and keep nothing of what the model's own attention computes."""
    settings: dict[str, Any] = {"budget": 16, "sinks": 2, "recent": 4, **KINDS["locret"]}
    first = through(model, cache_of(model, **settings), ids, 8)
    again = through(model, cache_of(model, **settings), ids, 8)
    twin = copy.deepcopy(model)
    assert torch.equal(first, again) and torch.equal(through(twin, cache_of(twin, **settings), ids, 8), first)
    for each in (model, twin):
        attention = each.model.layers[0].self_attn
        assert len(attention._forward_pre_hooks) == len(attention._forward_hooks) == 1
        assert len(attention.q_proj._forward_hooks) == 1
    model.set_attn_implementation("eager")
    assert through(model, DynamicCache(), ids, LENGTH).shape[1] == LENGTH
    assert heads._caught.get() is None


def test_generation_runs_twice_alike_and_beside_another_cache(model: Any, ids: Tensor) -> None:
    settings: dict[str, Any] = {"budget": 16, "sinks": 2, "recent": 4}
    found = []
    for kind in ("locret", "kvzap", "locret"):
        cache = cache_of(model, **settings, **KINDS[kind])
        found.append(model.generate(ids[:2, :24], past_key_values=cache, max_new_tokens=12, do_sample=False))
    assert torch.equal(found[0], found[2])
    spec = KvSpec(scorer="key_norm", **settings)
    alone = through(model, KvCache.attach(model, [spec] * 3), ids, 8)
    fresh = copy.deepcopy(model)
    for module in fresh.modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
    assert torch.equal(through(fresh, KvCache.attach(fresh, [spec] * 3), ids, 8), alone)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"scorer": "locret", "budget": 64}, "two layers"),
        ({"scorer": "h2o", "budget": 64, "head_width": 8}, "of the learned scorers"),
        ({"scorer": "kvzap", "budget": 64, "head_width": -1}, "0 or more"),
    ],
    ids=str,
)
def test_heads_that_cannot_be_are_refused(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(UsageError, match=told):
        KvSpec(**settings)


def test_a_head_of_another_model_or_without_hooks_is_told(model: Any, ids: Tensor) -> None:
    spec = KvSpec(budget=64, **KINDS["kvzap"])
    cut = {name: tensor[..., :-1] for name, tensor in head_of(spec, 0).items()}
    cut["head.first_bias"], cut["head.second_bias"] = torch.zeros(24), torch.zeros(KV)
    cache = KvCache.attach(model, [spec] * 3, [cut] * 3)
    with pytest.raises(InputError, match="63 features, but the attention has 2 key-value heads and 64"):
        through(model, cache, ids, 8)
    with pytest.raises(UsageError, match=r"needs its tensor head\.first"):
        KvCache.attach(model, [spec] * 3)
    bare = AutoModelForCausalLM.from_config(model.config).eval()
    KvCache.attach(bare, [KvSpec()] * 3)
    with pytest.raises(UsageError, match="which was not kept"):
        through(bare, KvCache(layers=[KvLayer(spec, head_of(spec, at)) for at in range(3)]), ids, 8)


@pytest.mark.parametrize("kind", KINDS)
def test_a_captured_graph_holds_the_very_same_head(kind: str) -> None:
    class Scoring(torch.nn.Module):
        def __init__(self, tensors: dict[str, Tensor]) -> None:
            super().__init__()
            self.tensors = tensors

        def forward(self, features: Tensor) -> Tensor:
            return heads.scores_of(features, self.tensors)

    spec = KvSpec(budget=64, **KINDS[kind])
    features = torch.randn(2, 5, PROJECTED if kind == "locret" else HIDDEN)
    module = Scoring(head_of(spec, 0))
    captured = torch.export.export(module, (features,), strict=False).module()
    torch.testing.assert_close(captured(features), module(features))


def attended(batch: int = 2, length: int = 16) -> Attended:
    """An attention of two query heads to each of two keys' heads, with random states."""
    generator = torch.Generator().manual_seed(5)
    module = torch.nn.Module()
    module.o_proj = torch.nn.Linear(4 * 4, 12).requires_grad_(False)
    shapes = ((batch, length, 12), (batch, 4, length, 4), (batch, KV, length, 4), (batch, KV, length, 4))
    hidden, query, key, value = (torch.randn(shape, generator=generator) for shape in shapes)
    return Attended(module, hidden, query, key, value, scaling=0.5)


def test_labels_are_what_later_queries_say_of_a_token() -> None:
    """Slow twins, query by query."""
    seen, tokens = attended(), importance.judged(16, 1, 3)
    assert (tokens.start, tokens.stop) == (1, 9)
    logits, mass, weighed, again = (torch.zeros(2, KV, 8) for _ in range(4))
    module: Any = seen.module
    for row in range(2):
        for head in range(KV):
            largest, best = dict.fromkeys(range(9), -math.inf), dict.fromkeys(range(9), 0.0)
            for query_head in (2 * head, 2 * head + 1):
                matrix = module.o_proj.weight[:, 4 * query_head : 4 * query_head + 4]
                for query in range(8, 16):
                    near = seen.key[row, head, : query + 1] @ seen.query[row, query_head, query] * 0.5
                    for place in range(1, 9):
                        share = float(near.softmax(0)[place])
                        worth = share * float((matrix @ seen.value[row, head, place]).norm())
                        best[place] = max(best[place], worth)
                        if query >= 12:
                            largest[place] = max(largest[place], float(near[place]))
                            mass[row, head, place - 1] += share
                            weighed[row, head, place - 1] += worth
            logits[row, head] = torch.tensor([largest[place] for place in range(1, 9)])
            again[row, head] = torch.tensor([math.log(best[place]) for place in range(1, 9)])
    torch.testing.assert_close(importance.largest_logits(seen, tokens), logits)
    torch.testing.assert_close(importance.attention_mass(seen, tokens), mass)
    torch.testing.assert_close(importance.attention_mass(seen, tokens, weighed=True), weighed)
    torch.testing.assert_close(importance.replayed(seen, slice(1, 8)), again[..., :7])
    assert importance.log_ages(16, tokens).exp().round().tolist() == [11, 10, 9, 8, 7, 6, 5, 4]


def test_the_first_half_of_a_window_is_a_window() -> None:
    seen = attended()
    half = importance.first_half(seen)
    assert half.hidden.shape[1] == half.key.shape[2] == 8
    assert torch.equal(half.logits(slice(6, 8)), seen.logits(slice(6, 8))[..., :8])
    assert torch.equal(kv_heads.repeated([torch.arange(10).reshape(2, 5)])[0][0], torch.tensor([0, 1, 0, 1]))


def test_ranks_are_compared_as_spearman_does() -> None:
    first, second = torch.randn(2, 3, 20, generator=torch.Generator().manual_seed(1))
    twin = [spearmanr(a, b).statistic for a, b in zip(first.numpy(), second.numpy(), strict=True)]
    np.testing.assert_allclose(importance.rank_correlation(first, second).numpy(), twin)


def examples(ages: Tensor | None) -> list[retaining.Batch]:
    """Labels that a linear head says but for noise; with ages they fall, twice as fast in the second head."""
    generator = torch.Generator().manual_seed(2)
    true = torch.randn(KV, 6, generator=generator)
    found = []
    for _ in range(8):
        features = torch.randn(3, 20, 6, generator=generator) * torch.tensor([1, 1, 1, 1, 1, 30.0])
        labels = 4 + (features @ true.T).transpose(1, 2) + 0.01 * torch.randn(3, KV, 20, generator=generator)
        found.append((features, labels if ages is None else labels - torch.tensor([[1.0], [2.0]]) * ages))
    return found


@pytest.mark.parametrize("aged", [False, True])
def test_a_linear_head_is_what_least_squares_say(aged: bool) -> None:
    ages = importance.log_ages(40, slice(4, 24)) if aged else None
    batches = examples(ages)
    found = retaining.train(batches, retaining.Fitting(0, True, 0, 0.1, ages=ages))
    assert found.held and found.after < 0.01 * found.before
    rows = torch.cat([features.reshape(-1, 6) for at, (features, _) in enumerate(batches) if at != 7])
    labels = torch.cat([each.transpose(1, 2).reshape(-1, KV) for at, (_, each) in enumerate(batches) if at != 7])
    columns = [rows, torch.ones(len(rows), 1)]
    if ages is not None:
        columns.append(-ages.repeat(len(rows) // 20)[:, None])
    twin = torch.linalg.lstsq(torch.cat(columns, 1), labels).solution
    scale = twin[7] if aged else torch.ones(KV)
    torch.testing.assert_close(found.tensors["head.second"], (twin[:6] / scale).T, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("aged", [False, True])
def test_a_head_of_two_layers_learns_and_keeps_the_best(aged: bool) -> None:
    ages = importance.log_ages(40, slice(4, 24)) if aged else None
    how = retaining.Fitting(16, True, 400, 0.03, ages=ages)
    found = retaining.train(examples(ages), how)
    assert found.after < 0.2 * found.before
    again = retaining.train(examples(ages), how)
    assert all(torch.equal(tensor, again.tensors[name]) for name, tensor in found.tensors.items())
    assert set(found.tensors) == set(KvSpec(scorer="kvzap", budget=64, head_width=16).wants)


def test_learned_scores_lose_the_logarithm_of_their_age() -> None:
    spec = KvSpec(scorer="kvzap", budget=64, sinks=0, recent=1, by_age=True)
    scores, positions = torch.tensor([[[1.0, 1.5, 0.0, 9.0]]]), torch.tensor([[[0, 6, 8, 9]]])
    found = scorers.ranked(spec, scores, positions, torch.ones(1, 1, 4, dtype=torch.bool), torch.tensor([9]))
    worth = [1 - math.log(10), 1.5 - math.log(4), -math.log(2)]
    assert found[0, 0].tolist() == [3, *sorted(range(3), key=lambda place: -worth[place])]


@pytest.fixture(scope="module")
def data(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Model, Calibration]:
    model = compress.load(llama)
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("ids") / "ids.txt"
    path.write_text("\n".join(" ".join(str(int(each)) for each in row) for row in torch.randint(1, 250, (80, 32))))
    return model, calibrate(model, path, length=96)


SETTINGS = "budget=24, sinks=2, recent=4"
CODEBOOK = "rtn(format=codebook(vector=2, entries=16))"


@pytest.mark.parametrize(
    "text",
    [
        f"kv_evict({SETTINGS}, by=locret, width=8, steps=8)",
        f"kv_evict({SETTINGS}, by=kvzap)",
        f"kv_evict({SETTINGS}, by=kvzap, labels=attention, by_age=true, width=8, steps=8), {CODEBOOK}",
    ],
)
def test_heads_are_trained_on_the_finished_model_and_go_with_it(
    text: str, data: tuple[Model, Calibration], tmp_path: Path
) -> None:
    result = Pipeline.parse(text).run(*data, folder=tmp_path / "model")
    stored = store.open_store(tmp_path / "model")
    assert [set(held) for held in stored.kv_tensors] == [set(spec.wants) for spec in stored.kv]
    row = next(row for row in result.passes[0].layers if row.layer == "model.layers.0.cache")
    assert re.search(
        r"head trained by (logits|replay|attention) of [\d,]+ tokens in \d+ s, held-out loss", row.notes[0]
    )
    assert re.search(r"held-out rank correlation with later attention -?[\d.]+; short keys", row.notes[1])
    assert float(re.findall(r"loss ([\d.e-]+) → ([\d.e-]+)", row.notes[0])[0][1]) < 10
    artifact = compress.export(result, profile="cpu-x86-avx2", target="native", out=tmp_path / "out")
    session = artifact.session()
    ids = np.random.default_rng(0).integers(1, 256, (1, 32))
    off = 0.1 if CODEBOOK in text else 1e-3  # kernels of one token and of many round differently
    np.testing.assert_allclose(session.plain.logits(ids)[:, :20], session.logits(ids)[:, :20], rtol=off, atol=off)
    expected = session.greedy(ids[0].tolist(), 4)
    assert session.greedy(ids[0].tolist(), 4) == expected


@pytest.mark.parametrize("quant", ["keys=int8(channel), values=int8(head), static=minmax, ", ""])
@pytest.mark.parametrize("order", [1, -1])
def test_heads_and_what_data_say_of_stores_go_together_in_any_order(
    quant: str, order: int, data: tuple[Model, Calibration], tmp_path: Path
) -> None:
    head = f"kv_evict({SETTINGS}, by=kvzap, labels=attention)"
    Pipeline.parse(", ".join([f"kv_quant({quant}sensitive=1)", head][::order])).run(*data, folder=tmp_path / "model")
    stored = store.open_store(tmp_path / "model")
    assert [set(held) for held in stored.kv_tensors] == [set(spec.wants) for spec in stored.kv]
    scales = [name for held in stored.kv_tensors for name in held if name.endswith("scale")]
    assert len(scales) == (4 if quant else 0)  # keys and values of two layers; the third is spared
    Pipeline.parse(head).run(*data, folder=tmp_path / "alone")
    alone = store.open_store(tmp_path / "alone").kv_tensors
    for held, expected in zip(stored.kv_tensors, alone, strict=True):
        assert all(torch.equal(held[name], tensor) for name, tensor in expected.items())


def test_the_same_data_and_seed_give_the_same_heads(data: tuple[Model, Calibration], tmp_path: Path) -> None:
    found = []
    for place, seed in enumerate((0, 0, 1)):
        text = f"kv_evict({SETTINGS}, by=locret, width=8, steps=4, seed={seed})"
        Pipeline.parse(text).run(*data, folder=tmp_path / str(place))
        found.append(store.open_store(tmp_path / str(place)).kv_tensors[0]["head.first"])
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ("by=h2o, width=8", "width is of by=locret and by=kvzap, not of h2o"),
        ("by=kvzap, by_age=true", "Take labels=attention"),
        ("by=locret, width=0", "two layers"),
        ("by=kvzap, steps=800", "steps is of heads with two layers"),
        ("by=locret, decay=0.9", "are of by=h2o"),
    ],
)
def test_settings_that_do_nothing_are_refused(settings: str, told: str, data: tuple[Model, Calibration]) -> None:
    with pytest.raises(UsageError, match=told):
        Pipeline.parse(f"kv_evict(budget=64, {settings})")


def test_windows_that_are_too_short_are_told(data: tuple[Model, Calibration]) -> None:
    with pytest.raises(UsageError, match=r"Windows of 48 tokens leave 0 to learn from"):
        Pipeline.parse("kv_evict(budget=64, by=kvzap)").run(*data)
    with pytest.raises(UsageError, match="needs calibration data"):
        Pipeline.parse("kv_evict(budget=64, by=kvzap)").run(data[0])
