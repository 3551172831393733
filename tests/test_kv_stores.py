"""What a cache stores: static scales that data gave, small floats, tables after a rotation; layers spared by error."""

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    GlmConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    PhiConfig,
)

import compress
from compress import hwprofiles
from compress.errors import InputError, UsageError
from compress.export.onnx import slots
from compress.inputs.datasets import Calibration, calibrate
from compress.kv import calibrating, rotary
from compress.kv.cache import KvCache
from compress.kv.calibrating import BINS, Lost, Magnitudes, Ranges
from compress.kv.observed import Attended, attention_of, use_seen, watching
from compress.kv.spec import KvSpec
from compress.kv.static import scale_shape, static_format
from compress.kv.stores import RowStore, SlotStore, StaticStore, turn
from compress.kv.storing import store_of
from compress.maths.tables import fixed
from compress.models.model import Model
from compress.passes import KvQuant
from compress.pipeline import Pipeline

STATIC = [
    f"{name}({shared})"
    for name in ("int8", "int4", "int3", "fp8_e4m3", "fp8_e5m2")
    for shared in ("channel", "head", "tensor")
]
HEADS, SIZE = 2, 6


def states(count: int = 9, seed: int = 0, heads: int = HEADS, size: int = SIZE) -> Tensor:
    maker = torch.Generator().manual_seed(seed)
    return torch.randn(2, heads, count, size, generator=maker) * torch.linspace(0.5, 4, size)


def scale_of(text: str) -> Tensor:
    """Too small for the largest values, so that they are cut off."""
    shape = scale_shape(static_format(text), HEADS, SIZE)
    most = {"int8": 127, "int4": 7, "int3": 3, "fp8_e4m3": 448, "fp8_e5m2": 57344}[text.partition("(")[0]]
    return (torch.rand(shape, generator=torch.Generator().manual_seed(1)) + 1) / most


def small_floats(exponent: int, mantissa: int) -> list[float]:
    """All magnitudes of E4M3 (its last code is NaN) or E5M2 (its last exponent is for infinity and NaN), by hand."""
    bias = 2 ** (exponent - 1) - 1
    found = [part * 2.0 ** (1 - bias - mantissa) for part in range(2**mantissa)]
    for field in range(1, 2**exponent):
        found += [(1 + part / 2**mantissa) * 2.0 ** (field - bias) for part in range(2**mantissa)]
    return found[:-1] if mantissa == 3 else found[: -(2**mantissa)]


def rounded_twin(value: float, scale: float, name: str) -> list[float]:
    """The nearest code's value, in float64; both where a value is in the middle of two."""
    if name.startswith("int"):
        half = 2 ** (int(name[3:]) - 1)
        points = [code * scale for code in range(-half, half)]
    else:
        points = [sign * each * scale for each in small_floats(*map(int, name[5::2])) for sign in (1, -1)]
    least = min(abs(value - point) for point in points)
    return [point for point in points if abs(value - point) <= least * (1 + 1e-5) + 1e-12]


@pytest.mark.parametrize("text", STATIC)
def test_static_codes_are_the_nearest_and_what_lies_beyond_becomes_the_end(text: str) -> None:
    """Beyond FP8's largest a cast would give NaN."""
    given, scale = states(), scale_of(text)
    store = StaticStore(static_format(text), scale)
    store.append(given[:, :, :4])
    store.append(given[:, :, 4:])
    found = store.read()
    assert found is not None
    wide = scale.expand(HEADS, SIZE)
    beyond = 0
    for batch, head, token, channel in np.ndindex(*given.shape):
        value, step = float(given[batch, head, token, channel]), float(wide[head, channel])
        points = rounded_twin(value, step, text.partition("(")[0])
        assert any(math.isclose(float(found[batch, head, token, channel]), point, rel_tol=1e-5) for point in points)
        beyond += abs(value) > 2
    assert beyond > 5


