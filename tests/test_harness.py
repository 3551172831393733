"""Tasks of lm-evaluation-harness from local files: no network. Skipped without the extra `eval`, but for what is said
then."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import compress
import compress.report
from compress import artifact as artifacts
from compress import hwprofiles
from compress.__main__ import main
from compress.artifact import Artifact, evaluate_tasks
from compress.errors import InputError, UnsupportedError, UsageError
from compress.inputs.prompts import read_reader
from compress.quality.harness import TaskRequest, answer_key
from compress.quality.harness_logs import pair_logs
from compress.recipe import Recipe, TaskSettings
from compress.records import Gate, Report
from compress.records.task import Tasks
from compress.report.task_rows import task_table
from compress.sweep.setup import SweepRequest, prepare

CHOICE = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: label
target_delimiter: " "
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
metadata:
  version: 1
"""
ROLLING = """
task: local_text
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{question}}}}"
metric_list:
  - metric: word_perplexity
  - metric: bits_per_byte
metadata:
  version: 1
"""


@pytest.fixture(scope="module")
def pair(make_artifact: Callable[..., Path], llama: Path) -> Artifact:
    """The uncompressed Llama as an artifact of itself, which its manifest says where to find."""
    out = make_artifact(llama, "onnx")
    found = artifacts.open_artifact(out)
    facts = {"source": str(llama), "source_digest": compress.load(llama).digest, "recipe": {"passes": ""}}
    return Artifact(out, {**found.facts, **facts})


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, draw = tmp_path_factory.mktemp("tasks"), random.Random(0)
    words = ["tree", "river", "stone", "blue", "window", "under"]
    rows = []
    for _ in range(12):
        choices = draw.sample(words, 3)
        rows.append({"question": " ".join(draw.choices(words, k=4)), "choices": choices, "label": draw.randrange(3)})
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "choice.yaml").write_text(CHOICE.format(name="local_choice", data=data))
    (folder / "text.yaml").write_text(ROLLING.format(data=data))
    return folder


@pytest.fixture(scope="module")
def found(pair: Artifact, tasks: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Tasks, Path]:
    pytest.importorskip("lm_eval", reason="needs the extra `eval`")
    out = tmp_path_factory.mktemp("kept")
    request = TaskRequest(("local_choice", "local_text"), limit=8, folder=tasks, out=out, max_loss=0.5)
    return evaluate_tasks(pair, request), out


def test_without_the_extra_the_error_names_it(pair: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UnsupportedError, match=r"pip install 'compress\[eval\]'"):
        evaluate_tasks(pair, TaskRequest(("local_choice",)))


def test_a_model_against_itself_neither_gains_nor_loses(found: tuple[Tasks, Path]) -> None:
    scores = {score.name: score for score in found[0].scores}
    assert sorted(scores) == ["local_choice acc", "local_text bits_per_byte", "local_text word_perplexity"]
    choice, text = scores["local_choice acc"], scores["local_text word_perplexity"]
    assert choice.samples == text.samples == 8
    assert (choice.gained, choice.lost, choice.p_holm) == (0, 0, 1.0)
    assert choice.chance == pytest.approx(1 / 3) and choice.interval and choice.interval.low < 0 < choice.interval.high
    assert text.unit == "nats" and text.better == "lower" and text.change == pytest.approx(0, abs=1e-6)
    assert all(isinstance(gate, Gate) and gate.met for gate in found[0].gates if "local_text" in gate.name)
    rows = task_table(found[0]).rows
    assert rows[0][:3] == ("local_choice", "acc", "8")


def test_likelihoods_are_those_of_the_harnesss_own_torch_model(
    found: tuple[Tasks, Path], llama: Path, tasks: Path
) -> None:
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    from transformers import AutoTokenizer

    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    tokenizer = AutoTokenizer.from_pretrained(llama)
    tokenizer.eos_token = tokenizer.pad_token = tokenizer.convert_ids_to_tokens(2)  # it will not run without one
    model = HFLM(pretrained=str(llama), tokenizer=tokenizer, device="cpu", batch_size=1, dtype="float32")
    twin = lm_eval.simple_evaluate(
        model=model, tasks=["local_choice"], limit=8, task_manager=manager, bootstrap_iters=0
    )
    lines = (found[1] / "baseline" / "local_choice.jsonl").read_text().splitlines()
    for ours, theirs in zip(map(json.loads, lines), twin["samples"]["local_choice"], strict=True):
        assert ours["acc"] == theirs["acc"]
        for mine, other in zip(ours["filtered_resps"], theirs["filtered_resps"], strict=True):
            assert mine[0] == pytest.approx(other[0], abs=1e-3) and mine[1] == other[1]


