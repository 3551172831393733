"""Experts in the layouts of GPTQ and AWQ, under the names that GPTQModel reads, and where they are refused."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers

import compress
from compress.errors import UnsupportedError, UsageError
from compress.export.checkpoint import readback, readers
from compress.export.checkpoint.layout import Choice
from compress.export.checkpoint.target import AWQ, BITSANDBYTES, GPTQ, CheckpointTarget
from compress.models.model import Model
from compress.pipeline import Pipeline
from compress.profiles import as_profile
from compress.quality.verification import verify_export
from compress.speed.footprint import deployable_bytes
from compress.target import Refusal
from helpers import models

PROFILE = as_profile("cpu-x86-avx2")
SIZES = {**models.SIZES, "hidden_size": 64, "num_hidden_layers": 1, "num_experts_per_tok": 2}
STACK = "model.layers.0.mlp.experts"
GPTQ_NAMES = {"qweight", "qzeros", "scales", "g_idx"}


@pytest.fixture(scope="module")
def qwen(save_random: Callable[..., Path]) -> Model:
    settings = {"num_experts": 4, "moe_intermediate_size": 32, "head_dim": 16, "decoder_sparse_step": 1}
    return compress.load(save_random("qwen3-moe-64", transformers.Qwen3MoeConfig(**SIZES, **settings)))


@pytest.fixture(scope="module")
def mixtral(save_random: Callable[..., Path]) -> Model:
    return compress.load(save_random("mixtral-64", transformers.MixtralConfig(**SIZES, num_local_experts=4)))


@pytest.mark.parametrize(
    ("target", "text", "names"),
    [
        (GPTQ, "rtn(format=int4(group=32))", GPTQ_NAMES),
        (GPTQ, 'rtn(format=int4(group=32, asymmetric), overrides={"*.down_proj.*": {format: int8(tensor)}})',
         GPTQ_NAMES),
        (AWQ, "rtn(format=int4(group=32, asymmetric))", {"qweight", "qzeros", "scales"}),
    ],
)  # fmt: skip
def test_each_expert_is_stored_and_decoded_to_the_very_weights(
    qwen: Model, tmp_path: Path, target: CheckpointTarget, text: str, names: set[str]
) -> None:
    made = Pipeline.parse(text).run(qwen).model
    lowered = target.write(made, PROFILE, tmp_path)
    predicted = target.predict_bytes(made.structure.layers.values(), made, PROFILE)
    assert deployable_bytes(tmp_path) == pytest.approx(predicted, rel=0.005)
    found = readback.read(tmp_path)
    for index in range(4):
        both = made.layer(made.structure.layers[f"{STACK}.gate_up_proj.{index}"]).float_weight()
        down = made.layer(made.structure.layers[f"{STACK}.down_proj.{index}"]).float_weight()
        assert torch.equal(found[f"{STACK}.{index}.gate_proj.weight"], both[:32])
        assert torch.equal(found[f"{STACK}.{index}.up_proj.weight"], both[32:])
        assert torch.equal(found[f"{STACK}.{index}.down_proj.weight"], down)
    stored = [name for name in readback.names(tmp_path) if name.startswith(f"{STACK}.3.up_proj.")]
    assert {name.rpartition(".")[2] for name in stored} == names
    ids = torch.randint(3, 96, (16, 32), generator=torch.Generator().manual_seed(0))
    profile = as_profile(PROFILE, f"checkpoint-{target.layout.name}")
    verification = verify_export(made, tmp_path, profile, ids, lowered.bounds)
    assert verification.agrees and verification.max_relative_difference < 1e-5


@pytest.mark.parametrize("target", [GPTQ, AWQ], ids=lambda target: target.layout.name)
def test_a_folder_with_experts_is_only_checked_whatever_is_installed(
    qwen: Model, tmp_path: Path, target: CheckpointTarget, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Pipeline.parse("rtn(format=int4(group=32))").run(qwen).model
    target.write(made, PROFILE, tmp_path)
    monkeypatch.setattr(readers, "PACKAGES", dict.fromkeys(readers.PACKAGES, ("torch",)))
    session = target.session(tmp_path, 1)
    assert session.level == "checked" and "transformers reads no packed experts" in session.notes[0]
    answer = target.plan_layer(made.structure.layers[f"{STACK}.down_proj.0"], PROFILE)
    assert isinstance(answer, Choice) and "experts are read by GPTQModel" in str(answer.note)


def test_gptqmodel_is_told_in_its_own_words_what_stays_in_float(qwen: Model, tmp_path: Path) -> None:
    made = Pipeline.parse('rtn(format=int4(group=32), targets=["kind:linear"])').run(qwen).model
    plain = {f"{STACK}.{index}.{leaf}" for index in range(4) for leaf in ("gate_proj", "up_proj", "down_proj")}
    plain |= {"lm_head", "model.layers.0.mlp.gate"}
    for target in (GPTQ, AWQ):
        target.write(made, PROFILE, tmp_path / target.layout.name)
        config = json.loads((tmp_path / target.layout.name / "config.json").read_text())["quantization_config"]
        assert plain <= set(config.get("modules_to_not_convert", plain))
        for name in plain:
            assert f"-:^{re.escape(name)}$" in config["dynamic"]


@pytest.mark.parametrize("target", [GPTQ, AWQ], ids=lambda target: target.layout.name)
def test_experts_that_the_files_name_otherwise_are_refused_when_planned_and_when_written(
    mixtral: Model, tmp_path: Path, target: CheckpointTarget
) -> None:
    made = Pipeline.parse("rtn(format=int4(group=32))").run(mixtral).model
    reason = r"experts\.\S+ cannot .*[.]block_sparse_moe\.experts\.0\.w1, and GPTQModel.*--target checkpoint"
    with pytest.raises(UnsupportedError, match=reason):
        target.predict_bytes(made.structure.layers.values(), made, PROFILE)
    with pytest.raises(UnsupportedError, match=reason):
        target.write(made, PROFILE, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("form", ["nf4(block=32)", "int8(channel)"])
def test_bitsandbytes_has_no_experts_and_names_the_layout_that_has(qwen: Model, tmp_path: Path, form: str) -> None:
    made = Pipeline.parse(f"rtn(format={form})").run(qwen).model
    with pytest.raises(UsageError, match=r"experts\.\S+ cannot .* loads no packed experts.*--target checkpoint"):
        BITSANDBYTES.write(made, PROFILE, tmp_path / "out")


def test_halves_that_do_not_fill_words_are_refused(qwen: Model) -> None:
    made = Pipeline.parse("rtn(format=int4(group=32))").run(qwen).model
    spec = made.structure.layers[f"{STACK}.gate_up_proj.0"]
    for target, rows, reason in ((GPTQ, 96, "48 rows and 64 columns"), (AWQ, 24, "12 rows are no multiple")):
        answer = target.plan_layer(replace(spec, shape=(rows, 64)), PROFILE)
        assert isinstance(answer, Refusal) and reason in answer.reason