def test_static_codes_are_the_bytes_of_group_query_attention() -> None:
    """q + 8, the even channel in the low half; 8 bits use −128 too."""
    given = torch.tensor([[-9.0, 7.4, 0.0, -8.0, 20.0, 1.0]]).reshape(1, 1, 1, 6)
    store = StaticStore(static_format("int4(tensor)"), torch.ones(1, 1))
    store.append(given)
    assert store.held["codes"].flatten().tolist() == [0x0 | 0xF << 4, 0x8 | 0x0 << 4, 0xF | 0x9 << 4]
    store = StaticStore(static_format("int8(tensor)"), torch.full((1, 1), 1 / 16))
    store.append(given)
    assert (store.held["codes"].flatten().int() - 128).tolist() == [-128, 118, 0, -128, 127, 16]


@pytest.mark.parametrize(
    ("spec", "tensors"),
    [
        (KvSpec(keys="int8(channel)", static=True), {"key_scale": scale_of("int8(channel)")}),
        (KvSpec(keys="fp8_e4m3(head)", static=True), {"key_scale": scale_of("fp8_e4m3(head)")}),
        (KvSpec(keys="fp8_e4m3(token)"), {}),
        (KvSpec(keys="nf4", rotated=True), {}),
    ],
    ids=lambda each: each.told() if isinstance(each, KvSpec) else "",
)
def test_single_tokens_are_overwritten_dropped_and_kept_by_row(spec: KvSpec, tensors: Mapping[str, Tensor]) -> None:
    """A token's codes hang on nothing that came with it."""
    given, other = states(), states(1, seed=1)
    store = store_of(spec, "key", tensors)
    assert isinstance(store, SlotStore)
    store.append(given)
    read = store.read()
    assert read is not None
    alone = store_of(spec, "key", tensors)
    alone.append(other)
    new = alone.read()
    assert new is not None
    torch.testing.assert_close(store.take(torch.tensor([7, 2]).expand(2, HEADS, 2)), read[:, :, [7, 2]])
    store.replace(torch.full((2, HEADS, 1), 3), other)
    store.keep(torch.tensor([1, 3, 8]).expand(2, HEADS, 3))
    store.rows(torch.tensor([1]))
    found = store.read()
    assert found is not None and store.slots == 3
    torch.testing.assert_close(found, torch.stack([read[1:, :, 1], new[1:, :, 0], read[1:, :, 8]], 2))


def test_bytes_are_codes_and_the_scales_once() -> None:
    for text, bits in (("int8(channel)", 8), ("int4(channel)", 4), ("fp8_e4m3(head)", 8)):
        store = StaticStore(static_format(text), scale_of(text))
        store.append(states(10))
        store.append(states(5))
        assert store.nbytes == 2 * HEADS * 15 * SIZE * bits // 8 + scale_of(text).numel() * 4


def test_scales_of_another_model_are_refused() -> None:
    store = StaticStore(static_format("int8(channel)"), torch.ones(HEADS, SIZE))
    with pytest.raises(InputError, match=r"are \[2, 6\], and 3 heads of 6 take \[3, 6\]"):
        store.append(states(heads=3))


@pytest.mark.parametrize("text", ["fp8_e4m3(token)", "nf4", "nf4(group=4)", "fp4(group=8)"])
def test_a_vector_has_scales_of_its_own(text: str) -> None:
    """Against each vector rounded by hand: small floats by its largest magnitude, tables by that of each block."""
    given = states(size=8)
    store = store_of(KvSpec(keys=text), "key", {})
    store.append(given)
    found = store.read()
    assert found is not None
    name, group = text.partition("(")[0], 4 if "group=4" in text else 8
    for place in np.ndindex(2, HEADS, 9, 8 // group):
        run = slice(place[3] * group, (place[3] + 1) * group)
        block, got = given[place[:3]][run].double(), found[place[:3]][run]
        most = float(block.abs().max())
        for value, each in zip(block.tolist(), got.tolist(), strict=True):
            if name.startswith("fp8"):
                points = rounded_twin(value, most / 448, name)
            else:
                points = [min((float(entry) * most for entry in fixed(name)), key=lambda p, v=value: abs(p - v))]  # type: ignore[misc]
            assert any(math.isclose(each, point, rel_tol=1e-4, abs_tol=1e-6) for point in points)


@pytest.mark.parametrize("size", [8, 64, 48, 20, 6])
def test_rotated_vectors_are_stored_as_those_turned_by_hand(size: int) -> None:
    """Where no Hadamard matrix of the size is known, another orthogonal one stands for it."""
    given, matrix = states(size=size), turn(size).double()
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(size).double(), atol=1e-6, rtol=0)
    if size != 6:
        torch.testing.assert_close(matrix.abs(), torch.full((size, size), size**-0.5).double())
    store = store_of(KvSpec(keys="nf4", rotated=True), "key", {})
    by_hand = store_of(KvSpec(keys="nf4"), "key", {})
    store.append(given)
    by_hand.append((given.double() @ matrix).float())
    found, turned = store.read(), by_hand.read()
    assert found is not None and turned is not None
    off = (found.double() - turned.double() @ matrix.T).norm() / found.double().norm()
    assert float(off) < 0.01  # values between two codes may become either


