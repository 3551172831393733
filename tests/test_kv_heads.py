"""Learned scorers of tokens: a head looks at a token as it is written, and what it says is what the cache drops by."""

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache

from compress.errors import InputError, UsageError
from compress.kv import heads
from compress.kv.cache import KvCache, KvLayer
from compress.kv.spec import KvSpec

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


@pytest.mark.parametrize("chunk", [1, 7, LENGTH])
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
    for chunk in (1, 6):
        found = through(model, cache_of(model, **settings), ids, chunk, mask)
        for row, count in enumerate((0, 6, 12, 24)):
            alone = through(model, cache_of(model, **settings), ids[row : row + 1, count:], chunk)
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
