"""GPTQ, AWQ and bitsandbytes: read back by a twin written from their descriptions, and by the tools themselves."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers

import compress
from compress.errors import CompressError, UnsupportedError, UsageError
from compress.export.checkpoint import readback, runtime
from compress.export.checkpoint.target import AWQ, BITSANDBYTES, GPTQ, CheckpointTarget
from compress.models.model import Model
from compress.pipeline import Pipeline
from compress.profiles import as_profile
from compress.quality.verification import verify_export
from compress.target import plan_layers
from helpers.layouts import PROFILE, assert_read_back, config_of, written


@pytest.fixture(scope="module")
def model(make_llama: Callable[..., Path]) -> Model:
    return compress.load(make_llama(num_hidden_layers=1))


@pytest.fixture(scope="module")
def wide(make_llama: Callable[..., Path]) -> Model:
    """One whose rows are whole blocks."""
    return compress.load(make_llama(num_hidden_layers=1, intermediate_size=128))


@pytest.mark.parametrize(
    "form",
    ["int2(group=16)", "int3(group=32)", "int3(channel, asymmetric)", "int4(group=32, asymmetric)",
     "int4(group=32, signed)", "int8(tensor)", "int8(channel, asymmetric)"],
)  # fmt: skip
def test_gptq_files_are_decoded_to_the_very_weights(model: Model, tmp_path: Path, form: str) -> None:
    made = written(GPTQ, model, f"rtn(format={form})", tmp_path)
    assert_read_back(made, readback.read(tmp_path))
    config = config_of(tmp_path)
    assert (config["quant_method"], config["checkpoint_format"], config["desc_act"]) == ("gptq", "gptq_v2", False)
    assert config["sym"] is ("asymmetric" not in form) and config["dynamic"] == {r"-:^lm_head$": {}}


def test_a_zero_point_of_0_survives_version_2_and_would_not_version_1(model: Model, tmp_path: Path) -> None:
    made = written(GPTQ, model, "rtn(format=int4(group=32, asymmetric))", tmp_path)
    stored = readback.stored(tmp_path)
    name = "model.layers.0.mlp.up_proj"
    zeros = readback.stream_codes(stored[f"{name}.qzeros"], 4, 96)
    weight = made.layer(made.structure.layers[name]).weight
    own = weight.format.unpack(weight.tensors, weight.shape)[2]  # type: ignore[union-attr]
    assert torch.equal(zeros.T, own.long())
    path = tmp_path / "config.json"
    older = path.read_text().replace('"checkpoint_format": "gptq_v2"', '"checkpoint_format": "gptq"')
    path.write_text(older)
    shifted = readback.read(tmp_path)[f"{name}.weight"]
    assert not torch.equal(shifted, made.layer(made.structure.layers[name]).float_weight())


def test_gptq_tells_what_differs_and_what_stays_in_float(model: Model, tmp_path: Path) -> None:
    text = 'rtn(format=int4(group=32), ignore=["*.o_proj"], overrides={"*.v_proj": {format: int8(channel)}})'
    made = written(GPTQ, model, text, tmp_path)
    config = config_of(tmp_path)
    assert (config["bits"], config["group_size"]) == (4, 32)
    assert config["dynamic"] == {
        r"+:^model\.layers\.0\.self_attn\.v_proj$": {"bits": 8, "group_size": -1, "sym": True},
        r"-:^lm_head$": {},
        r"-:^model\.layers\.0\.self_attn\.o_proj$": {},
    }
    assert_read_back(made, readback.read(tmp_path))


@pytest.mark.parametrize("form", ["int4(group=32)", "int4(group=16, asymmetric)", "int4(channel, signed)"])
def test_awq_files_are_decoded_to_the_very_weights(model: Model, tmp_path: Path, form: str) -> None:
    made = written(AWQ, model, f"rtn(format={form})", tmp_path)
    assert_read_back(made, readback.read(tmp_path))
    config = config_of(tmp_path)
    assert (config["version"], config["zero_point"], config["modules_to_not_convert"]) == ("gemm", True, ["lm_head"])


@pytest.mark.parametrize("form", ["nf4(block=64)", "fp4(block=64)", "nf4(block=32, double)", "fp4(block=64, double)"])
def test_bitsandbytes_decodes_the_very_weights(wide: Model, tmp_path: Path, form: str) -> None:
    made = written(BITSANDBYTES, wide, f"rtn(format={form})", tmp_path)
    assert_read_back(made, readback.read(tmp_path))
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes, the reader of this layout, is not installed")
    stored = readback.stored(tmp_path)
    for spec in made.structure.layers.values():
        if spec.format is None:
            continue
        prefix = f"{spec.name}.weight."
        own = {name.removeprefix(prefix): value for name, value in stored.items() if name.startswith(prefix)}
        state = bnb.functional.QuantState.from_dict(own, device=torch.device("cpu"))
        found = bnb.functional.dequantize_4bit(stored[f"{spec.name}.weight"], state)
        assert torch.equal(found, made.layer(spec).float_weight())


def test_rows_of_int8_are_decoded_as_bitsandbytes_multiplies(model: Model, tmp_path: Path) -> None:
    made = written(BITSANDBYTES, model, "rtn(format=int8(channel))", tmp_path)
    assert_read_back(made, readback.read(tmp_path), exact=False)
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes, the reader of this layout, is not installed")
    stored = readback.stored(tmp_path)
    name = "model.layers.0.mlp.up_proj"
    found = bnb.functional.int8_vectorwise_dequant(stored[f"{name}.weight"], stored[f"{name}.SCB"])
    expected = made.layer(made.structure.layers[name]).float_weight()
    torch.testing.assert_close(found.float(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("text", ["rtn(format=nf4(block=64, double))", "rtn(format=int8(channel))", "llm_int8"])
def test_transformers_runs_a_bitsandbytes_folder(wide: Model, tmp_path: Path, text: str) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes, the reader of this layout, is not installed")
    pytest.importorskip("accelerate", reason="accelerate, which transformers needs for bitsandbytes, is not installed")
    made = Pipeline.parse(text).run(wide).model
    lowered = BITSANDBYTES.write(made, PROFILE, tmp_path)
    ids = torch.randint(3, 256, (8, 64), generator=torch.Generator().manual_seed(0))
    profile = as_profile(PROFILE, "checkpoint-bnb")
    found = verify_export(made, tmp_path, profile, ids, lowered.bounds)
    assert found.agrees and found.level == "ran" and "bitsandbytes" in found.runtime
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)  # as a user would
    assert torch.isfinite(loaded(ids[:1]).logits).all()


@pytest.mark.parametrize("target", [GPTQ, AWQ, BITSANDBYTES], ids=lambda target: target.layout.name)
def test_without_its_reader_a_folder_is_only_checked_and_says_so(
    wide: Model, tmp_path: Path, target: CheckpointTarget, monkeypatch: pytest.MonkeyPatch
) -> None:
    form = "nf4(block=64)" if target is BITSANDBYTES else "int4(group=32)"
    made = Pipeline.parse(f"rtn(format={form})").run(wide).model
    lowered = target.write(made, PROFILE, tmp_path)
    monkeypatch.setattr(runtime.util, "find_spec", lambda name: None)
    ids = torch.randint(3, 256, (8, 64), generator=torch.Generator().manual_seed(0))
    profile = as_profile(PROFILE, {"gptq": "checkpoint-gptq", "awq": "checkpoint-awq"}.get(
        target.layout.name, "checkpoint-bnb"))  # fmt: skip
    found = verify_export(made, tmp_path, profile, ids, lowered.bounds)
    assert found.agrees and found.level == "checked" and found.exact_relative_difference is not None
    assert "not installed" in found.notes[0] and "has not run in another tool" in found.notes[0]
    assert found.exact_relative_difference < 1e-5


@pytest.mark.parametrize(
    ("target", "text", "reason"),
    [
        (GPTQ, "rtn(format=int5(channel))", "GPTQ stores int2, int3, int4 and int8"),
        (GPTQ, 'rtn(format=int4(group=32), targets=["lm_head"])', "keeps embeddings and the head in float"),
        (GPTQ, "rtn(format=int8(channel)), act_quant(format=int8(token))", "GPTQ rounds weights only"),
        (GPTQ, "rtn(format=int4(group=32, float_zero))", "stores whole zero points only"),
        (AWQ, "rtn(format=int3(group=32))", "AWQ stores int4 only"),
        (AWQ, "rtn(format=int4(group=32, float_zero))", "stores whole zero points only"),
        (AWQ, "rtn(format=int4(group=48))", "no multiple of the group 48"),
        (BITSANDBYTES, "rtn(format=int4(group=32))", "bitsandbytes stores nf4, fp4 and int8"),
        (BITSANDBYTES, "rtn(format=nf4(block=16))", "bitsandbytes has blocks of 32"),
        (BITSANDBYTES, "rtn(format=nf4(block=64))", r"96 columns .* Give block=32"),
    ],
)
def test_what_a_layout_cannot_store_is_refused_with_what_would_do(
    model: Model, tmp_path: Path, target: CheckpointTarget, text: str, reason: str
) -> None:
    made = Pipeline.parse(text).run(model).model
    with pytest.raises(UsageError, match=reason):
        target.write(made, PROFILE, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_layers_that_differ_are_refused_where_a_layout_has_one_setting_for_all(model: Model) -> None:
    for target, first, second in (
        (AWQ, "int4(group=32)", "int4(channel)"),
        (BITSANDBYTES, "nf4(block=32)", "int8(channel)"),
    ):
        text = f'rtn(format={first}, overrides={{"*.v_proj": {{format: {second}}}}})'
        made = Pipeline.parse(text).run(model).model
        answers = plan_layers(target, made.structure.layers, PROFILE).values()
        assert {getattr(answer, "reason", "")[-14:] for answer in answers} >= {" Give them one"}


def test_rows_that_do_not_fill_words_are_refused(make_llama: Callable[..., Path], tmp_path: Path) -> None:
    odd = compress.load(make_llama(num_hidden_layers=1, intermediate_size=92))
    made = Pipeline.parse("rtn(format=int4(channel))").run(odd).model
    with pytest.raises(UnsupportedError, match=r"92 rows and 64 columns must be multiples of 32"):
        GPTQ.write(made, PROFILE, tmp_path / "gptq")
    with pytest.raises(UnsupportedError, match="92 rows are no multiple"):
        AWQ.write(made, PROFILE, tmp_path / "awq")


def test_a_layout_that_is_not_known_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "spqr"}}))
    with pytest.raises(CompressError, match="spqr"):
        readback.read(tmp_path)