def test_rotated_tables_lose_less_on_channels_that_stand_out() -> None:
    given = states(64, size=64).clamp(-2, 2)
    given[..., [5, 40]] *= 20
    small = [channel for channel in range(64) if channel not in (5, 40)]
    errors = []
    for rotated in (False, True):
        store = RowStore(store_of(KvSpec(keys="nf4"), "key", {}).form, rotated)  # type: ignore[attr-defined]
        store.append(given)
        read = store.read()
        assert read is not None
        errors.append(float((read - given)[..., small].norm() / given[..., small].norm()))
    assert errors[1] < 0.6 * errors[0]


def attended(config: Any, count: int, first: int = 0, layer: int = -1, seed: int = 0, **plant: float) -> Attended:
    """One window of a random model at positions from `first` on. plant: by how much channels of the keys stand out."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).eval()
    use_seen(model)
    inner = model.base_model
    blocks = inner.layers if hasattr(inner, "layers") else inner.h
    attention = attention_of(blocks[layer])
    with torch.no_grad(), watching(attention) as seen:
        for channel, size in plant.items():
            attention.k_proj.bias[int(channel[1:])] = size  # type: ignore[index,operator,union-attr]
        ids = torch.randint(1, 30, (2, count), generator=torch.Generator().manual_seed(first))
        model(input_ids=ids, position_ids=torch.arange(first, first + count)[None], use_cache=False)
    return seen[0]


SMALL = {"vocab_size": 32, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
USUAL = {**SMALL, "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 32}


@pytest.mark.parametrize(
    ("config", "pairs"),
    [
        (LlamaConfig(**USUAL, num_key_value_heads=2), [*range(8, 16), *range(8)]),
        (CohereConfig(**USUAL, num_key_value_heads=2), [channel ^ 1 for channel in range(16)]),
        (PhiConfig(**USUAL, partial_rotary_factor=0.5), [4, 5, 6, 7, 0, 1, 2, 3, *range(8, 16)]),
        (GPTNeoXConfig(**USUAL, rotary_pct=0.5), [4, 5, 6, 7, 0, 1, 2, 3, *range(8, 16)]),
        (GlmConfig(**USUAL, head_dim=16, partial_rotary_factor=0.5), [1, 0, 3, 2, 5, 4, 7, 6, *range(8, 16)]),
        (GPT2Config(**SMALL, n_embd=64, n_layer=1, n_head=4), list(range(16))),
    ],
    ids=lambda each: type(each).__name__ if not isinstance(each, list) else "",
)
def test_channels_that_are_rotated_together_are_found(config: Any, pairs: list[int]) -> None:
    assert rotary.partners(attended(config, 24)).tolist() == pairs


def test_the_length_of_a_slow_pair_holds_at_positions_that_calibration_never_saw() -> None:
    """A channel that stands out has turned into its partner by then; short windows never showed that one's range."""
    config = LlamaConfig(**USUAL, num_key_value_heads=2, attention_bias=True, rope_theta=50_000.0)
    config.rope_parameters = {"rope_type": "default", "rope_theta": 50_000.0}
    near = attended(config, 32, k6=8.0, k22=8.0)
    far = attended(config, 32, first=5_000, k6=8.0, k22=8.0)
    spec = KvSpec(keys="int8(channel)", values="int8(channel)", static=True)
    errors = {}
    for envelope in (True, False):
        scales = calibrating.scales(spec, [near], Ranges("minmax", envelope=envelope))
        errors[envelope] = calibrating.lost(spec, scales, [far])
        assert calibrating.lost(spec, scales, [near]).keys < 0.02
    assert errors[False].keys > 50 * errors[True].keys
    assert errors[False].output > errors[True].output
    assert errors[True].keys < 0.02


