"""bnb4 and llm_int8: what they make is what bitsandbytes makes, with it and without it."""

from pathlib import Path
from typing import Any

import pytest
import torch

import compress
from compress import export, hwprofiles
from compress.engine.layer_stats import LayerStats
from compress.errors import InputError, UnsupportedError, UsageError
from compress.formats import parse_format
from compress.formats.base import QuantTensor
from compress.layer import ActSpec, Layer, LayerKind, LayerSpec
from compress.maths import bnb
from compress.passes.bnb4 import Bnb4
from compress.passes.llm_int8 import LlmInt8, vectorwise
from compress.pipeline import Pipeline, planned
from compress.target import Refusal


@pytest.fixture
def bitsandbytes() -> Any:
    return pytest.importorskip("bitsandbytes.functional", reason="the extra bitsandbytes is not installed")


def layer(rows: int = 12, columns: int = 96, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> Layer:
    weight = (torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.05).to(dtype)
    return Layer("block.linear", LayerKind.LINEAR, weight, users=("block.linear",))


def tensors(found: Layer) -> dict[str, torch.Tensor]:
    assert isinstance(found.weight, QuantTensor)
    return found.weight.tensors


@pytest.mark.parametrize("form", ["nf4(block=64)", "fp4(block=32)", "nf4(block=64, double)", "fp4(block=128, double)"])
@pytest.mark.parametrize("columns", [96, 33, 64])
def test_the_library_and_we_store_the_same_bytes(bitsandbytes: Any, form: str, columns: int) -> None:
    one = layer(columns=columns)
    ours, theirs = (tensors(Bnb4(format=form, library=flag).layer(one, LayerStats())) for flag in (False, True))
    assert set(ours) == set(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_the_library_and_we_store_the_same_int8(bitsandbytes: Any) -> None:
    one = layer()
    one.weight[3] = 0
    ours, theirs = (tensors(LlmInt8(library=flag).layer(one, LayerStats())) for flag in (False, True))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_int8_codes_and_largest_magnitudes_are_bitsandbytes_bit_for_bit(bitsandbytes: Any) -> None:
    for seed in range(20):
        weight = layer(40, 200, seed, torch.float16).weight
        codes, largest, _ = bitsandbytes.int8_vectorwise_quant(weight)
        found = vectorwise(weight)
        assert torch.equal(found[0], codes) and torch.equal(found[1], largest)


def test_inputs_are_rounded_as_bitsandbytes_rounds_them_and_outlier_columns_are_kept(bitsandbytes: Any) -> None:
    values = torch.randn(30, 64, generator=torch.Generator().manual_seed(2))
    values[4, 7], values[20, 40], values[21, 40] = 9.0, -6.0, 30.0
    half = values.half()
    codes, largest, columns = bitsandbytes.int8_vectorwise_quant(half.clone(), threshold=6.0)
    assert columns.tolist() == [7, 40]
    form = parse_format("int8(token, outliers=6)")
    found = form.round_activation(half.float().reshape(3, 10, 64)).reshape(30, 64)
    expected = codes.float() * (largest / 127)[:, None]
    expected[:, columns] = half.float()[:, columns]
    assert torch.allclose(found, expected, rtol=1e-6, atol=0)
    assert torch.equal(torch.round(found * 127 / largest[:, None])[:, :7], codes[:, :7].float())


def test_without_outliers_every_column_is_rounded_per_token() -> None:
    values = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(3))
    plain = parse_format("int8(token)").round_activation(values)
    assert torch.allclose(parse_format("int8(token, outliers=6)").round_activation(values), plain, atol=1e-6)
    one = LlmInt8(threshold=0).layer(layer(), LayerStats())
    assert one.act is not None and str(one.act.format) == "int8(token)"


@pytest.mark.parametrize(
    "text", ["int8(channel, outliers=6)", "int8(token, outliers=0)", "int8(token, asymmetric, outliers=6)",
             "int8(token, outliers=true)", "int8(token, outliers=x)"]
)  # fmt: skip
def test_outliers_go_with_tokens_alone_and_are_magnitudes(text: str) -> None:
    with pytest.raises(UsageError, match="outliers"):
        parse_format(text)


def test_outliers_print_and_parse_back() -> None:
    for text in ("int8(token, outliers=6)", "int8(token, outliers=0.1)"):
        assert str(parse_format(text)) == text and parse_format(text) == parse_format(str(parse_format(text)))
    assert parse_format("int8(token, outliers=6)") != parse_format("int8(token)")


def test_a_row_of_zeros_and_small_rows_survive() -> None:
    one = layer(3, 40, dtype=torch.float32)
    one.weight[0] = 0
    one.weight[1] *= 1e-3
    found = LlmInt8().layer(one, LayerStats()).float_weight()
    assert torch.count_nonzero(found[0]) == 0
    assert float((found[1] - one.weight[1]).norm() / one.weight[1].norm()) < 0.05


def test_weights_that_float16_does_not_hold_are_refused() -> None:
    one = layer(dtype=torch.float32)
    one.weight[0, 0] = 1e5
    with pytest.raises(InputError, match=r"block\.linear holds magnitudes above 65504"):
        LlmInt8().layer(one, LayerStats())


@pytest.mark.parametrize("form", ["nf4(group=64)", "nf4(block=48)", "table(bits=4)", "int4(group=32)"])
def test_bnb4_takes_what_bitsandbytes_has(form: str) -> None:
    with pytest.raises(UsageError, match="none of bitsandbytes'"):
        Bnb4(format=form)


def test_rows_that_bitsandbytes_itself_decodes_wrongly_are_noted() -> None:
    assert "bitsandbytes 0.50 decodes those wrongly" in Bnb4().layer(layer(columns=96), LayerStats()).notes[0]
    assert not Bnb4().layer(layer(columns=128), LayerStats()).notes
    assert not Bnb4().layer(layer(columns=70), LayerStats()).notes


def test_a_missing_library_is_named_with_its_extra_before_any_work(
    monkeypatch: pytest.MonkeyPatch, llama: Path
) -> None:
    monkeypatch.setattr(bnb, "find_spec", lambda name: None)
    model = compress.load(llama)
    for text in ("bnb4(library=true)", "llm_int8(library=true)"):
        with pytest.raises(UnsupportedError, match=r"compress\[bitsandbytes\]"):
            planned(Pipeline.parse(text).resolve(model))
        with pytest.raises(UnsupportedError, match=r"compress\[bitsandbytes\]"):
            Pipeline.parse(text).run(model)
    assert Pipeline.parse("bnb4").run(model).model.structure.layers


@pytest.mark.parametrize("text", ["llm_int8, act_quant", "act_quant, llm_int8", "llm_int8, rtn(bits=8)"])
def test_llm_int8_sets_weight_and_input_and_nothing_else_may(text: str, llama: Path) -> None:
    with pytest.raises(UsageError, match="both set the"):
        Pipeline.parse(text).resolve(compress.load(llama))


@pytest.mark.parametrize("name", sorted(set(export.TARGETS) - {"checkpoint-bnb"}))  # whose own they are
def test_inputs_with_outliers_are_refused_where_they_cannot_be_kept(name: str) -> None:
    act = ActSpec(parse_format("int8(token, outliers=6)"))
    spec = LayerSpec("layer", LayerKind.LINEAR, (32, 64), ("layer",), format=parse_format("int8(channel)"), act=act)
    answer = export.find(name).plan_layer(spec, hwprofiles.load("cpu-x86-avx512-vnni"))
    assert isinstance(answer, Refusal) and "outliers" in answer.reason
