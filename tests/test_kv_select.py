"""A cache that keeps every token and attends to some is full attention, masked to what was chosen."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache

import compress
from compress import extras
from compress.errors import UnsupportedError, UsageError
from compress.export.native import target
from compress.kv import retrieval, selection
from compress.kv.cache import KvCache, layer_of
from compress.kv.growing import GrowingStore
from compress.kv.index import KeyIndex, joined, linked, nearest, reached
from compress.kv.recall import Recall
from compress.kv.retrieval import RetrievalLayer
from compress.kv.spec import KvSpec, row_format
from compress.kv.stores import ChannelStore, RecentStore, RowStore, Store
from compress.kv.token_select import TokenSelectLayer
from compress.models.model import Model
from compress.passes import KvQuant, KvSelect
from compress.pipeline import Pipeline
from compress.plan import make_plan
from compress.runtime.torch_session import TorchSession

TOKENS: dict[str, Any] = {"selector": "token_select"}
EXACT: dict[str, Any] = {"selector": "retrieval", "index": "exact"}
FEW: dict[str, Any] = {"select": 6, "sinks": 2, "recent": 4}
LENGTH = 40
PROFILE = "cpu-x86-avx2"


@pytest.fixture(scope="module")
def model(llama: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32, attn_implementation="eager").eval()


@pytest.fixture(scope="module")
def source(llama: Path) -> Model:
    return compress.load(llama)


@pytest.fixture(scope="module")
def ids() -> Tensor:
    return torch.randint(1, 256, (4, LENGTH), generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def plain(model: Any) -> Iterator[None]:
    yield
    model.set_attn_implementation("eager")


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
    return KvCache.attach(model, [KvSpec(**settings)] * model.config.num_hidden_layers)


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("chunk", [1, 7, LENGTH])
@pytest.mark.parametrize(
    "settings", [TOKENS, {**TOKENS, "page": 4, "reuse": 0.5}, EXACT, {"selector": "retrieval"}], ids=str
)
def test_with_room_for_everything_logits_are_those_of_no_compression(
    model: Any, ids: Tensor, settings: dict[str, Any], chunk: int
) -> None:
    expected = through(model, DynamicCache(), ids, chunk)
    assert torch.equal(through(model, cache_of(model, **settings, select=LENGTH), ids, chunk), expected)


@pytest.mark.parametrize("store", [{"values": "int4(group=8)"}, {"keys": "int8(token)", "residual": 8}], ids=str)
@pytest.mark.parametrize("settings", [TOKENS, EXACT], ids=str)
def test_with_room_for_everything_a_rounded_cache_is_as_without(
    model: Any, ids: Tensor, settings: dict[str, Any], store: dict[str, Any]
) -> None:
    expected = through(model, cache_of(model, **store), ids, 5)
    assert torch.equal(through(model, cache_of(model, **store, **settings, select=LENGTH), ids, 5), expected)


@pytest.mark.parametrize(
    ("settings", "chunk"),
    [(TOKENS, 1), (TOKENS, 7), ({**TOKENS, "page": 3}, 1), ({**TOKENS, "page": 3}, 5), (EXACT, 1)],
    ids=str,
)
def test_what_is_chosen_is_full_attention_masked(model: Any, ids: Tensor, settings: dict[str, Any], chunk: int) -> None:
    spec = KvSpec(**settings, **FEW)
    everything = through(model, DynamicCache(), ids[:2], chunk)
    found = through(model, cache_of(model, **settings, **FEW), ids[:2], chunk)
    torch.testing.assert_close(found, masked_twin(model, ids[:2], spec, chunk), rtol=1e-3, atol=1e-5)
    assert relative(found, everything) > 1e-3


@torch.no_grad()
def masked_twin(model: Any, ids: Tensor, spec: KvSpec, chunk: int) -> Tensor:
    """Slowly: all keys stay, each query is masked to a Python set that is chosen by sorting."""
    config, blocks = model.config, model.model.layers
    heads, kv = config.num_attention_heads, config.num_key_value_heads
    groups, size = heads // kv, config.hidden_size // heads
    logits = []
    for row in ids:
        keys: list[list[Tensor]] = [[] for _ in blocks]
        values: list[list[Tensor]] = [[] for _ in blocks]
        for start in range(0, len(row), chunk):
            piece = row[None, start : start + chunk]
            count = piece.shape[1]
            hidden = model.model.embed_tokens(piece)
            cos, sin = model.model.rotary_emb(hidden, torch.arange(start, start + count)[None])
            for at, block in enumerate(blocks):
                normed, of = block.input_layernorm(hidden), block.self_attn
                q = rotated(of.q_proj(normed).view(1, count, heads, size).transpose(1, 2), cos, sin)[0]
                k = rotated(of.k_proj(normed).view(1, count, kv, size).transpose(1, 2), cos, sin)[0]
                v = of.v_proj(normed).view(1, count, kv, size).transpose(1, 2)[0]
                keys[at] += list(k.unbind(1))
                values[at] += list(v.unbind(1))
                out = torch.zeros(count, heads, size)
                for head in range(heads):
                    chosen = chosen_twin(q, keys[at], head, start, spec)
                    for j in range(count):
                        seen = sorted(chosen | set(range(start, start + j + 1)))
                        near = torch.stack([keys[at][s][head // groups] for s in seen])
                        share = (near @ q[head, j] / size**0.5).softmax(0)
                        out[j, head] = share @ torch.stack([values[at][s][head // groups] for s in seen])
                hidden = hidden + of.o_proj(out.reshape(1, count, -1))
                hidden = hidden + block.mlp(block.post_attention_layernorm(hidden))
            logits.append(model.lm_head(model.model.norm(hidden)))
    return torch.cat(logits, 1).reshape(len(ids), ids.shape[1], -1)


def chosen_twin(q: Tensor, keys: list[Tensor], head: int, start: int, spec: KvSpec) -> set[int]:
    """Stored tokens that a head attends to. q (heads, n, size); keys: of each token (kv heads, size)."""
    heads, count, size = q.shape
    middle = [s for s in range(start) if s >= spec.sinks and s <= start - spec.recent]
    fixed = set(range(start)) - set(middle)
    if len(middle) <= spec.select or (spec.selector == "retrieval" and count > 1):
        return fixed | set(middle)
    groups = heads // len(keys[0])
    mean = q.mean(1) / size**0.5
    products = {h: torch.stack([keys[s][h // groups] @ mean[h] for s in middle]) for h in range(heads)}
    if spec.selector == "retrieval":
        return fixed | {middle[int(place)] for place in products[head].argsort(descending=True)[: spec.select]}
    votes = sum((products[h].softmax(0) for h in range(heads)), torch.zeros(len(middle)))
    pages = dict[int, float]()
    for s, vote in zip(middle, votes.tolist(), strict=True):
        pages[s // spec.page] = pages.get(s // spec.page, 0) + vote
    best = sorted(pages, key=lambda page: -pages[page])[: spec.select // spec.page]
    return fixed | {s for s in middle if s // spec.page in best}


def rotated(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = states.shape[-1] // 2
    turned = torch.cat([-states[..., half:], states[..., :half]], -1)
    return states * cos[:, None] + turned * sin[:, None]


@pytest.mark.parametrize("settings", [TOKENS, {**TOKENS, "page": 3}, {**TOKENS, "reuse": 0.8}, EXACT], ids=str)
def test_padded_rows_are_as_alone(model: Any, ids: Tensor, settings: dict[str, Any]) -> None:
    padding = [0, 5, 11, 20]
    mask = torch.ones_like(ids)
    for row, count in enumerate(padding):
        mask[row, :count] = 0
    found = through(model, cache_of(model, **settings, **FEW), ids, 1, mask)
    for row, count in enumerate(padding):
        alone = through(model, cache_of(model, **settings, **FEW), ids[row : row + 1, count:])
        assert relative(found[row : row + 1, count:], alone) < 1e-4


@pytest.mark.parametrize("settings", [TOKENS, EXACT], ids=str)
def test_generation_and_further_turns_go_on_where_the_last_ended(
    model: Any, ids: Tensor, settings: dict[str, Any]
) -> None:
    cache = cache_of(model, **settings, **FEW)
    with torch.no_grad():
        turns = [model(ids[:2, at : at + 10], past_key_values=cache).logits for at in range(0, LENGTH, 10)]
    assert torch.equal(torch.cat(turns, 1), through(model, cache_of(model, **settings, **FEW), ids[:2], 10))
    texts = [
        model.generate(
            ids[:2, :24], past_key_values=cache_of(model, **settings, **FEW), max_new_tokens=8, do_sample=False
        )
        for _ in range(2)
    ]
    assert torch.equal(*texts)


@pytest.mark.parametrize("settings", [TOKENS, {**TOKENS, "reuse": 0.5}, EXACT], ids=str)
def test_rows_of_a_batch_go_where_beams_send_them(model: Any, ids: Tensor, settings: dict[str, Any]) -> None:
    order = torch.tensor([2, 0])
    cache = cache_of(model, **settings, **FEW)
    through(model, cache, ids[:3, :20])
    cache.batch_select_indices(order)
    expected = cache_of(model, **settings, **FEW)
    through(model, expected, ids[order, :20])
    more = ids[:2, 20:]
    assert relative(through(model, cache, more), through(model, expected, more)) < 1e-4


@pytest.mark.parametrize("settings", [TOKENS, {**TOKENS, "reuse": 0.5}, EXACT], ids=str)
def test_a_cache_that_forked_stays_as_it_was(model: Any, ids: Tensor, settings: dict[str, Any]) -> None:
    cache = cache_of(model, **settings, **FEW)
    through(model, cache, ids[:1, :20])
    forks = [cache.fork(), cache.fork()]
    first = [through(model, fork, ids[row : row + 1, 20:]) for row, fork in enumerate(forks)]
    again = [through(model, cache.fork(), ids[row : row + 1, 20:]) for row in range(2)]
    assert cache.get_seq_length() == 20
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))


def test_a_growing_store_writes_in_place_and_not_over_its_forks() -> None:
    states = torch.randn(2, 3, 400, 8, generator=torch.Generator().manual_seed(0))
    store = GrowingStore()
    store.append(states[:, :, :10])
    held = store.held
    fork = store.fork()
    fork.append(states[:, :, 300:301])
    assert fork.held is held
    for at in range(10, 300):
        store.append(states[:, :, at : at + 1])
    found, forked = store.read(), fork.read()
    assert found is not None and forked is not None and torch.equal(found, states[:, :, :300])
    assert torch.equal(forked, torch.cat([states[:, :, :10], states[:, :, 300:301]], 2))
    store.rows(torch.tensor([1]))
    assert store.nbytes == torch.numel(store.held) * 4 >= 300 * 3 * 8 * 4  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "store",
    [
        GrowingStore(),
        RowStore(row_format("int8(token)")),
        RecentStore(RowStore(row_format("int4(group=8)")), 8),
        ChannelStore(row_format("int4(group=4, float_zero)"), 8),  # type: ignore[arg-type]
    ],
    ids=lambda store: type(store).__name__,
)
def test_tokens_that_are_taken_are_those_that_are_read(store: Store) -> None:
    generator = torch.Generator().manual_seed(0)
    for count in (5, 12, 4):
        store.append(torch.randn(2, 3, count, 8, generator=generator))
        whole = store.read()
        assert whole is not None
        index = torch.randint(0, store.slots, (2, 3, 7), generator=generator)
        twin = torch.stack([torch.stack([whole[b, h, index[b, h]] for h in range(3)]) for b in range(2)])
        assert torch.equal(store.take(index), twin)


def test_attention_in_parts_is_attention() -> None:
    generator = torch.Generator().manual_seed(0)
    query, keys, values = (torch.randn(2, 4, count, 8, generator=generator) for count in (1, 30, 30))
    seen = torch.rand(2, 4, 1, 30, generator=generator) < 0.6
    seen[..., -1] = True
    seen[0, 0, 0, :10] = False  # a part of which nothing is seen
    spans = [slice(0, 10), slice(10, 13), slice(13, 30)]
    parts = [selection.part(query, keys[:, :, at], values[:, :, at], seen[..., at], 0.3) for at in spans]
    product = (query.double() @ keys.double().transpose(2, 3) * 0.3).masked_fill(~seen, -torch.inf)
    torch.testing.assert_close(selection.merged(parts), (product.softmax(-1) @ values.double()).float())


def test_places_are_where_a_mask_is_set() -> None:
    mask = torch.tensor([[0, 1, 0, 1, 1], [1, 0, 0, 0, 0], [0, 0, 0, 0, 0]], dtype=torch.bool)
    index, counts = selection.places(mask)
    assert [row[kept].tolist() for row, kept in zip(index, counts, strict=True)] == [[1, 3, 4], [0], []]


def test_an_earlier_choice_holds_while_queries_are_alike() -> None:
    layer = TokenSelectLayer(KvSpec(selector="token_select", select=2, sinks=1, recent=3, reuse=0.9))
    generator = torch.Generator().manual_seed(0)
    told = []
    layer.recall = Recall()
    first, other = torch.randn(2, 1, 2, 1, 4, generator=generator)
    for at in range(40):
        query = first if at < 20 else other
        keys = torch.randn(1, 1, 1, 4, generator=generator)
        layer.attend(torch.nn.Module(), query, *layer.update(keys, keys), None, 0.5)
        told.append((layer.choices - layer.reused, layer.choice.clone() if layer.asker is not None else None))
    assert told[5][0] == 0 and told[6][0] == 1  # one of the first, two chosen, the newest three with its own
    made = [at for at in range(1, 40) if told[at][0] > told[at - 1][0]]
    assert made == [*range(6, 20, 3), *range(20, 40, 3)]  # anew when the query turns, and every `recent` steps


def test_recall_is_the_share_of_the_true_top_keys() -> None:
    generator = torch.Generator().manual_seed(0)
    product = torch.randn(2, 3, 12, generator=generator) * 2
    candidates = torch.zeros(2, 12, dtype=torch.bool)
    candidates[0, 2:10] = True
    candidates[1, 2:4] = True  # no more than are chosen: it says nothing
    valid = torch.ones(2, 12, dtype=torch.bool)
    chosen = torch.rand(2, 3, 12, generator=generator) < 0.4
    chosen &= candidates[:, None]
    recall = Recall()
    recall.add(product, chosen, candidates, valid, 3)
    assert recall.heads == 3
    found, mass, covered = 0.0, 0.0, 0.0
    for head in range(3):
        shares = product[0, head].softmax(0).tolist()
        best = sorted(range(2, 10), key=lambda slot: -shares[slot])[:3]
        hits = [slot for slot in best if chosen[0, head, slot]]
        found += len(hits) / 3
        mass += sum(shares[slot] for slot in hits) / sum(shares[slot] for slot in best)
        covered += sum(shares[slot] for slot in range(12) if chosen[0, head, slot] or not 2 <= slot < 10)
    assert (recall.found, recall.mass, recall.covered) == pytest.approx((found / 3, mass / 3, covered / 3))
    assert recall.joined(recall).found == pytest.approx(recall.found)


def test_exact_search_finds_every_top_key_and_votes_find_some(model: Any, ids: Tensor) -> None:
    recalls = {}
    for name, settings in (("exact", EXACT), ("votes", TOKENS)):
        cache = cache_of(model, **settings, **FEW)
        cache.watch()
        through(model, cache, ids)
        recalls[name] = cache.recall
    assert recalls["exact"].found == 1 and recalls["exact"].mass == pytest.approx(1)
    assert 0.2 < recalls["votes"].found < 1 and recalls["votes"].heads == recalls["exact"].heads > 0


def test_keys_are_linked_through_queries() -> None:
    generator = torch.Generator().manual_seed(0)
    keys, queries = torch.randn(20, 4, generator=generator), torch.randn(30, 4, generator=generator)
    lists = nearest(queries, keys, 5)
    for query, found in zip(queries, lists, strict=True):
        assert found.tolist() == sorted(range(20), key=lambda key: -float(keys[key] @ query))[:5]
    counts = [dict[int, int]() for _ in range(20)]
    for first, *others in lists.tolist():
        for other in others:
            counts[first][other] = counts[first].get(other, 0) + 1
            counts[other][first] = counts[other].get(first, 0) + 1
    for key, row in enumerate(linked(lists, 20, 6)):
        best = sorted(counts[key], key=lambda other: (-counts[key][other], other))[:6]
        assert row.tolist() == best + [-1] * (6 - len(best))
    fresh, before = np.array([[3, -1, 5], [-1, -1, -1]]), np.array([[5, 1, 2, 3], [7, 8, -1, -1]])
    assert joined(fresh, before).tolist() == [[3, 5, 1, 2], [7, 8, -1, -1]]


def test_a_key_that_none_links_gets_a_link() -> None:
    links = np.array([[1, 2], [0, 2], [1, 0], [0, 1], [0, 1], [1, -1], [-1, -1], [2, 1]])
    found = reached(links)
    assert set(range(8)) - set(found[found >= 0].tolist()) == {6}  # which links none itself
    assert (links != found).sum() == 4


@pytest.fixture(scope="module")
def strangers() -> tuple[Tensor, Tensor, Tensor]:
    """Keys, and queries that are drawn otherwise: to link by, and to search for."""
    generator = torch.Generator().manual_seed(0)
    spread = torch.linspace(2, 0.2, 32)
    keys = torch.randn(3000, 32, generator=generator) * spread + torch.randn(32, generator=generator)
    queries = torch.randn(1200, 32, generator=generator) * spread.flip(0)
    return keys, queries[:1000], queries[1000:]


def share_found(index: KeyIndex, keys: Tensor, queries: Tensor) -> float:
    truth = nearest(queries, keys, 20)
    found = index.search(queries, 20).numpy()
    return float(np.mean([len(set(one) & set(other)) / 20 for one, other in zip(truth, found, strict=True)]))


def test_an_index_that_knows_the_queries_finds_more(strangers: tuple[Tensor, Tensor, Tensor]) -> None:
    pytest.importorskip("faiss")
    keys, known, asked = strangers
    plain = share_found(KeyIndex(keys, None, 8, 20), keys, asked)
    aware = share_found(KeyIndex(keys, known, 8, 20), keys, asked)
    assert plain + 0.02 < aware
    assert share_found(KeyIndex(keys, known, 8, 3000), keys, asked) > 0.97


def test_attention_by_an_index_is_near_that_by_exact_search(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("faiss")
    monkeypatch.setattr(retrieval, "LEAST", 64)
    generator = torch.Generator().manual_seed(0)
    spec = {"selector": "retrieval", "select": 16, "sinks": 2, "recent": 4}
    layers = {name: layer_of(KvSpec(**spec, index=name)) for name in ("exact", "hnsw", "linked")}  # type: ignore[arg-type]
    for step in range(120):
        count = 200 if step == 0 else 1
        query = torch.randn(2, 4, count, 16, generator=generator)
        keys, values = torch.randn(2, 2, 2, count, 16, generator=generator)
        outputs = {}
        for name, layer in layers.items():
            layer.recall = layer.recall or Recall()
            outputs[name] = layer.attend(torch.nn.Module(), query, *layer.update(keys, values), None, 0.25)
    for name in ("hnsw", "linked"):
        layer = layers[name]
        assert isinstance(layer, RetrievalLayer) and layer.recall is not None
        assert layer.recall.found > 0.97 and relative(outputs[name], outputs["exact"]) < 0.2
        assert layer.span[0] == 2 and layer.span[1] > 240  # built anew as tokens came
        assert layer.nbytes > layers["exact"].nbytes


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"selector": "tokenselect"}, "Did you mean 'token_select'"),
        ({"selector": "retrieval", "select": 4, "index": "hsnw"}, "Did you mean 'hnsw'"),
        ({"selector": "token_select"}, "select=0 is below 1"),
        ({"selector": "token_select", "select": 10, "page": 4}, "no multiple of page=4"),
        ({"selector": "token_select", "select": 8, "reuse": 1.5}, "cosine"),
        ({"selector": "token_select", "select": 8, "scorer": "h2o", "budget": 64}, "not both"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(UsageError, match=told):
        KvSpec(**settings)


@pytest.mark.parametrize(
    ("passes", "told"),
    [
        ("kv_evict(budget=600), kv_select", "both say which tokens are attended to"),
        ("kv_select, kv_select(keep=64)", "both say which tokens are attended to"),
        ("kv_select(effort=64)", "effort of by=retrieval, not of token_select"),
        ("kv_select(by=retrieval, index=exact, page=2, reuse=0.9)", "page, reuse of by=token_select"),
        ("kv_select(keep=30, page=8)", "no multiple of page=8"),
    ],
)
def test_a_recipe_that_cannot_be_is_refused_before_any_work(passes: str, told: str, source: Model) -> None:
    with pytest.raises(UsageError, match=told):
        Pipeline.parse(passes).run(source)


def test_without_the_library_the_extra_is_named(source: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise ImportError(f"No module named '{name}'")

    monkeypatch.setattr(extras, "import_module", missing)
    with pytest.raises(UnsupportedError, match=r"pip install 'compress\[retrieval\]'"):
        Pipeline.parse("kv_select(by=retrieval)").run(source)
    assert Pipeline.parse("kv_select(by=retrieval, index=exact)").run(source).model.kv


def test_the_recipe_says_how_each_layer_attends(source: Model) -> None:
    result = Pipeline(KvQuant(float_layers=(0,)), KvSelect(keep=64, reuse=0.9)).run(source)
    assert [spec.selects for spec in result.model.kv] == [True] * 3
    rows = result.passes[1].layers
    assert rows[0].format == "float keys, float values, 64 attended to by token_select"
    assert rows[1].format == "int8(token) keys, int8(token) values, 64 attended to by token_select"
    assert KvSpec.from_data(result.model.kv[1].as_data()) == result.model.kv[1]


def test_native_runs_it(source: Model, tmp_path: Path) -> None:
    result = Pipeline.parse("kv_select(keep=8, sinks=2, recent=4, chunk=16)").run(source)
    session = compress.export(result, profile=PROFILE, target="native", out=tmp_path / "out").session()
    assert session.chunk == 16 and [spec.selector for spec in session.caches] == ["token_select"] * 3
    ids = np.random.default_rng(0).integers(1, 256, (2, 40))
    _, notes = target.compare_graphs(session, session, ids, 1e-3, 128)
    assert "of the true top keys" in notes[-1] and "40 tokens" in notes[-1]
    _, notes = target.compare_graphs(session, session, ids[:, :12], 1e-3, 128)
    assert "leaves none out" in notes[-1]


@pytest.mark.parametrize("settings", [TOKENS, EXACT], ids=str)
def test_what_is_found_is_told_of_stores_with_static_scales_too(
    model: Any, ids: Tensor, settings: dict[str, Any]
) -> None:
    spec = KvSpec(keys="int8(tensor)", static=True, **settings, **FEW)
    tensors: tuple[dict[str, Tensor], ...] = ({"key_scale": torch.full((1, 1), 0.05)},) * 3
    found = TorchSession(model, 1, (spec,) * 3, tensors).recall(ids[:1].numpy())
    assert found.heads and 0 < found.found <= 1


@pytest.mark.parametrize("settings", [TOKENS, EXACT], ids=str)
def test_a_session_reads_and_generates_through_it(model: Any, ids: Tensor, settings: dict[str, Any]) -> None:
    session, tokens = TorchSession(model, 1, (KvSpec(**settings, **FEW, chunk=16),) * 3), ids[:1].numpy()
    plain, found = session.one_by_one(tokens), session.logits(tokens)
    np.testing.assert_allclose(plain[:, :10], found[:, :10], rtol=1e-4, atol=1e-5)
    assert np.abs(plain[:, 30:] - found[:, 30:]).max() > 1e-4
    expected = session.greedy(tokens[0].tolist(), 8)
    call = session.call(tokens[:, :1], 40)
    call()
    call()
    assert session.greedy(tokens[0].tolist(), 8) == expected


def test_a_graph_refuses_it_by_name(source: Model) -> None:
    from compress import hwprofiles, recipe

    with pytest.raises((UsageError, UnsupportedError), match="kv_select"):
        make_plan(source, recipe.of_passes("kv_select"), hwprofiles.load("cpu-x86-avx512-vnni"))