def counted(text: str, given: Tensor, pairs: Tensor | None = None) -> Magnitudes:
    found = Magnitudes(static_format(text), pairs)
    for part in given.split(50, 2):
        found.reach(part)
    for part in given.split(50, 2):
        found.count(part)
    return found


@pytest.mark.parametrize("text", ["int8(channel)", "int4(head)", "fp8_e4m3(tensor)"])
def test_ranges_hold_the_largest_or_so_many_percent_of_what_shares_a_scale(text: str) -> None:
    given = states(500)
    found = counted(text, given)
    most = {"int8": 127, "int4": 7, "fp8": 448}[text[:4].strip("(_")]
    rows = given.abs().permute(1, 3, 0, 2).reshape(HEADS, SIZE, -1)
    rows = {"channel": rows, "head": rows.reshape(HEADS, 1, -1)}.get(
        text[:-1].partition("(")[2], rows.reshape(1, 1, -1)
    )
    torch.testing.assert_close(found.scale(Ranges("minmax")), rows.amax(-1) / most)
    quantile = found.scale(Ranges("percentile", 99.0)) * most
    peak = rows.amax(-1)
    assert bool(((quantile - rows.quantile(0.99, -1)).abs() <= 0.01 * peak).all())


@pytest.mark.parametrize("text", ["int4(channel)", "int3(head)", "int8(tensor)"])
def test_the_range_of_least_error_is_that_of_the_store_itself(text: str) -> None:
    """Against every share of the peak tried on the values by the store."""
    given = states(500)
    peak = counted(text, given).scale(Ranges("minmax"))
    losses = []
    for share in calibrating.SHARES:
        store = StaticStore(static_format(text), peak * share)
        store.append(given)
        read = store.read()
        assert read is not None
        each = (read - given).square().permute(1, 3, 0, 2).reshape(HEADS, SIZE, -1).sum(-1)
        losses.append(each if peak.shape[1] > 1 else each.sum(1, keepdim=True))
    tried = torch.stack(losses)
    tried = tried.sum((1, 2), keepdim=True) if peak.numel() == 1 else tried
    found = (counted(text, given).scale(Ranges("mse")) / peak * 100).round().long()
    got = tried.gather(0, (100 - found)[None])[0]
    assert bool((got <= 1.03 * tried.amin(0)).all())


def test_a_turning_pair_is_judged_at_all_its_phases() -> None:
    """The spread of a length over phases, against drawn ones."""
    spread = calibrating._phases()
    torch.testing.assert_close(spread.sum(1), torch.ones(BINS, dtype=torch.float64))
    phases = torch.rand(400_000, generator=torch.Generator().manual_seed(0)).double() * 2 * torch.pi
    drawn = torch.histc((800.5 * phases.cos().abs()).float(), BINS, 0, BINS).double() / len(phases)
    torch.testing.assert_close(spread[800].cumsum(0), drawn.cumsum(0), atol=3e-3, rtol=0)


def test_values_that_are_no_numbers_are_told() -> None:
    with pytest.raises(InputError, match="NaN or infinite keys or values"):
        counted("int8(channel)", torch.full((1, 1, 4, 2), torch.nan))


def test_what_a_store_loses_is_the_error_of_attention_over_what_it_gives_back() -> None:
    seen = attended(LlamaConfig(**USUAL, num_key_value_heads=2), 40)
    spec = KvSpec(keys="int4(token)", values="int4(group=8)")
    parts = []
    for part, given in (("key", seen.key), ("value", seen.value)):
        store = store_of(spec, part, {})  # type: ignore[arg-type]
        store.append(given)
        read = store.read()
        assert read is not None
        parts.append(read)

    def attend(key: Tensor, value: Tensor) -> Tensor:
        twice = (each.double().repeat_interleave(2, 1) for each in (key, value))
        return torch.nn.functional.scaled_dot_product_attention(seen.query.double(), *twice, is_causal=True)

    exact, rounded = attend(seen.key, seen.value), attend(parts[0], parts[1])
    found = calibrating.lost(spec, {}, [seen])
    assert found.output == pytest.approx(float((rounded - exact).norm() / exact.norm()), rel=1e-4)
    assert found.keys == pytest.approx(float((parts[0] - seen.key).norm() / seen.key.norm()), rel=1e-4)


