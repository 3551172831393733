"""Lookup tables: maths against slow twins, bitsandbytes bit for bit, GPTQ on them, and their ONNX lowering."""

from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch

import compress
from compress import hwprofiles
from compress.engine.layer_stats import LayerStats
from compress.errors import UsageError
from compress.export.onnx import target
from compress.export.onnx.lowering import Choice, choose
from compress.export.onnx.runtime import Session
from compress.formats import parse_format
from compress.formats.lookup import nibbles
from compress.layer import ActSpec, Layer, LayerKind, LayerSpec
from compress.maths import tables
from compress.maths.hessian import accumulate, weighted_error
from compress.models.model import Model
from compress.passes.gptq import Gptq
from compress.passes.rtn import Rtn
from compress.pipeline import Pipeline
from compress.quality.verification import agreement
from compress.target import Refusal
from helpers.stored import stored_bytes

PROFILE = hwprofiles.load("cpu-x86-avx512-vnni")
RUNTIME = PROFILE.runtime("onnxruntime")
FORMATS = [
    "nf4(block=64)",
    "fp4(block=16)",
    "nf4(block=32, double)",
    "table(bits=3, group=32)",
    "table(bits=4, block=64)",
]
MORE = ["nf4(group=32)", "fp4(group=48, double)", "table(bits=8, group=20)", "table(bits=2, group=100, double)"]


def weights(rows: int = 9, columns: int = 100, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def bitsandbytes() -> Any:
    return pytest.importorskip("bitsandbytes.functional", reason="the extra bitsandbytes is not installed")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("nf4(blok=64)", "block"),
        ("nf4(bits=3)", "unknown setting 'bits'"),
        ("nf4(dubble)", "double"),
        ("nf4(double, double=true)", "given twice"),
        ("nf4(block=64, group=64)", "two layouts"),
        ("nf4(block=1)", "block=1"),
        ("table(group=true)", "group=True"),
        ("table(bits=9)", "2 to 8 bits"),
        ("fp4(double=3)", "neither"),
    ],
)
def test_a_wrong_setting_is_named_with_what_is_allowed(text: str, told: str) -> None:
    with pytest.raises(UsageError, match=told):
        parse_format(text)


@pytest.mark.parametrize("text", FORMATS + MORE)
@pytest.mark.parametrize("search", [False, True])
def test_what_is_stored_decodes_to_what_was_chosen_and_is_counted(text: str, search: bool) -> None:
    form, weight = parse_format(text), weights()
    params = form.fit(weight, search=search)
    codes, values = form.quantize(weight, params, torch.arange(100))
    packed = form.pack(codes, params, (9, 100))
    assert str(form) == text and torch.equal(packed.dequantize(), values)
    assert {name: (tuple(t.shape), t.dtype) for name, t in packed.tensors.items()} == form.tensor_specs((9, 100))
    assert packed.nbytes == form.stored_bytes((9, 100))


