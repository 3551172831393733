"""A compressed cache is the cache of transformers wherever nothing is lost, and loses just what its KvSpec says."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, LlamaForCausalLM

from compress.errors import UnsupportedError, UsageError
from compress.kv import scorers
from compress.kv.cache import KvCache
from compress.kv.layer import KvLayer
from compress.kv.spec import KvSpec, row_format
from compress.kv.stores import ChannelStore, RowStore, decode, encode

SCORERS: list[dict[str, Any]] = [
    {"scorer": "position"},
    {"scorer": "key_norm"},
    {"scorer": "h2o"},
    {"scorer": "h2o", "decay": 0.9},
    {"scorer": "h2o", "by_age": True},
    {"scorer": "tova"},
]
LENGTH = 48


@pytest.fixture(scope="module")
def model(llama: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32, attn_implementation="eager").eval()


@pytest.fixture(scope="module")
def ids() -> Tensor:
    """No token twice in a row: in the first layer its key would have the same norm again, but for rounding."""
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


def compressed(model: Any, ids: Tensor, chunk: int = 1, mask: Tensor | None = None, **settings: Any) -> Tensor:
    cache = KvCache.attach(model, [KvSpec(**settings)] * model.config.num_hidden_layers)
    try:
        return through(model, cache, ids, chunk, mask)
    finally:
        model.set_attn_implementation("eager")


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("chunk", [1, 7, LENGTH])
@pytest.mark.parametrize("settings", [{}, *SCORERS], ids=str)
def test_with_room_for_everything_logits_are_those_of_no_compression(
    model: Any, ids: Tensor, settings: dict[str, Any], chunk: int
) -> None:
    expected = through(model, DynamicCache(), ids, chunk)
    room = {"budget": LENGTH, "recent": 4} if settings else {}
    assert torch.equal(compressed(model, ids, chunk, **settings, **room), expected)


@pytest.mark.parametrize("settings", [{}, *SCORERS], ids=str)
def test_with_room_for_everything_the_pieces_of_a_prompt_do_not_matter(
    model: Any, ids: Tensor, settings: dict[str, Any]
) -> None:
    whole = through(model, DynamicCache(), ids, LENGTH)
    room = {"budget": LENGTH, "recent": 4} if settings else {}
    for chunk in (1, 5, 16):
        assert relative(compressed(model, ids, chunk, **settings, **room), whole) <= 1e-5


@pytest.mark.parametrize("settings", SCORERS, ids=str)
def test_with_room_for_everything_rounding_is_all_that_is_lost(
    model: Any, ids: Tensor, settings: dict[str, Any]
) -> None:
    rounding = {"keys": "int4(group=8)", "values": "int8(token)"}
    found = compressed(model, ids, 7, **rounding, **settings, budget=LENGTH, recent=4)
    assert torch.equal(found, compressed(model, ids, 7, **rounding))


@pytest.mark.parametrize("settings", SCORERS, ids=str)
def test_padded_rows_are_as_alone(model: Any, ids: Tensor, settings: dict[str, Any]) -> None:
    padding = [0, 5, 11, 20]
    mask = torch.ones_like(ids)
    for row, count in enumerate(padding):
        mask[row, :count] = 0
    for chunk in (1, 6):
        found = compressed(model, ids, chunk, mask, budget=16, sinks=2, recent=4, **settings)
        for row, count in enumerate(padding):
            aligned = chunk if chunk == 1 or count % chunk == 0 else 0
            if not aligned:  # chunks begin elsewhere in a row alone, so other tokens have been dropped by then
                continue
            alone = compressed(model, ids[row : row + 1, count:], chunk, budget=16, sinks=2, recent=4, **settings)
            assert relative(found[row : row + 1, count:], alone) < 1e-4


@pytest.mark.parametrize("settings", SCORERS, ids=str)
def test_what_is_dropped_is_what_a_mask_would_hide(model: Any, ids: Tensor, settings: dict[str, Any]) -> None:
    """A slow twin: the whole cache is kept, and every dropped token of every head masked by hand."""
    spec = KvSpec(budget=12, sinks=2, recent=3, **settings)
    layers = model.config.num_hidden_layers
    cache = KvCache.attach(model, [spec] * layers)
    found = through(model, cache, ids[:2], 1)
    model.set_attn_implementation("eager")
    kept = [{tuple(row) for row in layer.position.sort(-1).values.flatten(0, 1).tolist()} for layer in cache.layers]
    expected, twin = masked_twin(model, ids[:2], spec)
    assert kept == twin
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def masked_twin(model: Any, ids: Tensor, spec: KvSpec) -> tuple[Tensor, list[set[tuple[int, ...]]]]:
    """Token by token with plain tensors and Python lists; keys of all tokens stay, dropped ones get no weight."""
    config, blocks = model.config, model.model.layers
    heads, kv = config.num_attention_heads, config.num_key_value_heads
    batch, length = ids.shape
    groups, size = heads // kv, config.hidden_size // heads
    keys: list[list[Tensor]] = [[] for _ in blocks]
    values: list[list[Tensor]] = [[] for _ in blocks]
    alive = [[[list[int]() for _ in range(kv)] for _ in range(batch)] for _ in blocks]
    sums = [torch.zeros(batch, kv, length, dtype=torch.float32) for _ in blocks]
    logits = []
    for now in range(length):
        hidden = model.model.embed_tokens(ids[:, now : now + 1])
        cos, sin = model.model.rotary_emb(hidden, torch.full((1, 1), now))
        for at, block in enumerate(blocks):
            normed, attend = block.input_layernorm(hidden), block.self_attn
            q = rotated(attend.q_proj(normed).view(batch, 1, heads, size).transpose(1, 2), cos, sin)
            k = rotated(attend.k_proj(normed).view(batch, 1, kv, size).transpose(1, 2), cos, sin)
            keys[at].append(k)
            values[at].append(attend.v_proj(normed).view(batch, 1, kv, size).transpose(1, 2))
            out = torch.zeros(batch, heads, size)
            weights = torch.zeros(batch, heads, now + 1)
            for row in range(batch):
                for head in range(heads):
                    seen = [*alive[at][row][head // groups], now]
                    near = torch.stack([keys[at][j][row, head // groups, 0] for j in seen])
                    share = (near @ q[row, head, 0] / size**0.5).softmax(0)
                    weights[row, head, seen] = share
                    out[row, head] = share @ torch.stack([values[at][j][row, head // groups, 0] for j in seen])
            for row in range(batch):
                for head in range(kv):
                    mine = weights[row, head * groups : (head + 1) * groups].sum(0)
                    if spec.scorer == "h2o":
                        sums[at][row, head] *= spec.decay
                        sums[at][row, head, : now + 1] += mine
                    if spec.scorer == "tova":
                        sums[at][row, head, : now + 1] = weights[row].mean(0)
                    if spec.scorer == "key_norm":
                        sums[at][row, head, now] = -keys[at][now][row, head, 0].norm()
                    if spec.scorer == "position":
                        sums[at][row, head, now] = now
                    held = [*alive[at][row][head], now]
                    if len(held) > spec.budget:
                        free = [j for j in held if spec.sinks <= j <= now - spec.recent]
                        age = {j: now - j + 1 if spec.by_age else 1 for j in free}
                        held.remove(min(free, key=lambda j: float(sums[at][row, head, j]) / age[j]))
                    alive[at][row][head] = held
            hidden = hidden + attend.o_proj(out.reshape(batch, 1, -1))
            hidden = hidden + block.mlp(block.post_attention_layernorm(hidden))
        logits.append(model.lm_head(model.model.norm(hidden)))
    return torch.cat(logits, 1), [{tuple(each) for row in layer for each in row} for layer in alive]


def rotated(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = states.shape[-1] // 2
    turned = torch.cat([-states[..., half:], states[..., :half]], -1)
    return states * cos[:, None] + turned * sin[:, None]


@pytest.mark.parametrize("settings", [{"scorer": "h2o"}, {"scorer": "key_norm", "keys": "int8(token)"}], ids=str)
def test_the_cache_holds_no_more_than_its_budget(model: Any, ids: Tensor, settings: dict[str, Any]) -> None:
    spec = KvSpec(budget=16, sinks=2, recent=4, **settings)
    cache = KvCache.attach(model, [spec] * model.config.num_hidden_layers)
    sizes = []
    for at in range(0, LENGTH, 8):
        through(model, cache, ids[:, at : at + 8])
        sizes.append(cache.nbytes)
    model.set_attn_implementation("eager")
    assert sizes[0] < sizes[1] and len(set(sizes[1:])) == 1
    assert all(layer.score.shape[2] == 16 for layer in cache.layers)
    assert cache.get_seq_length() == LENGTH


def test_bytes_are_those_of_the_tensors_held(model: Any, ids: Tensor) -> None:
    layers, kv, size = model.config.num_hidden_layers, model.config.num_key_value_heads, 16
    for text, per_vector in (("", 4 * size), ("int8(token)", size + 2), ("int4(group=8)", size // 2 + 2 * size // 8)):
        cache = KvCache.attach(model, [KvSpec(keys=text, values=text)] * layers)
        through(model, cache, ids)
        assert cache.nbytes == 2 * layers * kv * len(ids) * LENGTH * per_vector, text
    model.set_attn_implementation("eager")


@pytest.mark.parametrize("text", ["int8(token)", "int4(group=8)", "int4(group=8, asymmetric)", "fp8_e4m3(token)"])
def test_a_stored_vector_is_rounded_as_its_format_says_whatever_came_with_it(text: str) -> None:
    form = row_format(text)
    states = torch.randn(2, 3, 5, 16, generator=torch.Generator().manual_seed(1))
    store = RowStore(form)
    for at in range(5):
        store.append(states[:, :, at : at + 1])
    whole = decode(form, encode(form, states), 16)
    found = store.read()
    assert found is not None and torch.equal(found, whole)
    assert relative(found, states) < (0.2 if "4(" in text else 0.05)


def test_quantized_caches_lose_little_and_more_with_fewer_bits(model: Any, ids: Tensor) -> None:
    expected = through(model, DynamicCache(), ids, 8)
    errors = {
        text: relative(compressed(model, ids, 8, keys=text, values=text), expected)
        for text in ("int8(token)", "int4(group=8)", "int2(group=8, float_zero)")
    }
    assert 0 < errors["int8(token)"] < 0.1
    assert sorted(errors, key=lambda text: errors[text]) == list(errors)


def test_quantized_and_dropping_with_room_is_quantized_only(model: Any, ids: Tensor) -> None:
    quantized = {"keys": "int8(token)", "values": "int4(group=8)"}
    expected = compressed(model, ids, 4, **quantized)
    assert torch.equal(compressed(model, ids, 4, scorer="key_norm", budget=LENGTH, recent=4, **quantized), expected)


def test_keys_by_channel_are_rounded_over_runs_of_tokens_and_the_newest_stay() -> None:
    form = row_format("int4(group=4, float_zero)")
    states = torch.randn(2, 3, 22, 8, generator=torch.Generator().manual_seed(2))
    store = ChannelStore(form, 8)  # type: ignore[arg-type]
    for at in range(0, 22, 2):
        store.append(states[:, :, at : at + 2])
    found = store.read()
    assert found is not None and found.shape == states.shape
    assert torch.equal(found[:, :, 16:], states[:, :, 16:])
    for run in range(4):
        span = slice(4 * run, 4 * run + 4)
        rows = states[:, :, span].transpose(2, 3)
        twin = decode(form, encode(form, rows), 4).transpose(2, 3)
        assert torch.equal(found[:, :, span], twin)


def test_a_residual_window_stays_in_float(model: Any, ids: Tensor) -> None:
    expected = through(model, DynamicCache(), ids, 4)
    settings = {"keys": "int2(group=8, float_zero)", "values": "int2(group=8, float_zero)"}
    kivi = compressed(model, ids, 4, keys_by="channel", residual=LENGTH, **settings)
    whole = relative(kivi[:, :-4], expected[:, :-4])
    assert whole == 0
    assert relative(compressed(model, ids, 4, keys_by="channel", residual=16, **settings), expected) > 0


def test_generation_runs_twice_alike(model: Any, ids: Tensor) -> None:
    specs = [KvSpec(scorer="h2o", budget=16, sinks=2, recent=4)] * model.config.num_hidden_layers
    found = []
    for _ in range(2):
        cache = KvCache.attach(model, specs)
        found.append(model.generate(ids[:2, :24], past_key_values=cache, max_new_tokens=12, do_sample=False))
        assert cache.get_seq_length() == 24 + 11
    with pytest.raises(UsageError, match="num_beams=1"):
        cache = KvCache.attach(model, specs)
        model.generate(ids[:1, :24], past_key_values=cache, max_new_tokens=4, do_sample=False, num_beams=2)
    model.set_attn_implementation("eager")
    assert torch.equal(found[0], found[1])


def test_a_second_turn_goes_on_where_the_first_ended(model: Any, ids: Tensor) -> None:
    settings = {"scorer": "key_norm", "budget": 16, "sinks": 2, "recent": 4}
    specs = [KvSpec(**settings)] * model.config.num_hidden_layers
    cache = KvCache.attach(model, specs)
    with torch.no_grad():
        first = [model(ids[:, at : at + 12], past_key_values=cache).logits for at in (0, 12)]
        second = [model(ids[:, at : at + 12], past_key_values=cache).logits for at in (24, 36)]
    model.set_attn_implementation("eager")
    assert torch.equal(torch.cat(first + second, 1), compressed(model, ids, 12, **settings))


def test_a_long_prompt_is_read_in_pieces_within_the_budget(model: Any, ids: Tensor) -> None:
    cache = KvCache.attach(model, [KvSpec(scorer="key_norm", budget=16, sinks=2, recent=4)] * 3)
    peaks = []
    for at in range(0, LENGTH, 8):
        through(model, cache, ids[:, at : at + 8], 8)
        peaks.append(max(layer.score.shape[2] for layer in cache.layers))
    model.set_attn_implementation("eager")
    assert max(peaks) == 16


def test_h2o_sums_the_probabilities_of_a_group() -> None:
    generator = torch.Generator().manual_seed(3)
    probabilities = torch.rand(2, 4, 3, 6, generator=generator)
    asked = torch.tensor([[True, True, True], [False, True, True]])
    for decay in (1.0, 0.5):
        spec = KvSpec(scorer="h2o", budget=99, decay=decay)
        found = scorers.read(spec, torch.ones(2, 2, 6), probabilities, asked)
        twin = torch.ones(2, 2, 6)
        for row in range(2):
            for query in range(3):
                if asked[row, query]:
                    twin[row] *= decay
                    for head in range(4):
                        twin[row, head // 2] += probabilities[row, head, query]
        torch.testing.assert_close(found, twin)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"scorer": "key_norm", "budget": 36}, "at least 37"),
        ({"scorer": "keynorm", "budget": 64}, "Did you mean 'key_norm'"),
        ({"scorer": "h2o", "budget": 64, "recent": 0}, "newest token must be kept"),
        ({"scorer": "h2o", "budget": 64, "decay": 0}, "not in"),
        ({"sinks": -1}, "below 0"),
        ({"keys": "int8(tensor)"}, "come one by one"),
        ({"keys": "int9(token)"}, "int9"),
        ({"keys": "int8(token)", "keys_by": "channel"}, "tokens that share a scale"),
        ({"keys": "int4(group=32)", "keys_by": "channel", "residual": 40}, "multiple of 32"),
        ({"keys": "int4(group=32)", "residual": 32, "scorer": "h2o", "budget": 64}, "cannot be dropped"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(UsageError, match=told):
        KvSpec(**settings)


def test_a_spec_is_what_its_data_say() -> None:
    spec = KvSpec(keys="int8(token)", scorer="h2o", budget=64, decay=0.9)
    assert spec.as_data() == {"keys": "int8(token)", "scorer": "h2o", "budget": 64, "decay": 0.9}
    assert KvSpec.from_data(spec.as_data()) == spec


def test_a_model_with_windows_is_refused() -> None:
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    model = LlamaForCausalLM(config).eval()
    model.config.layer_types = ["sliding_attention"]
    with pytest.raises(UnsupportedError, match="sliding_attention"):
        KvCache.attach(model, [KvSpec()])


def test_without_its_own_attention_it_says_so(model: Any, ids: Tensor) -> None:
    cache = KvCache.attach(model, [KvSpec()] * 3)
    model.set_attn_implementation("eager")
    with pytest.raises(UsageError, match="does not use"):
        through(model, cache, ids, 24)


@pytest.mark.parametrize("scorer", ["position", "key_norm", "h2o", "tova"])
def test_all_that_is_held_is_where_the_model_is(scorer: Any) -> None:
    layer = KvLayer(KvSpec(scorer=scorer, budget=8, sinks=1, recent=2))
    for count in (6, 7):
        keys = torch.zeros(2, 2, count, 4, device="meta")
        found, _ = layer.update(keys, keys)
        asked = layer.asked(None)
        seen = layer.visible(asked)
        probabilities = torch.zeros(2, 4, count, found.shape[2], device="meta")
        layer.commit(asked, probabilities if layer.spec.reads else None)
        held = (found, seen, layer.score, layer.position, layer.valid, layer.count)
        assert {tensor.device.type for tensor in held} == {"meta"}
    assert layer.stores[0].slots == 8


def test_rows_of_a_batch_leave_the_number_of_tokens_as_it_is() -> None:
    store = ChannelStore(row_format("int4(group=4, float_zero)"), 8)  # type: ignore[arg-type]
    store.append(torch.randn(3, 2, 12, 8, generator=torch.Generator().manual_seed(0)))
    before = store.read()
    store.rows(torch.tensor([2, 0]))
    found = store.read()
    assert found is not None and before is not None and torch.equal(found, before[[2, 0]])
    store.append(torch.zeros(2, 2, 1, 8))
    assert store.slots == 13 and store.older.slots == 8