@pytest.fixture(scope="module")
def model(llama: Path) -> Model:
    return compress.load(llama)


@pytest.fixture(scope="module")
def data(model: Model, text_file: Path) -> Calibration:
    return calibrate(model, text_file, samples=4, length=48)


BOTH = "keys=int8(channel), values=int8(channel), static"


def test_a_pass_calibrates_every_layer_and_native_runs_it(model: Model, data: Calibration, tmp_path: Path) -> None:
    result = Pipeline.parse(f"kv_quant({BOTH}=percentile, float_layers=[0])").run(
        model, data, folder=tmp_path / "model"
    )
    heads, size = 2, result.model.kv_tensors[1]["key_scale"].shape[1]
    assert [sorted(held) for held in result.model.kv_tensors] == [
        [],
        ["key_scale", "value_scale"],
        ["key_scale", "value_scale"],
    ]
    assert result.model.kv_tensors[1]["value_scale"].shape == (heads, size)
    rows = result.passes[0].layers
    assert (
        rows[0].notes == () and "int8(channel) keys and int8(channel) values, on calibration data" in rows[1].notes[0]
    )
    artifact = compress.export(result, profile="cpu-x86-avx2", target="native", out=tmp_path / "out")
    session = artifact.session()
    ids = np.random.default_rng(0).integers(1, 256, (1, 24))
    plain, through = session.plain.logits(ids), session.logits(ids)
    off = np.linalg.norm(plain - through) / np.linalg.norm(plain)
    assert 1e-5 < off < 0.05


def test_padded_rows_and_dropped_tokens_are_as_alone(llama: Path, model: Model, data: Calibration) -> None:
    result = Pipeline.parse(f"kv_quant({BOTH}=mse), kv_evict(budget=12, sinks=2, recent=4, by=key_norm)").run(
        model, data
    )
    module = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32).eval()
    ids = torch.stack([torch.randperm(255, generator=torch.Generator().manual_seed(each))[:20] + 1 for each in (0, 1)])
    mask = torch.ones_like(ids)
    mask[1, :7] = 0

    @torch.no_grad()
    def through(ids: Tensor, mask: Tensor) -> Tensor:
        cache, found = KvCache.attach(module, result.model.kv, result.model.kv_tensors), []
        for at in range(ids.shape[1]):
            seen = mask[:, : at + 1]
            places = (seen.cumsum(1) - 1).clamp(min=0)[:, at:]
            more = {"attention_mask": seen, "position_ids": places, "past_key_values": cache}
            found.append(module(ids[:, at : at + 1], **more).logits)
        held = cache.layers[0].stores[0]
        assert isinstance(held, StaticStore) and held.slots == 12
        return torch.cat(found, 1)

    together, alone = through(ids, mask), through(ids[1:, 7:], mask[1:, 7:])
    torch.testing.assert_close(together[1:, 7:], alone, rtol=1e-3, atol=1e-4)


def test_the_layers_with_the_largest_errors_are_spared(model: Model, data: Calibration) -> None:
    result = Pipeline.parse("kv_quant(keys=int2(token), values=int2(token), sensitive=1, fallback=int8(token))").run(
        model, data
    )
    rows = result.passes[0].layers
    errors = [float(row.notes[0].rpartition(" ")[2].rstrip("%")) for row in rows]
    worst = errors.index(max(errors))
    kept = [spec.keys for spec in result.model.kv]
    assert kept == ["int8(token)" if layer == worst else "int2(token)" for layer in range(3)]
    assert "stored otherwise: of 3 layers the error of its outputs is number 1" in rows[worst].notes[1]


def test_spared_layers_leave_their_scales_behind_and_keep_what_others_say() -> None:
    item = KvQuant.build({"keys": "int8(channel)", "values": None, "static": "minmax", "sensitive": 1})
    specs = [item.fill(KvSpec(scorer="h2o", budget=64), layer) for layer in range(2)]
    found = [{"key_scale": torch.ones(2, 4), "lost": Lost(0.1, 0.0, output).as_tensor()} for output in (0.25, 0.125)]
    spared, other = item.conclude(specs, found)
    assert spared.spec == KvSpec(scorer="h2o", budget=64) and not spared.tensors
    assert other.spec == replace(specs[1]) and list(other.tensors) == ["key_scale"]
    assert spared.notes[0].endswith("the attention's outputs by 25.00%")


