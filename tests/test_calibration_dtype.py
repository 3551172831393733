"""Calibration in bfloat16: half the memory of the stream, the same statistics to bfloat16's rounding."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import compress
from compress.engine.layer_stats import Stat
from compress.engine.stream import BlockStream
from compress.errors import UsageError
from compress.inputs.datasets import Calibration
from compress.inputs.windows import Windows
from compress.maths.activations import allocate
from compress.models.skeleton import OUTER
from compress.pipeline import Pipeline
from compress.plan import make_plan
from compress.profiles import as_profile
from compress.recipe import parse

GPTQ = "gptq(format=int4(group=32))"


def calibration(dtype: torch.dtype) -> Calibration:
    ids = torch.randint(0, 256, (8, 24), generator=torch.Generator().manual_seed(0))
    return Calibration(Windows(ids, tuple(range(8)), "given", "given"), 0, "given", dtype)


def test_statistics_of_both_types_agree_to_bfloat16s_rounding(llama: Path) -> None:
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        model = compress.load(llama)
        stream = BlockStream(model, calibration(dtype).batches(), dtype=dtype)
        stream.start(model.layers(OUTER))
        stream.load(0, model.layers(0), model.plain(0))
        name = "model.layers.0.mlp.down_proj"
        assert stream.hidden[0].dtype is stream.module.get_submodule(name).weight.dtype is dtype
        hessian = stream.collect(0, [name], {Stat.HESSIAN})[name].hessian
        assert hessian is not None and hessian.dtype is torch.float32
        found[dtype] = hessian
    exact, half = found[torch.float32], found[torch.bfloat16]
    assert 0 < float((exact - half).norm() / exact.norm()) < 0.02


def test_a_model_calibrated_in_bfloat16_is_as_close_to_the_original(llama: Path) -> None:
    errors = {}
    for dtype in (torch.float32, torch.bfloat16):
        result = Pipeline.parse(GPTQ).run(compress.load(llama), calibration(dtype))
        rows = [row for item in result.passes for row in item.layers if row.changed]
        errors[dtype] = sum(row.error_after or 0.0 for row in rows) / len(rows)
    assert errors[torch.bfloat16] == pytest.approx(errors[torch.float32], rel=0.05)


def test_online_transforms_and_rounded_inputs_work_in_bfloat16(llama: Path) -> None:
    result = Pipeline.parse(f"hadamard, {GPTQ}, act_quant").run(compress.load(llama), calibration(torch.bfloat16))
    assert all(row.changed for row in result.passes[1].layers if "mlp" in row.layer)


def test_what_is_allocated_takes_half(tmp_path: Path) -> None:
    shapes = [(3, 4), (5, 4)]
    both = [allocate(shapes, tmp_path, dtype) for dtype in (torch.float32, torch.bfloat16)]
    assert sum(each.nbytes for each in both[0]) == 2 * sum(each.nbytes for each in both[1])


def test_activations_above_the_limit_are_spilled_in_their_type(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("compress.maths.activations.SPILL_BYTES", 16)
    (kept,) = allocate([(16, 4)], tmp_path, torch.bfloat16)
    kept.copy_(torch.arange(64.0).reshape(16, 4))
    assert kept.untyped_storage().filename is not None
    assert torch.equal(kept.float(), torch.arange(64.0).reshape(16, 4))


@pytest.mark.parametrize("passes", ["awq(bits=4, group_size=32)", "smoothquant, rtn(bits=8)"])
def test_passes_that_compute_with_whole_blocks_refuse_it_by_name(llama: Path, passes: str) -> None:
    with pytest.raises(UsageError, match=passes[:3] + ".*whole blocks in float32"):
        Pipeline.parse(passes).run(compress.load(llama), calibration(torch.bfloat16))


def test_a_recipe_names_the_type_and_the_plan_refuses_what_the_run_would(llama: Path) -> None:
    model, profile = compress.load(llama), as_profile("cpu-x86-avx512-vnni")
    recipe = parse({"passes": [GPTQ], "calibration": {"dtype": "bfloat16"}}, "own", "own.yaml")
    wide = make_plan(model, recipe.model_copy(update={"calibration": replace_dtype(recipe, "float32")}), profile)
    assert make_plan(model, recipe, profile).predicted_disk_bytes < wide.predicted_disk_bytes
    with pytest.raises(UsageError, match="awq"):
        make_plan(
            model,
            parse({"passes": ["awq(bits=4, group_size=32)"], "calibration": {"dtype": "bfloat16"}}, "", ""),
            profile,
        )
    with pytest.raises(UsageError, match=r"calibration.dtype='half'"):
        parse({"passes": [GPTQ], "calibration": {"dtype": "half"}}, "own", "own.yaml")


def replace_dtype(recipe: object, dtype: str) -> object:
    return recipe.calibration.model_copy(update={"dtype": dtype})  # type: ignore[attr-defined]


def test_the_report_says_in_which_type_statistics_were_taken() -> None:
    assert calibration(torch.bfloat16).summary()["dtype"] == "bfloat16"
    assert replace(calibration(torch.bfloat16), dtype=torch.float32).summary()["dtype"] == "float32"
