"""Inputs rotated at run time in a checkpoint: compressed-tensors' own function applies what its config declares."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import compress
from compress.errors import UsageError
from compress.export.checkpoint import readback, runtime, transform_config
from compress.export.checkpoint.layout import Choice, Packed
from compress.export.checkpoint.target import AWQ, BITSANDBYTES, COMPRESSED_TENSORS, GPTQ
from compress.layer import LayerKind
from compress.models.model import Model
from compress.pipeline import Pipeline
from compress.profiles import as_profile
from compress.quality.evaluate import stream_logits
from compress.quality.verification import verify_export
from compress.records import Verification
from compress.speed.footprint import deployable_bytes
from compress.target import Refusal, plan_layers
from compress.transforms import Hadamard

PROFILE = as_profile("cpu-x86-avx2", "checkpoint")
INT4 = "rtn(format=int4(group=32))"
IDS = torch.randint(3, 256, (16, 32), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def model(make_llama: Callable[..., Path]) -> Model:
    return compress.load(make_llama("transformed", num_hidden_layers=1, initializer_range=0.1))


def verified(model: Model, text: str, folder: Path) -> Verification:
    made = Pipeline.parse(text).run(model).model
    lowered = COMPRESSED_TENSORS.write(made, PROFILE, folder)
    predicted = COMPRESSED_TENSORS.predict_bytes(made.structure.layers.values(), made, PROFILE)
    assert deployable_bytes(folder) == pytest.approx(predicted, rel=0.005)
    found = verify_export(made, folder, PROFILE, IDS, lowered.bounds)
    assert found.agrees, found
    return found


def schemes_of(folder: Path) -> dict[str, dict[str, Any]]:
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    found: dict[str, dict[str, Any]] = config["transform_config"]["config_groups"]
    return found


@pytest.mark.parametrize("seed", ["null", "7"])
def test_compressed_tensors_gives_the_logits_of_the_model(model: Model, tmp_path: Path, seed: str) -> None:
    found = verified(model, f"hadamard(block=16, seed={seed}), {INT4}", tmp_path)
    assert found.max_relative_difference < 1e-5  # random weights, so that a wrong sign or order would show
    (scheme,) = schemes_of(tmp_path).values()
    assert scheme["type"] == ("hadamard" if seed == "null" else "random-hadamard") and scheme["head_dim"] == 16
    (apply,) = scheme["apply"]
    assert apply["location"] == "input" and "model.layers.0.mlp.down_proj" in apply["targets"]
    assert len(apply["targets"]) == 7
    stored = readback.stored(tmp_path, transform_config.suffixes({"config_groups": schemes_of(tmp_path)}))
    assert len(stored) == (seed != "null")
    for matrix in stored.values():
        assert torch.equal(matrix.double() / 4, Hadamard(16, int(seed)).matrix())


def test_without_signs_the_matrix_is_that_of_compressed_tensors() -> None:
    from compressed_tensors.transform.utils.hadamard import deterministic_hadamard_matrix

    for block in (2, 16, 64):
        theirs = deterministic_hadamard_matrix(block, torch.float64) / block**0.5
        torch.testing.assert_close(Hadamard(block, None).matrix(), theirs, rtol=1e-14, atol=0)


def test_blocks_of_several_sizes_and_float_layers_are_schemes_of_their_own(model: Model, tmp_path: Path) -> None:
    text = 'hadamard(block=64), rtn(format=int4(group=32), ignore=["*.o_proj"])'
    assert verified(model, text, tmp_path).max_relative_difference < 1e-5
    schemes = schemes_of(tmp_path)
    assert {name: scheme["head_dim"] for name, scheme in schemes.items()} == {
        "hadamard_64_seed_0": 64,
        "hadamard_32_seed_0": 32,
    }
    assert "model.layers.0.self_attn.o_proj" in schemes["hadamard_64_seed_0"]["apply"][0]["targets"]


def test_inputs_are_transformed_before_the_reader_rounds_them(model: Model, tmp_path: Path) -> None:
    found = verified(model, "hadamard(block=32), rtn(format=int8(channel)), act_quant(format=int8(token))", tmp_path)
    assert found.exact_relative_difference is not None and found.exact_relative_difference < 0.02


@pytest.fixture(scope="module")
def made(model: Model) -> Model:
    return Pipeline.parse(f"hadamard(block=32), {INT4}").run(model).model


@pytest.fixture(scope="module")
def folder(made: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return COMPRESSED_TENSORS.write(made, PROFILE, tmp_path_factory.mktemp("transformed")).folder


def test_a_folder_that_transformers_misreads_is_only_checked_and_says_why(made: Model, folder: Path) -> None:
    session = COMPRESSED_TENSORS.session(folder, 1)
    assert session.level == "checked"
    (note,) = session.notes
    assert "passes over transform_config" in note and "wrong outputs" in note
    with runtime.quiet(), torch.no_grad():
        plain = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(IDS[:1]).logits
    (expected,) = stream_logits(made, IDS[:1])
    # where this fails transformers has learnt it: see `transform_config.is_attached`, and take the notes back
    assert (plain[0] - expected).abs().max() > 0.1 * expected.abs().max()


def test_a_reader_that_applies_transforms_itself_is_left_alone(
    made: Model, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = runtime._load

    def load_and_attach(folder: Path, raw: Any, tensors: Any = None) -> Any:
        loaded, declared = load(folder, raw, tensors), raw["quantization_config"]["transform_config"]
        transform_config.attach(loaded, declared, readback.stored(folder, transform_config.suffixes(declared)))
        return loaded

    monkeypatch.setattr(runtime, "_load", load_and_attach)
    session = COMPRESSED_TENSORS.session(folder, 1)
    assert (session.level, session.notes) == ("ran", ())
    (expected,) = stream_logits(made, IDS[:1])
    assert torch.allclose(torch.from_numpy(session.logits(IDS[:1].numpy()))[0], expected, atol=1e-4)


def test_a_matrix_without_a_place_stops_the_run(folder: Path) -> None:
    module = runtime._load(folder, json.loads((folder / "config.json").read_text()))
    declared = {"config_groups": schemes_of(folder)}
    with pytest.raises(RuntimeError, match="no place for elsewhere"):
        transform_config.attach(module, declared, {"elsewhere": torch.ones(1)})


def test_the_plan_says_who_reads_it(made: Model) -> None:
    answers = plan_layers(COMPRESSED_TENSORS, made.structure.layers, PROFILE)
    answer = answers["model.layers.0.mlp.down_proj"]
    assert isinstance(answer, Choice) and "transformers 5.23 passes over transform_config" in str(answer.note)


@pytest.mark.parametrize("target", [GPTQ, AWQ, BITSANDBYTES], ids=lambda target: target.layout.name)
def test_layouts_without_a_place_for_transforms_name_the_one_that_has(made: Model, tmp_path: Path, target: Any) -> None:
    with pytest.raises(UsageError, match=r"model\.layers\.0\.\S+ cannot .* at run time: .*--target checkpoint"):
        target.write(made, PROFILE, tmp_path / "out")


def test_what_no_scheme_expresses_is_refused(model: Model, tmp_path: Path) -> None:
    spec = model.structure.layers["model.layers.0.mlp.down_proj"]
    for changes, reason in (
        ({"pre": (Hadamard(32), Hadamard(16))}, "one transform to a layer"),
        ({"pre": (Hadamard(64),)}, "96 of them are no multiple of the block"),
        ({"pre": (Hadamard(32),), "kind": LayerKind.EXPERT}, "never of one of kind expert"),
        ({"pre": (Hadamard(32),), "turned": True}, "never of a Conv1D"),
    ):
        answer = COMPRESSED_TENSORS.plan_layer(replace(spec, **changes), PROFILE)  # type: ignore[arg-type]
        assert isinstance(answer, Refusal) and reason in answer.reason
    made = Pipeline.parse("hadamard(block=32)").run(model).model
    with pytest.raises(UsageError, match="no quantized layer in the model"):
        COMPRESSED_TENSORS.write(made, PROFILE, tmp_path / "out")


def test_the_config_is_what_compressed_tensors_validates(model: Model) -> None:
    from compressed_tensors.transform import TransformConfig

    spec = model.structure.layers["model.layers.0.mlp.down_proj"]
    moved = [Packed("a.b", replace(spec, pre=(Hadamard(32, seed),))) for seed in (None, 1)]
    read = TransformConfig.model_validate(transform_config.config(moved))
    assert {name: scheme.type for name, scheme in read.config_groups.items()} == {
        "hadamard_32": "hadamard",
        "hadamard_32_seed_1": "random-hadamard",
    }
    assert set(transform_config.tensors(moved)) == {"a.b.hadamard_32_seed_1_input.weight"}