@pytest.mark.parametrize("text", FORMATS + MORE)
def test_every_weight_takes_the_nearest_entry_of_the_table_times_its_blocks_largest(text: str) -> None:
    form, weight = parse_format(text), weights(5, 70)
    codes, _ = form.quantize(weight, form.fit(weight), torch.arange(70))
    stored = form.pack(codes, form.fit(weight), (5, 70))
    codes, scale, table = form.unpack(stored.tensors, (5, 70))
    per_row = -(-70 // form.size)
    for row in range(5):
        for column in range(70):
            block = (row * 70 + column) // form.size if form.flat else row * per_row + column // form.size
            members = weight.flatten()[block * form.size : (block + 1) * form.size]
            if not form.flat:
                start = block % per_row * form.size
                members = weight[row, start : start + form.size]
            largest = float(members.abs().max())
            if form.double:
                assert float(scale[block]) == pytest.approx(largest, abs=0.02)
            else:
                assert float(scale[block]) == pytest.approx(largest, rel=1e-3)
            best = min(abs(float(entry) * largest - float(weight[row, column])) for entry in table)
            found = float(table[int(codes[row, column])]) * largest
            assert abs(found - float(weight[row, column])) == pytest.approx(best, abs=2e-3)


@pytest.mark.parametrize("text", FORMATS + MORE)
def test_columns_taken_one_by_one_in_any_order_equal_the_whole(text: str) -> None:
    form, weight = parse_format(text), weights()
    params = form.fit(weight)
    whole = form.quantize(weight, params, torch.arange(100))[1]
    for column in (99, 0, 63, 64, 31):
        some = torch.tensor([column])
        assert torch.equal(form.quantize(weight[:, some], params, some)[1], whole[:, some])


@pytest.mark.parametrize("text", FORMATS + MORE)
def test_a_weight_of_zeros_stays_zero(text: str) -> None:
    form, weight = parse_format(text), torch.zeros(2, 100)
    params = form.fit(weight, search=True)
    codes, _ = form.quantize(weight, params, torch.arange(100))
    assert torch.count_nonzero(form.pack(codes, params, (2, 100)).dequantize()) == 0


def test_a_learned_table_is_the_best_there_is() -> None:
    """Against every way to cut the sorted values into runs."""
    values = torch.tensor([-0.9, -0.85, -0.4, -0.1, 0.0, 0.05, 0.3, 0.34, 0.9, 1.0])
    heavy = torch.tensor([1.0, 2.0, 1.0, 5.0, 1.0, 1.0, 3.0, 1.0, 1.0, 4.0])
    for entries in (2, 3, 4):
        found = tables.learn(values, heavy, entries)
        error = float((heavy * (values[:, None] - found).abs().amin(1).square()).sum())
        least = float("inf")
        for cuts in combinations(range(1, len(values)), entries - 1):
            total = 0.0
            for start, stop in zip((0, *cuts), (*cuts, len(values)), strict=True):
                mean = (heavy[start:stop] * values[start:stop]).sum() / heavy[start:stop].sum()
                total += float((heavy[start:stop] * (values[start:stop] - mean).square()).sum())
            least = min(least, total)
        assert error == pytest.approx(least, rel=1e-5)


def test_fewer_values_than_entries_are_all_kept() -> None:
    found = tables.learn(torch.tensor([0.5, -0.5, 0.5]), torch.ones(3), 8)
    assert found.shape == (8,) and set(found.tolist()) == {-0.5, 0.5}
    assert torch.equal(tables.learn(torch.zeros(3), torch.zeros(3), 4), torch.zeros(4))


def test_columns_of_more_importance_are_stored_more_closely() -> None:
    form, weight = parse_format("table(bits=2, group=100)"), weights(40)
    important = torch.ones(100)
    important[:10] = 1000.0
    errors = []
    for importance in (None, important):
        params = form.fit(weight, importance=importance)
        errors.append((form.quantize(weight, params, torch.arange(100))[1] - weight).square()[:, :10].sum())
    assert errors[1] < 0.95 * errors[0]


@pytest.mark.parametrize("text", ["nf4(block=64)", "table(bits=3, group=32)", "fp4(group=48)"])
def test_the_search_for_scales_lowers_the_error_it_is_after(text: str) -> None:
    form, weight = parse_format(text), weights(60)
    error = [
        float(
            (form.quantize(weight, form.fit(weight, search=search), torch.arange(100))[1] - weight).abs().pow(2.4).sum()
        )
        for search in (False, True)
    ]
    assert error[1] < error[0]


def test_a_learned_table_beats_the_even_grid_of_as_many_bits() -> None:
    weight = weights(200, 128)
    for bits, share in ((2, 0.7), (3, 0.9), (4, 0.95)):
        lost, stored = [], []
        for text in (f"int{bits}(group=64, asymmetric)", f"table(bits={bits}, group=64)"):
            form = parse_format(text)
            lost.append(float((form.quantize(weight, form.fit(weight), torch.arange(128))[1] - weight).square().sum()))
            stored.append(form.stored_bytes((2048, 128)))
        assert lost[1] < share * lost[0] and stored[1] < stored[0]


@pytest.mark.parametrize("text", ["nf4(block=16)", "nf4(block=64, double)", "table(bits=3, group=8)"])
def test_gptq_on_a_table_leaves_less_output_error_than_rounding(text: str) -> None:
    maker = torch.Generator().manual_seed(0)
    inputs = torch.randn(200, 24, generator=maker) @ torch.randn(24, 24, generator=maker)
    hessian = accumulate(None, inputs) / 200
    one = Layer("block.linear", LayerKind.LINEAR, weights(6, 24, 1), users=("block.linear",))
    rounded, solved = Rtn(format=text).layer(one, LayerStats()), Gptq(format=text).layer(one, LayerStats(hessian, 200))
    before = weighted_error(rounded.float_weight() - one.float_weight(), hessian)
    assert weighted_error(solved.float_weight() - one.float_weight(), hessian) < before


def test_the_tables_are_those_of_bitsandbytes(bitsandbytes: Any) -> None:
    for name in ("nf4", "fp4"):
        assert torch.equal(tables.fixed(name), bitsandbytes.get_4bit_type(name, device="cpu"))
    assert torch.equal(tables.dynamic_map(), bitsandbytes.create_dynamic_map())


@pytest.mark.parametrize("name", ["nf4", "fp4"])
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("shape", [(4, 64), (5, 70), (3, 33), (7, 96), (70, 256)])
def test_codes_and_scales_are_those_of_bitsandbytes_bit_for_bit(
    bitsandbytes: Any, name: str, double: bool, shape: tuple[int, int]
) -> None:
    for size in (32, 64, 128):
        for dtype in (torch.float32, torch.bfloat16):
            weight = (weights(*shape) * 0.02).to(dtype)
            weight[0, :40] = 0
            form = parse_format(f"{name}(block={size}{', double' if double else ''})")
            expected, state = bitsandbytes.quantize_4bit(
                weight, blocksize=size, quant_type=name, compress_statistics=double
            )
            params = form.fit(weight.float())
            chosen, _ = form.quantize(weight.float(), params, torch.arange(shape[1]))
            stored = form.pack(chosen, params, shape)
            codes, scale, table = form.unpack(stored.tensors, shape)
            assert torch.equal(nibbles(codes, table), expected.flatten())
            assert torch.equal(stored.tensors["scale"], state.absmax)
            if double:
                assert torch.equal(stored.tensors["scale_max"], state.state2.absmax)
                assert torch.equal(stored.tensors["scale_mean"][0], state.offset)
                again = bitsandbytes.dequantize_blockwise(state.absmax, state.state2) + state.offset
                assert torch.equal(scale, again)
            if shape[1] % size == 0:  # where blocks cross rows its own decoding on AVX-512 goes wrong (passes/bnb4.py)
                decoded = bitsandbytes.dequantize_4bit(expected, state).float()
                assert torch.equal(stored.dequantize().to(dtype).float(), decoded)


def test_doubly_quantized_scales_are_close_to_what_they_were() -> None:
    scale = weights(1, 1000).abs()[0]
    found = tables.expand_scales(*tables.compress_scales(scale))
    assert float((found - scale).abs().max()) < 0.01 * float((scale - scale.mean()).abs().max())


def test_nibbles_put_the_first_code_in_the_high_half() -> None:
    codes = torch.tensor([[1, 2, 3], [4, 5, 6], [7, 8, 9]], dtype=torch.uint8)
    assert nibbles(codes, tables.fixed("nf4")).tolist() == [0x12, 0x34, 0x56, 0x78, 0x97]  # 7 is NF4's zero


@pytest.fixture(scope="module")
def model(make_llama: Callable[..., Path]) -> Model:
    """Biases, and widths that blocks do not divide."""
    return compress.load(make_llama("lookup", num_hidden_layers=2, attention_bias=True, intermediate_size=80))


@pytest.fixture(scope="module")
def graph(model: Model) -> bytes:
    return target.capture(model, PROFILE)


@pytest.mark.parametrize("form", ["nf4(block=64)", "fp4(block=32)", "nf4(block=128, double)", "nf4(group=16)"])
def test_the_graph_computes_what_the_model_in_memory_does(
    model: Model, graph: bytes, tmp_path: Path, form: str
) -> None:
    made = Pipeline.parse(f"rtn(format={form})").run(model).model
    lowered = target.write(made, PROFILE, tmp_path, graph)
    assert lowered.operators == {"Gather": 1, "MatMulBnb4": 14}
    stored = stored_bytes(tmp_path / "model.onnx")
    for name, spec in made.structure.layers.items():
        choice = choose(spec, RUNTIME)
        assert isinstance(choice, Choice) and stored[name] == choice.stored_bytes
    windows = torch.randint(0, 256, (8, 64), generator=torch.Generator().manual_seed(1))
    found = agreement(Session(tmp_path, 1), made, windows, lowered.bounds)
    assert found.agrees and found.max_relative_difference < 1e-4


def spec(form: str, kind: LayerKind = LayerKind.LINEAR, act: str | None = None) -> LayerSpec:
    inputs = ActSpec(parse_format(act)) if act else None
    return LayerSpec("layer", kind, (32, 80), ("layer",), format=parse_format(form), act=inputs)


@pytest.mark.parametrize(
    ("one", "told"),
    [
        (spec("table(bits=4, group=16)"), "no operator of ONNX Runtime reads a learned table"),
        (spec("nf4(block=512)"), "blocks of 16, 32, 64, 128, 256"),
        (spec("nf4(group=64)"), "groups that divide the columns"),
        (spec("nf4(block=64)", LayerKind.EMBEDDING), "use int8 or int4 there"),
        (spec("nf4(block=64)", act="int8(tensor, asymmetric)"), "int8(channel)"),
    ],
)
def test_what_the_kernel_does_not_read_is_refused_with_what_it_does(one: LayerSpec, told: str) -> None:
    answer = choose(one, RUNTIME)
    assert isinstance(answer, Refusal) and told in answer.reason


def test_a_profile_without_the_operator_refuses_it() -> None:
    formats = tuple(entry for entry in RUNTIME.formats if entry.use != "lookup")
    answer = choose(spec("nf4(block=64)"), RUNTIME.model_copy(update={"formats": formats}))
    assert isinstance(answer, Refusal) and "no lookup kernel for 4 bit" in answer.reason and not answer.usage


def test_a_plan_says_what_the_kernel_is_worth_and_that_scales_are_widened() -> None:
    found = choose(spec("nf4(block=64, double)"), RUNTIME)
    assert isinstance(found, Choice) and found.kernel == "works"
    assert "slower than float32" in found.note and "stored as float32" in found.note
