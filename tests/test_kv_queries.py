"""Scores of newest and of expected queries: SnapKV and expected attention in a cache that drops tokens."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, GPTJConfig, LlamaConfig, LlamaForCausalLM, PhiConfig

from compress.errors import UnsupportedError, UsageError
from compress.kv import snapkv
from compress.kv.cache import KvCache
from compress.kv.expected import Expected
from compress.kv.layer import KvLayer
from compress.kv.rotation import Rotation, rotation_of
from compress.kv.spec import KvSpec
from compress.passes import KvEvict
from helpers.kv_twin import twin

SMALL: dict[str, Any] = {"budget": 16, "sinks": 2, "recent": 6}
SCORERS: list[dict[str, Any]] = [
    {"scorer": "snapkv", "window": 4, "pool": 3},
    {"scorer": "snapkv", "window": 6, "pool": 1},
    {"scorer": "expected", "interval": 4},
    {"scorer": "key_diff"},
]
LENGTH = 40


@pytest.fixture(scope="module")
def model(llama: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32, attn_implementation="eager").eval()


@pytest.fixture(scope="module")
def ids() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.stack([torch.randperm(255, generator=generator)[:LENGTH] + 1 for _ in range(4)])


@torch.no_grad()
def through(model: Any, cache: Any, ids: Tensor, pieces: list[int], mask: Tensor | None = None) -> Tensor:
    """Logits of all tokens, in calls of so many each."""
    found, at = [], 0
    for count in pieces:
        more: dict[str, Any] = {}
        if mask is not None:
            seen = mask[:, : at + count]
            more = {"attention_mask": seen, "position_ids": (seen.cumsum(1) - 1).clamp(min=0)[:, at:]}
        found.append(model(ids[:, at : at + count], past_key_values=cache, use_cache=True, **more).logits)
        at += count
    return torch.cat(found, 1)


def calls(chunk: int, prompt: int = LENGTH) -> list[int]:
    """A prompt in pieces, the rest token by token."""
    whole = [chunk] * (prompt // chunk) + [prompt % chunk] * (prompt % chunk > 0)
    return whole + [1] * (LENGTH - prompt)


def cached(model: Any, spec: KvSpec, ids: Tensor, pieces: list[int], mask: Tensor | None = None) -> tuple[Tensor, Any]:
    cache = KvCache.attach(model, [spec] * model.config.num_hidden_layers)
    try:
        return through(model, cache, ids, pieces, mask), cache
    finally:
        model.set_attn_implementation("eager")


def positions(cache: Any, row: int) -> list[list[list[int]]]:
    return [
        [
            sorted(head[row_valid].tolist())
            for head, row_valid in zip(layer.position[row], layer.valid[row], strict=True)
        ]
        for layer in cache.layers
    ]


@pytest.mark.parametrize("chunk", [1, 7, LENGTH])
@pytest.mark.parametrize("settings", SCORERS, ids=str)
def test_with_room_for_everything_logits_are_those_of_no_compression(
    model: Any, ids: Tensor, settings: dict[str, Any], chunk: int
) -> None:
    mask = torch.ones_like(ids)
    mask[1, :9] = mask[2, :20] = 0
    spec = KvSpec(**{**SMALL, "budget": LENGTH}, **settings)
    for rows, its in ((ids[:1], None), (ids, mask)):
        expected = through(model, DynamicCache(), rows, calls(chunk), its)
        found, _ = cached(model, spec, rows, calls(chunk), its)
        real = torch.ones_like(rows, dtype=torch.bool) if its is None else its.bool()
        assert torch.equal(found[real], expected[real])


@pytest.mark.parametrize("pieces", [[1] * LENGTH, [11, 12, 3] + [1] * 14], ids=len)
@pytest.mark.parametrize("settings", SCORERS, ids=str)
def test_what_is_dropped_is_what_a_slow_twin_masks(
    model: Any, ids: Tensor, settings: dict[str, Any], pieces: list[int]
) -> None:
    spec = KvSpec(**SMALL, **settings)
    found, cache = cached(model, spec, ids[:2], pieces)
    for row in range(2):
        expected, layers = twin(model, ids[row], [spec] * 3, pieces)
        assert positions(cache, row) == [[head.held for head in heads] for heads in layers]
        torch.testing.assert_close(found[row], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("settings", SCORERS, ids=str)
def test_padded_rows_are_as_alone(model: Any, ids: Tensor, settings: dict[str, Any]) -> None:
    """Calls of 6 tokens, then of one: rows that begin at a call's first token have the same calls alone."""
    mask = torch.ones_like(ids)
    for row, count in enumerate((0, 6, 12, 18)):
        mask[row, :count] = 0
    spec = KvSpec(**SMALL, **settings)
    found, _ = cached(model, spec, ids, calls(6, 30), mask)
    for row, count in enumerate((0, 6, 12, 18)):
        alone, _ = cached(model, spec, ids[row : row + 1, count:], [6] * (5 - count // 6) + [1] * 10)
        torch.testing.assert_close(found[row, count:], alone[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("settings", SCORERS, ids=str)
def test_a_cache_goes_on_as_its_fork_and_as_rows_of_it(model: Any, ids: Tensor, settings: dict[str, Any]) -> None:
    cache = KvCache.attach(model, [KvSpec(**SMALL, **settings)] * 3)
    through(model, cache, ids, calls(6, 24)[:4])
    fork = cache.fork()
    first = through(model, cache.fork(), ids[:, 24:], [8])
    again = through(model, fork, ids[:, 24:], [8])
    cache.batch_select_indices(torch.tensor([2, 0]))
    rows = through(model, cache, ids[[2, 0], 24:], [8])
    model.set_attn_implementation("eager")
    assert torch.equal(first, again)
    torch.testing.assert_close(rows, first[[2, 0]])


def test_a_prompt_shorter_than_the_window_is_read(model: Any, ids: Tensor) -> None:
    spec = KvSpec(scorer="snapkv", budget=40, recent=32, sinks=4)
    found, cache = cached(model, spec, ids[:, :5], [3, 2])
    assert torch.equal(found, through(model, DynamicCache(), ids[:, :5], [3, 2]))
    assert positions(cache, 0)[0][0] == [0, 1, 2, 3, 4]


def test_neighbours_are_those_by_position_whatever_slots_they_are_in() -> None:
    generator = torch.Generator().manual_seed(1)
    places = torch.stack([torch.randperm(30, generator=generator)[:12] for _ in range(6)]).reshape(2, 3, 12)
    valid = torch.rand(2, 3, 12, generator=generator) > 0.2
    scores = torch.rand(2, 3, 12, generator=generator)
    before = torch.tensor([15, 9])[:, None, None]
    for pool in (1, 3, 7):
        found = snapkv.pooled(scores, places, valid, before, pool)
        for row in range(2):
            for head in range(3):
                near, there = places[row, head].tolist(), valid[row, head].tolist()
                for i, at in enumerate(near):
                    inside = [
                        float(scores[row, head, j])
                        for j, other in enumerate(near)
                        if there[j] and abs(other - at) <= pool // 2 and (other > before[row]) == (at > before[row])
                    ]
                    if there[i]:
                        assert float(found[row, head, i]) == pytest.approx(sum(inside) / len(inside), rel=1e-5)


def test_queries_are_counted_alike_whatever_calls_they_come_in() -> None:
    query = torch.randn(2, 4, 24, 8, generator=torch.Generator().manual_seed(2)) + 3
    asked = torch.ones(2, 24, dtype=torch.bool)
    asked[1, :5] = False
    places = (asked.cumsum(1) - 1).clamp(min=0)
    rotation = Rotation(torch.tensor([1.0, 0.3, 0.1, 0.01]))
    found = []
    for size in (24, 5, 1):
        one = Expected(rotation)
        for at in range(0, 24, size):
            part = slice(at, at + size)
            one.meet(query[:, :, part], places[:, part], asked[:, part])
        found.append(one.held)
    plain = rotation.back(query, places)
    for row, first in enumerate((0, 5)):
        for head in range(4):
            seen = plain[row, head, first:].double()
            for each in found:
                torch.testing.assert_close(each["mean"][row, head].double(), seen.mean(0), rtol=1e-4, atol=1e-4)
                spread = each["scatter"][row, head].double() / len(seen)
                torch.testing.assert_close(spread, torch.cov(seen.T, correction=0), rtol=1e-3, atol=1e-3)


def test_what_queries_were_like_is_counted_among_the_bytes(model: Any, ids: Tensor) -> None:
    sizes = {}
    for scorer in ("h2o", "expected"):
        _, cache = cached(model, KvSpec(**SMALL, scorer=scorer, interval=4), ids, calls(8))
        sizes[scorer] = cache.nbytes
    size, heads = model.model.layers[0].self_attn.head_dim, model.config.num_attention_heads
    assert sizes["expected"] - sizes["h2o"] == 3 * 4 * 4 * (heads * (size + size**2) + 1)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"scorer": "snapkv", "budget": 128, "window": 64}, "window=64 is not 1 to recent=32.*Give recent=64"),
        ({"scorer": "snapkv", "budget": 128, "pool": 4}, "pool=4 is not odd"),
        ({"scorer": "snapkv", "budget": 36}, "at least 37"),
        ({"scorer": "expected", "budget": 128, "interval": 33}, "interval=33 is not 1 to recent=32"),
        ({"scorer": "expected", "budget": 128, "interval": 0}, "interval=0"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(UsageError, match=told):
        KvSpec(**settings)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("kv_evict(window=16)", "window is of by=snapkv, not of h2o"),
        ("kv_evict(by=snapkv, interval=8)", "interval is of by=expected"),
        ("kv_evict(by=snapkv, window=48)", "Give recent=48"),
    ],
)
def test_settings_of_another_scorer_are_refused(text: str, told: str) -> None:
    from compress.pipeline import Pipeline

    with pytest.raises(UsageError, match=told):
        Pipeline.parse(text)
    assert KvEvict(by="snapkv", window=16).fill(KvSpec(), 0).window == 16


def test_a_model_whose_rotation_is_another_is_refused() -> None:
    small: dict[str, Any] = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    part = AutoModelForCausalLM.from_config(PhiConfig(**small, num_attention_heads=2, partial_rotary_factor=0.5))
    with pytest.raises(UnsupportedError, match=r"rotates 4 of the 8 channels.*Take by=snapkv"):
        rotation_of(part)
    grows = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    config = LlamaConfig(**small, num_attention_heads=2, rope_parameters=grows)
    with pytest.raises(UnsupportedError, match="of kind dynamic"):
        rotation_of(LlamaForCausalLM(config))
    gptj = GPTJConfig(vocab_size=32, n_embd=16, n_layer=1, n_head=2, rotary_dim=4, n_positions=32)
    with pytest.raises(UnsupportedError, match="no rotary embedding"):
        rotation_of(AutoModelForCausalLM.from_config(gptj))
    with pytest.raises(UsageError, match=r"Make it by KvCache\.attach"):
        KvLayer(KvSpec(scorer="expected", budget=64))
