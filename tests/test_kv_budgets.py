"""Budgets by layer and by head: shared out under one total, and really stored so."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache

import compress
from compress.engine import store
from compress.errors import UsageError
from compress.inputs.datasets import Calibration, calibrate
from compress.kv.cache import KvCache
from compress.kv.flat import FlatLayer
from compress.kv.spec import KvSpec
from compress.maths import budgets
from compress.models.model import Model
from compress.passes import KvEvict, Rtn
from compress.pipeline import Pipeline, planned_caches
from helpers.kv_twin import twin

SMALL: dict[str, Any] = {"budget": 16, "sinks": 2, "recent": 4}
SCORERS: list[dict[str, Any]] = [
    {"scorer": "key_norm"},
    {"scorer": "h2o"},
    {"scorer": "snapkv", "window": 4, "pool": 3},
    {"scorer": "expected", "interval": 4},
    {"scorer": "key_diff"},
]
LENGTH = 36
PIECES = [11, 10, 3] + [1] * 12


@pytest.fixture(scope="module")
def model(llama: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32, attn_implementation="eager").eval()


@pytest.fixture(scope="module")
def ids() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.stack([torch.randperm(255, generator=generator)[:LENGTH] + 1 for _ in range(4)])


@pytest.fixture(scope="module")
def loaded(llama: Path) -> Model:
    return compress.load(llama)


@pytest.fixture(scope="module")
def data(loaded: Model, tmp_path_factory: pytest.TempPathFactory) -> Calibration:
    generator = torch.Generator().manual_seed(0)
    rows = [" ".join(str(int(each)) for each in row) for row in torch.randint(1, 250, (4, 48), generator=generator)]
    path = tmp_path_factory.mktemp("data") / "ids.txt"
    path.write_text("\n".join(rows))
    return calibrate(loaded, path, length=48)


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


def cached(
    model: Any, specs: list[KvSpec], ids: Tensor, pieces: list[int], mask: Tensor | None = None
) -> tuple[Tensor, Any]:
    cache = KvCache.attach(model, specs)
    try:
        return through(model, cache, ids, pieces, mask), cache
    finally:
        model.set_attn_implementation("eager")


@pytest.mark.parametrize("settings", SCORERS, ids=str)
def test_with_room_for_everything_logits_are_those_of_no_compression(
    model: Any, ids: Tensor, settings: dict[str, Any]
) -> None:
    mask = torch.ones_like(ids)
    mask[1, :9] = mask[2, :20] = 0
    spec = KvSpec(**{**SMALL, "budget": LENGTH}, heads="adaptive", **settings)
    for rows, its in ((ids[:1], None), (ids, mask)):
        expected = through(model, DynamicCache(), rows, PIECES, its)
        found, _ = cached(model, [spec] * 3, rows, PIECES, its)
        real = torch.ones_like(rows, dtype=torch.bool) if its is None else its.bool()
        assert torch.equal(found[real], expected[real])


@pytest.mark.parametrize("settings", SCORERS, ids=str)
def test_heads_hold_what_a_slow_twin_leaves_unmasked(model: Any, ids: Tensor, settings: dict[str, Any]) -> None:
    spec = KvSpec(**SMALL, heads="adaptive", floor=0.5, **settings)
    found, cache = cached(model, [spec] * 3, ids[:2], PIECES)
    unlike = 0
    for row in range(2):
        expected, layers = twin(model, ids[row], [spec] * 3, PIECES)
        held = [layer.positions(row) for layer in cache.layers]
        assert held == [[head.held for head in heads] for heads in layers]
        assert all(sum(map(len, heads)) == 2 * 16 and min(map(len, heads)) >= 8 for heads in held)
        assert all({0, 1, *range(LENGTH - 4, LENGTH)} <= set(head) for heads in held for head in heads)
        unlike += sum(len(heads[0]) != len(heads[1]) for heads in held)
        torch.testing.assert_close(found[row], expected, rtol=1e-4, atol=1e-4)
    assert unlike or settings["scorer"] == "h2o"  # sums of as many queries: of small heads alike, nearly equal


@pytest.mark.parametrize("settings", SCORERS, ids=str)
def test_a_floor_of_one_is_even_heads(model: Any, ids: Tensor, settings: dict[str, Any]) -> None:
    mask = torch.ones_like(ids)
    mask[1, :11] = 0
    adaptive = KvSpec(**SMALL, heads="adaptive", floor=1, **settings)
    found, cache = cached(model, [adaptive] * 3, ids, PIECES, mask)
    expected, even = cached(model, [KvSpec(**SMALL, **settings)] * 3, ids, PIECES, mask)
    torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], rtol=1e-4, atol=1e-4)
    for ours, theirs in zip(cache.layers, even.layers, strict=True):
        for row in range(len(ids)):
            assert ours.positions(row) == theirs.position[row].sort(-1).values.tolist()


@pytest.mark.parametrize("settings", SCORERS, ids=str)
def test_padded_rows_are_as_alone(model: Any, ids: Tensor, settings: dict[str, Any]) -> None:
    mask = torch.ones_like(ids)
    mask[1, :11] = mask[2, :21] = 0
    specs = [KvSpec(**SMALL, heads="adaptive", **settings)] * 3
    found, cache = cached(model, specs, ids[:3], PIECES, mask[:3])
    for row, pieces in ((1, PIECES[1:]), (2, PIECES[2:])):
        rest = int(mask[row].sum())
        alone, one = cached(model, specs, ids[row : row + 1, -rest:], pieces)
        torch.testing.assert_close(found[row, -rest:], alone[0], rtol=1e-4, atol=1e-4)
        held = [layer.positions(row) for layer in cache.layers]
        if rest >= 2 * 16:
            assert held == [layer.positions(0) for layer in one.layers]


def test_bytes_are_those_of_the_budget_however_heads_share_it(model: Any, ids: Tensor) -> None:
    """As many as with even heads, and 8 for each head that says how many slots it has."""
    rounded: dict[str, Any] = {"keys": "int8(token)", "values": "int4(group=8)"}
    for formats in ({}, rounded):
        common = {**SMALL, "scorer": "key_norm", **formats}
        sizes = []
        specs = [KvSpec(**common, heads="adaptive")] * 3
        cache = KvCache.attach(model, specs)
        for at in range(0, LENGTH, 6):
            through(model, cache, ids[:, at : at + 6], [6])
            sizes.append(cache.nbytes)
        model.set_attn_implementation("eager")
        _, even = cached(model, [KvSpec(**common)] * 3, ids, PIECES)
        assert len(set(sizes[2:])) == 1
        assert sizes[-1] == even.nbytes + 3 * 4 * 2 * 8
        widths = {int(count) for layer in cache.layers for count in layer.held.flatten()}
        assert len(widths) > 2 and all(store.slots == 32 for layer in cache.layers for store in layer.stores)


def test_rounded_heads_read_back_what_they_stored(model: Any, ids: Tensor) -> None:
    rounded: dict[str, Any] = {"keys": "int8(token)", "values": "int4(group=8)"}
    room = KvSpec(**{**SMALL, "budget": LENGTH}, scorer="key_norm", heads="adaptive", **rounded)
    found, _ = cached(model, [room] * 3, ids, PIECES)
    expected, _ = cached(model, [KvSpec(**rounded)] * 3, ids, PIECES)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    tight = KvSpec(**SMALL, scorer="key_norm", heads="adaptive", floor=1, **rounded)
    _, ours = cached(model, [tight] * 3, ids, PIECES)
    _, even = cached(model, [KvSpec(**SMALL, scorer="key_norm", **rounded)] * 3, ids, PIECES)
    first, other = ours.layers[0], even.layers[0]  # later ones read what was rounded, summed in another order
    order = other.position.argsort(-1)[..., None].expand(4, 2, 16, 16)
    for mine, theirs in zip(first.stores, other.stores, strict=True):
        stored, twins = mine.read(), theirs.read()
        assert stored is not None and twins is not None
        assert torch.equal(stored.view(4, 2, 16, 16), twins.gather(2, order))


def test_rows_and_forks_of_unlike_heads_go_on(model: Any, ids: Tensor) -> None:
    cache = KvCache.attach(model, [KvSpec(**SMALL, scorer="key_norm", heads="adaptive")] * 3)
    through(model, cache, ids[:, :24], [8, 8, 8])
    first = through(model, cache.fork(), ids[:, 24:], [1] * 12)
    again = through(model, cache.fork(), ids[:, 24:], [1] * 12)
    cache.batch_select_indices(torch.tensor([2, 0]))
    rows = through(model, cache, ids[[2, 0], 24:], [1] * 12)
    model.set_attn_implementation("eager")
    assert isinstance(cache.layers[0], FlatLayer)
    assert torch.equal(first, again)
    torch.testing.assert_close(rows, first[[2, 0]])


def test_a_pyramid_falls_from_layer_to_layer_to_the_same_total() -> None:
    assert budgets.pyramid(100, 3, 20.0, 1) == [195, 100, 5]
    assert budgets.pyramid(64, 1, 20.0, 37) == [64]
    for average, layers, least in itertools.product((40, 64, 257), (1, 2, 7, 32), (1, 37)):
        found = budgets.pyramid(average, layers, 20.0, least)
        assert sum(found) == average * layers and min(found) >= least
        assert found == sorted(found, reverse=True)
    assert budgets.pyramid(37, 4, 20.0, 37) == [37] * 4


def test_measured_budgets_lose_least_of_all_that_have_the_total() -> None:
    generator = torch.Generator().manual_seed(3)
    for _ in range(5):
        gains = torch.rand(3, 6, generator=generator).sort(-1, descending=True).values
        losses = [torch.cat([each.flip(0).cumsum(0).flip(0), torch.zeros(1)]) for each in gains]
        found = budgets.fairest(losses, 9, 1)
        assert sum(found) == 9 and min(found) >= 1
        every = (each for each in itertools.product(range(1, 7), repeat=3) if sum(each) == 9)
        least = min(sum(float(curve[at]) for curve, at in zip(losses, each, strict=True)) for each in every)
        assert sum(float(curve[at]) for curve, at in zip(losses, found, strict=True)) == pytest.approx(least)
    assert budgets.fairest([torch.zeros(3)] * 3, 30, 1) == [10, 10, 10]


def test_a_pyramid_goes_into_the_store_and_the_plan(loaded: Model, tmp_path: Path) -> None:
    text = "kv_evict(budget=64, by=h2o, sinks=2, recent=4, layers=pyramid)"
    pipeline = Pipeline.parse(text)
    result = pipeline.run(loaded, folder=tmp_path / "model")
    assert [spec.budget for spec in result.model.kv] == budgets.pyramid(64, 3, 20.0, 7)
    assert store.open_store(tmp_path / "model").kv == result.model.kv
    assert planned_caches(pipeline.passes, pipeline.lay(loaded)) == result.model.kv
    assert str(pipeline) == text


def test_measured_budgets_follow_what_attention_loses(
    loaded: Model, model: Any, data: Calibration, tmp_path: Path
) -> None:
    text = "kv_evict(budget=16, sinks=2, recent=4, by=snapkv, window=4, layers=measured)"
    result = Pipeline.parse(text).run(loaded, data, folder=tmp_path / "model")
    found = [spec.budget for spec in result.model.kv]
    assert sum(found) == 3 * 16 and min(found) >= 7
    losses = [torch.zeros(49) for _ in range(3)]
    rows = torch.cat(data.batches())
    with torch.no_grad():
        attended = model(rows, output_attentions=True).attentions
    for layer, shares in enumerate(attended):
        for row in range(len(rows)):
            for head in range(2):
                got = shares[row, 2 * head : 2 * head + 2, -4:].mean((0, 1))
                others = sorted(got[2:-4].tolist(), reverse=True)
                for budget in range(49):
                    losses[layer][budget] += sum(others[max(budget - 6, 0) :]) / (2 * len(rows))
    assert found == budgets.fairest(losses, 48, 7)
    row = result.passes[0].layers[1]
    assert row.notes[0].startswith(f"{found[1]} tokens: ") and "with 16" in row.notes[0]
    assert row.format is not None and f"{found[1]} tokens" in row.format


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("kv_evict(by=tova, heads=adaptive)", "tova scores alike for all heads"),
        ("kv_evict(by=streaming, heads=adaptive)", "streaming scores alike for all heads"),
        ("kv_evict(floor=0.5)", "floor is of heads=adaptive"),
        ("kv_evict(beta=10)", "beta is of layers=pyramid"),
        ("kv_evict(budget=36, layers=pyramid)", "at least 37"),
    ],
)
def test_what_cannot_be_is_refused(text: str, told: str) -> None:
    with pytest.raises(UsageError, match=told):
        Pipeline.parse(text)


def test_a_budget_that_windows_do_not_fill_is_refused_before_any_work(
    loaded: Model, data: Calibration, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="have 48 tokens at most, so a budget of 64"):
        Pipeline(Rtn(bits=8), KvEvict(budget=64, layers="measured")).run(loaded, data, folder=tmp_path / "model")
    assert not (tmp_path / "model").exists()
    with pytest.raises(UsageError, match="needs calibration data"):
        Pipeline(KvEvict(budget=40, layers="measured")).run(loaded)
    with pytest.raises(UsageError, match="and nothing is dropped"):
        KvSpec(heads="adaptive")
    with pytest.raises(UsageError, match="static scales are of each head"):
        KvSpec(heads="adaptive", scorer="h2o", budget=64, keys="int8(head)", static=True)
    with pytest.raises(UsageError, match="not in"):
        KvSpec(heads="adaptive", scorer="h2o", budget=64, floor=1.5)
