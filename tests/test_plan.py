"""`plan`: what it predicts is what a run stores, what it refuses a run refuses, and it needs no weights."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

import compress
from compress import hwprofiles, plan, quickstart, recipe
from compress.__main__ import main
from compress.errors import ResourceError, UnsupportedError, UsageError
from compress.export import find
from compress.models.model import Model
from compress.pipeline import Pipeline
from compress.plan import make_plan, refusal
from compress.records import Plan
from compress.speed.footprint import deployable_bytes

PROFILE = hwprofiles.load("cpu-x86-avx512-vnni")
Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def model(llama: Path) -> Model:
    return compress.load(llama)


def planned(model: Model, passes: str) -> Plan:
    return make_plan(model, recipe.of_passes(passes), PROFILE)


@pytest.mark.parametrize(
    ("passes", "bars"),
    [
        # w4a16 with rounding for GPTQ, which stores the same bytes
        ("rtn(format=int4(group=32)), rtn(format=int8(group=32), targets=[kind:embedding, kind:head])", 0.02),
        # w8a8-int8 but for the smoothing, which needs data and stores norms in float32
        ("rtn(format=int8(channel)), act_quant, rtn(format=int8(group=32), targets=[kind:embedding, kind:head])", 0.02),
        # a dozen nodes for a layer
        ("rtn(format=codebook(vector=4, entries=16, stages=2))", 0.02),
    ],
)
def test_the_predicted_artifact_is_within_2_percent_of_the_written_one(
    tmp_path: Path, passes: str, bars: float
) -> None:
    model, target = compress.load(quickstart.folder()), find(PROFILE.target)
    predicted = planned(model, passes)
    made = Pipeline.parse(passes).run(model, folder=tmp_path / "model").model
    lowered = target.write(made, PROFILE, tmp_path / "out")
    assert predicted.predicted_artifact_bytes == pytest.approx(deployable_bytes(lowered.folder), rel=bars)
    assert predicted.predicted_model_bytes == pytest.approx(deployable_bytes(tmp_path / "model"), rel=bars)
    found = {}
    for row in predicted.layers:
        found[row.operator] = found.get(row.operator, 0) + 1
    assert found == lowered.operators


def test_a_model_of_a_billion_parameters_is_planned_from_its_config_alone(tmp_path: Path, capsys: Capture) -> None:
    shape = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 2048, "intermediate_size": 5632,
        "num_hidden_layers": 22, "num_attention_heads": 32, "num_key_value_heads": 4, "vocab_size": 32000,
        "max_position_embeddings": 2048, "tie_word_embeddings": False, "dtype": "bfloat16",
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(shape))
    assert main(["plan", str(tmp_path), "--recipe", "w4a16", "--profile", PROFILE.id, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found["layers"]) == 22 * 7 + 2 and found["refusals"] == []
    assert found["source_bytes"] == pytest.approx(2 * 1.1e9, rel=0.01)
    assert 0.22 < found["predicted_artifact_bytes"] / found["source_bytes"] < 0.4
    assert found["predicted_peak_memory_bytes"] > 1e9 and found["predicted_seconds"] > 60
    assert main(["plan", str(tmp_path), "--recipe", "w4a16", "--profile", PROFILE.id]) == 0
    assert "model.layers.*.self_attn.q_proj" in capsys.readouterr().out


def test_layers_are_counted_per_pattern_and_equal_passes_stay_apart(model: Model) -> None:
    embedding = "rtn(format=int8(group=32), targets=[kind:embedding, kind:head])"
    found = planned(model, f"rtn(format=int4(group=32), targets=[*.q_proj, *.mlp.*]), {embedding}")
    assert next(iter(found.matches.values())) == {"*.q_proj": 3, "*.mlp.*": 9}
    assert list(found.matches)[1] == embedding
    untouched = [row.layer for row in found.layers if not row.passes]
    assert len(untouched) == 9 and all(row.reason for row in found.layers if not row.passes)
    twice = plan._matches(["rtn", "gptq", "rtn"], [{"a": 1}, {"b": 2}, {"c": 3}])
    assert twice == {"rtn (pass 1)": {"a": 1}, "gptq": {"b": 2}, "rtn (pass 3)": {"c": 3}}


def test_a_group_that_another_setting_would_replace_is_exit_code_2_for_plan_and_run(
    model: Model, llama: Path, text_file: Path, tmp_path: Path, capsys: Capture
) -> None:
    given = [str(llama), "--passes", "rtn(format=int4(group=48))", "--profile", PROFILE.id, "--json"]
    assert main(["plan", *given]) == 2
    found = json.loads(capsys.readouterr().out)
    assert found["refused_settings"] and "first model.layers.0.self_attn.q_proj: int4(group=48)" in found["refusals"][0]
    assert {row["kernel"] for row in found["layers"] if row["passes"]} == {"no"}
    assert not any("that no pass touches" in text for text in found["warnings"])
    assert main(["run", *given, "--data", str(text_file), "-o", str(tmp_path / "out")]) == 2
    assert "group=48" in json.loads(capsys.readouterr().out)["error"]["message"]
    assert isinstance(refusal(planned(model, "rtn(format=int4(group=48))")), UsageError)


def test_what_no_setting_of_the_profile_stores_is_exit_code_4(model: Model) -> None:
    runtime = PROFILE.runtime("onnxruntime")
    formats = [entry for entry in runtime.formats if 4 not in entry.bits]
    without = PROFILE.model_copy(update={"runtimes": {"onnxruntime": runtime.model_copy(update={"formats": formats})}})
    found = make_plan(model, recipe.of_passes("rtn(format=int4(group=32))"), without)
    assert found.refusals and not found.refused_settings
    assert isinstance(refusal(found), UnsupportedError)


def test_more_memory_than_there_is_is_a_warning_of_the_plan_and_stops_a_run(
    model: Model, llama: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    assert refusal(planned(model, "rtn")) is None
    monkeypatch.setattr(plan, "allowed_memory", lambda: 400_000_000)
    found = planned(model, "rtn(format=int4(group=32))")
    text = f"{found.predicted_peak_memory_bytes / 1e9:.1f} GB of memory (predicted), but this machine has 0.4 GB"
    assert any(text in warning for warning in found.warnings)
    assert isinstance(refusal(found), ResourceError)
    given = [str(llama), "--recipe", "w8a16", "--profile", PROFILE.id, "--json"]
    assert main(["plan", *given]) == 0
    capsys.readouterr()
    assert main(["run", *given, "--data", str(text_file), "-o", str(tmp_path / "out")]) == 6
    assert "but this machine has 0.4 GB" in json.loads(capsys.readouterr().out)["error"]["message"]
    assert not list(tmp_path.iterdir())


def test_untouched_layers_are_told_where_they_take_much(model: Model) -> None:
    found = planned(model, "rtn(format=int4(group=32), targets=[*.q_proj])")
    assert any("that no pass touches take" in text for text in found.warnings)
    alone = planned(model, "rtn(format=int4(group=32))").warnings
    (told,) = [text for text in alone if text.startswith("1 layer(s) that no pass touches")]
    assert told.endswith(": model.embed_tokens"), "a single layer has no others"


def test_a_kernel_that_is_fast_for_some_uses_is_a_note_that_says_for_which(model: Model) -> None:
    found = planned(model, "rtn(format=int8(group=32))")
    (note,) = found.notes
    assert "decode is" in note and "faster than float32" in note and "recipe w8a8-int8 is quicker" in note
    assert not any("not fast" in text for text in found.warnings)


def test_an_artifact_larger_than_its_source_is_warned_of_and_its_parts_are_told() -> None:
    folder, chip = quickstart.folder(), hwprofiles.load("nvidia-h200")
    wide = make_plan(compress.load(folder), recipe.of_passes("rtn(format=int8(group=32))"), chip)
    assert (wide.predicted_artifact_bytes > wide.source_bytes) == any(
        "larger than the source" in t for t in wide.warnings
    )
    assert plan._larger(2_000_000, 1_000_000)[0].startswith(
        "The artifact is predicted larger than the source: 2.0 MB against 1.0 MB."
    )
    assert not plan._larger(1, 1)
    (told,) = plan._notes((), {"the engine": 3_000_000, "the graph": 1_500_000})
    assert told.startswith("The artifact's folder holds the engine 3.0 MB + the graph 1.5 MB (predicted)")


def test_a_profile_that_lacks_the_runtime_is_exit_code_2(llama: Path, tmp_path: Path, capsys: Capture) -> None:
    source = Path(hwprofiles.__file__).with_name(f"{PROFILE.id}.yaml").read_text()
    changed = tmp_path / f"{PROFILE.id}.yaml"
    changed.write_text(source.replace("\n  onnxruntime:", "\n  otherruntime:"))
    assert main(["plan", str(llama), "--passes", "rtn", "--profile", str(changed), "--json"]) == 2
    assert "no runtime 'onnxruntime'" in json.loads(capsys.readouterr().out)["error"]["message"]


@pytest.mark.parametrize("given", [["passes"], ["passes", "gptq"], ["hardware", "list"], ["hardware", "detect"]])
def test_json_is_one_object(given: list[str], capsys: Capture) -> None:
    assert main([*given, "--json"]) == 0
    assert isinstance(json.loads(capsys.readouterr().out), dict)


def test_quickstart_has_help(capsys: Capture) -> None:
    assert main(["quickstart", "--help"]) == 0
    assert "--out" in capsys.readouterr().out


def test_the_quickstart_asks_for_what_ships(tmp_path: Path) -> None:
    made = quickstart.request(tmp_path / "my out")
    assert made.command == f"compress quickstart -o '{tmp_path / 'my out'}'"
    assert Path(made.recipe.calibration.data or "").is_file() and Path(made.recipe.quality.data or "").is_file()


def test_a_plan_names_what_a_config_without_weights_cannot_do(make_llama: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((make_llama("bare") / "config.json").read_text())
    bare = compress.load(tmp_path, weights=False)
    assert planned(bare, "rtn(format=int4(group=32))").predicted_artifact_bytes > 0
    with pytest.raises(UsageError, match="only `plan` works without"):
        Pipeline.parse("rtn").run(bare)