def test_samples_of_both_models_are_kept_and_answers_are_not_asked_for_twice(
    found: tuple[Tasks, Path], pair: Artifact, tasks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept, out = found
    for arm in ("baseline", "variant"):
        lines = (out / arm / "local_choice.jsonl").read_text().splitlines()
        assert len(lines) == 8 and "acc" in json.loads(lines[0])
    monkeypatch.setattr("compress.quality.harness_model.HarnessModel._pair", None)
    monkeypatch.setattr("compress.quality.harness_model.HarnessModel._rolling", None)
    request = TaskRequest(("local_choice", "local_text"), limit=8, folder=tasks, out=out, max_loss=0.5)
    assert evaluate_tasks(pair, request) == kept
    assert Tasks.model_validate_json((out / "tasks.json").read_text()) == kept


def test_no_two_models_runtimes_or_versions_share_answers(pair: Artifact) -> None:
    reader = read_reader(pair.deployable)
    original, variant, other = ({"model": name} for name in ("a", "b", "c"))
    keys = [
        answer_key(original, "onnxruntime", reader, "1"),
        answer_key(variant, "onnxruntime", reader, "1"),
        answer_key(other, "onnxruntime", reader, "1"),
        answer_key(variant, "another", reader, "1"),
        answer_key(variant, "onnxruntime", reader, "2"),
    ]
    assert len(set(keys)) == len(keys)


def test_a_recipe_may_name_tasks_which_are_then_in_the_report_and_its_gates(
    llama: Path, text_file: Path, tasks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("lm_eval", reason="needs the extra `eval`")
    recipe = tmp_path / "recipe.yaml"
    named = {"names": ["local_choice"], "folder": str(tasks), "limit": 6, "max_loss": 0.001}
    recipe.write_text(json.dumps({"passes": "rtn(bits=4)", "tasks": named}))
    out = tmp_path / "out"
    given = ["--recipe", recipe, "--data", text_file, "-o", out, "--profile", "cpu-x86-avx512-vnni", "--length", 64]
    code = main(["run", *map(str, [llama, *given, "--quality-samples", 8, "--budget", 0.2, "--quiet"])])
    # six samples cannot show that so little is lost
    assert code == 3, capsys.readouterr().err
    report = compress.report.load(out / "report.json")
    assert isinstance(report, Report) and report.tasks is not None and report.tasks.scores[0].samples == 6
    assert [gate.name for gate in report.gates if not gate.met] == ["loss of local_choice acc"]
    assert "local_choice" in (out / "report.html").read_text()
    assert len((out / "tasks" / "variant" / "local_choice.jsonl").read_text().splitlines()) == 6


def test_a_misspelt_task_of_a_recipe_is_found_before_any_work(
    llama: Path, tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("lm_eval", reason="needs the extra `eval`")
    monkeypatch.setattr("compress.run.load_data", None)  # the first of the work
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps({"passes": "rtn", "tasks": {"names": ["local_choise"], "folder": str(tasks)}}))
    given = ["--recipe", recipe, "--data", tasks / "data.jsonl", "-o", tmp_path / "out", "--profile", "cpu-x86-avx2"]
    assert main(["run", str(llama), *map(str, given)]) == 2
    assert "Did you mean 'local_choice'" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out.partial").exists()


def test_several_recipes_at_once_refuse_tasks_and_say_what_scores_them(
    llama: Path, text_file: Path, tmp_path: Path
) -> None:
    settings = TaskSettings(names=("local_choice",))
    recipes = tuple(
        Recipe(name=name, passes=f"rtn(bits={bits})", tasks=settings) for name, bits in (("a", 4), ("b", 8))
    )
    request = SweepRequest(str(llama), recipes, hwprofiles.load("cpu-x86-avx2"), tmp_path / "out", str(text_file))
    with pytest.raises(UsageError, match="compress eval OUT --tasks"):
        prepare(request)


def test_an_unknown_task_and_a_missing_folder_are_named(pair: Artifact, tasks: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="needs the extra `eval`")
    with pytest.raises(UsageError, match="Did you mean 'local_choice'"):
        evaluate_tasks(pair, TaskRequest(("local_choise",), folder=tasks))
    with pytest.raises(UsageError, match="No such folder of tasks"):
        evaluate_tasks(pair, TaskRequest(("local_choice",), folder=tmp_path / "none"))


def test_a_task_whose_data_are_missing_ends_with_what_the_harness_says(pair: Artifact, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="needs the extra `eval`")
    (tmp_path / "broken.yaml").write_text(CHOICE.format(name="broken", data=tmp_path / "none.jsonl"))
    with pytest.raises(InputError, match="lm-evaluation-harness stopped"):
        evaluate_tasks(pair, TaskRequest(("broken",), folder=tmp_path))


def log(values: list[Any], told: float, metric: str = "acc") -> dict[str, Any]:
    """As the harness gives it."""
    samples = [
        {
            "doc_id": place, "doc_hash": str(place), "prompt_hash": "p", "target_hash": "t", "filter": "none",
            "metrics": [metric], metric: value, "arguments": [("q", "a"), ("q", "b")],
        }
        for place, value in enumerate(values)
    ]  # fmt: skip
    return {"samples": {"t": samples}, "results": {"t": {f"{metric},none": told}}}


def test_a_figure_that_is_no_mean_of_its_samples_is_left_out_by_name() -> None:
    pairs, notes = pair_logs(log([1.0, 0.0, 1.0], 0.8, "f1"), log([1.0, 0.0, 0.0], 0.5, "f1"))
    assert not pairs and notes == ("t f1 is no mean over samples, so it is not paired and left out",)
    pairs, notes = pair_logs(log([1.0, 0.0], 0.5), log([1.0, 1.0], 1.0))
    assert not notes and pairs[0].chance == 0.5 and pairs[0].higher


def test_different_samples_are_never_paired() -> None:
    one, two = log([1.0, 0.0], 0.5), log([1.0, 0.0], 0.5)
    two["samples"]["t"][1]["doc_hash"] = "another"
    with pytest.raises(InputError, match="different samples"):
        pair_logs(one, two)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((), "--data FILE, or --tasks"),
        (("--data", "x.txt", "--limit", "3"), "--limit goes with --tasks only"),
        (("--tasks", "a", "--data", "x.txt"), "--data does not go with --tasks"),
        (("--tasks", ","), "names no task"),
    ],
)
def test_options_of_the_other_kind_are_refused(
    given: tuple[str, ...], message: str, lm_out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["eval", str(lm_out), *given]) == 2
    assert message in " ".join(capsys.readouterr().err.split())