def test_a_float_layer_stays_so_where_a_later_pass_numbers_layers_anew(model: Model, data: Calibration) -> None:
    text = "kv_quant(keys=int8(head), values=int8(head), static=minmax, float_layers=[1]), drop_blocks(blocks=[0])"
    result = Pipeline.parse(text).run(model, data)
    assert [spec.is_plain for spec in result.model.kv] == [True, False]
    assert [sorted(held) for held in result.model.kv_tensors] == [[], ["key_scale", "value_scale"]]


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("rtn(bits=8)", [0, 1, 2]),
        ("drop_blocks(blocks=[1])", [0, 2]),
        ("kv_evict(budget=64, by=kvzap, labels=attention, sinks=2, recent=4)", [0, 1, 2]),
        ("kv_quant", []),
    ],
)
def test_what_data_settled_stays_in_a_model_that_is_compressed_again(
    text: str, kept: list[int], model: Model, data: Calibration
) -> None:
    first = Pipeline.parse("kv_quant(keys=int8(channel), values=int8(channel), static=minmax)").run(model, data).model
    again = Pipeline.parse(text).run(first, data).model
    assert [set(held) for held in again.kv_tensors] == [set(spec.wants) for spec in again.kv]
    for held, layer in zip(again.kv_tensors, kept, strict=False):
        assert all(torch.equal(held[name], tensor) for name, tensor in first.kv_tensors[layer].items())


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("kv_quant(keys=int8(channel))", r"come one by one\. Let data give it"),
        ("kv_quant(static=mse)", "these formats have none"),
        ("kv_quant(keys=int8(channel, asymmetric), static=mse)", "static scales of a cache are symmetric"),
        ("kv_quant(keys=nvfp4, static=mse)", "Take int8"),
        ("kv_quant(percentile=99.9)", "percentile does nothing without static=percentile"),
        (f"kv_quant({BOTH}=mse, percentile=99.9)", "percentile does nothing without static=percentile"),
        ("kv_quant(envelope=false)", "envelope does nothing without static"),
        (f"kv_quant({BOTH}=mse, rotated=true)", "do not go with it"),
        ("kv_quant(keys=int2(group=16), keys_by=channel, residual=16, rotated=true)", "do not go with it"),
        ("kv_quant(fallback=int8(token))", "fallback does nothing without sensitive"),
        ("kv_quant(sensitive=1, fallback=int8(channel))", "is not by token"),
        ("kv_quant(sensitive=3)", "spares all of the 3 caches"),
        ("kv_quant(keys=nf4(group=8, double))", "come one by one"),
        ("rtn(format=int8(head))", "is for the cache of keys and values"),
    ],
)
def test_what_cannot_be_stored_is_refused(text: str, told: str, model: Model, data: Calibration) -> None:
    with pytest.raises(UsageError, match=told):
        Pipeline.parse(text).run(model, data)


def test_slots_refuse_what_they_do_not_store_by_name() -> None:
    runtime = hwprofiles.load("cpu-x86-avx2").runtime("onnxruntime")
    for spec, told in (
        (KvSpec(keys="int8(channel)", static=True, scorer="h2o", budget=64), "fitted to data"),
        (KvSpec(keys="int8(token)", rotated=True, scorer="h2o", budget=64), "rotated vectors"),
    ):
        refusal = slots.refusal([spec], runtime)
        assert refusal is not None and told in refusal.reason


def test_its_text_parses_back() -> None:
    text = f"kv_quant({BOTH}=percentile, percentile=99.9, envelope=false, sensitive=1)"
    assert str(Pipeline.parse(text)) == text
    spec = KvSpec(keys="int8(channel)", values="fp8_e4m3(head)", static=True)
    assert KvSpec.from_data(spec.as_data()) == spec and spec.wants == ("key_scale", "value_scale")
    assert spec.told() == "int8(channel) keys, fp8_e4m3(head) values, static scales"
