"""`compress report`: the same report as a page, a model card and an in-toto statement."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard

from compress import manifest as manifests
from compress.__main__ import main
from compress.errors import InputError
from compress.provenance import statement
from compress.records import Asked, Interval, Metric, Quality, Report
from compress.report import to_html, to_markdown
from compress.report.model_card import to_model_card
from helpers.reports import report_of, speed_of, timing_of

HOSTILE = '<img src=x onerror=alert(1)>\n---\nlicense: mit\n"`|\x1b[31m\u202e'
DIGEST = "ab" * 32


def asked(**changes: Any) -> Asked:
    given: dict[str, Any] = {"task": "causal-lm", "is_local": False, "recipe": {}, "profile": {}, "options": {}}
    return Asked(threads=1, code_digest="00", **{**given, **changes})


def report(**changes: Any) -> Report:
    interval = Interval(low=0.004, high=0.006)
    kl = Metric(value=0.005, interval=interval, samples=9, unit="nats/token", protocol="ppl/64", better="lower")
    quality = Quality(subject="compressed", where="onnxruntime", metrics={"kl": kl}, data_digest="00")
    given: dict[str, Any] = {
        "title": "small, int4",
        "source": "org/small",
        "recipe": "gptq(bits=4)",
        "versions": {"compress": "0.1.0"},
        "calibration": {"source": "calib.txt", "windows": 128},
        "artifact_quality": quality,
        "speed": speed_of(timing_of(2.0, 0.1), runtime="ort"),
        "verdict": "twice as fast.",
        "request": asked(),
    }
    return report_of(**{**given, **changes})


def front_matter(card: str) -> dict[str, Any]:
    assert card.startswith("---\n")
    content: dict[str, Any] = yaml.safe_load(card[4:].split("\n---\n")[0])
    return content


def test_a_model_card_has_what_the_hub_reads_and_what_people_ask() -> None:
    card = to_model_card(report())
    assert front_matter(card) == {
        "base_model": "org/small",
        "base_model_relation": "quantized",
        "library_name": "onnx",
        "pipeline_tag": "text-generation",
        "tags": ["compress", "onnx", "quantized"],
    }
    data = ModelCard(card).data  # the hub's own reader
    assert (data.base_model, data.library_name, data.pipeline_tag) == ("org/small", "onnx", "text-generation")
    for text in ("twice as fast.", "0.0050 (0.0040 to 0.0060)", "2.00x (1.90 to 2.10)", "gptq(bits=4)", "calib.txt"):
        assert text in card, text
    assert "ORTModelForCausalLM" in card and "license" in card.split("Not known to the report")[1]


@pytest.mark.parametrize(
    ("target", "task", "words"),
    [
        ("checkpoint-gptq", "causal-lm", "AutoModelForCausalLM.from_pretrained"),
        ("checkpoint", "encoder", "AutoModel.from_pretrained"),
        ("onnx", "image-classifier", "onnxruntime.InferenceSession"),
        ("tensorrt", "causal-lm", "`compress generate OUT`"),
    ],
)
def test_a_model_card_tells_how_to_load_what_was_made(target: str, task: str, words: str) -> None:
    card = to_model_card(report(target=target, request=asked(task=task)))
    assert words in card.split("## How to load it")[1]
    for code in card.split("```python\n")[1:]:
        compile(code.split("\n```")[0], "card", "exec")


@pytest.mark.parametrize("request_of", [None, asked(is_local=True)])
def test_a_model_card_guesses_no_base_model_and_tells_no_path(request_of: Asked | None) -> None:
    card = to_model_card(report(source="home/someone/models/small", request=request_of))
    assert "base_model" not in front_matter(card) and "someone" not in card and "`small`" in card
    assert "and `base_model`" in card


def test_hostile_names_stay_text_in_a_model_card() -> None:
    given = report(
        title=HOSTILE, source=HOSTILE, recipe=f"{HOSTILE}\n```", profile=HOSTILE, target=HOSTILE, verdict=HOSTILE,
        calibration={HOSTILE: HOSTILE}, versions={"compress": HOSTILE}, source_digest=HOSTILE,
        request=asked(task=HOSTILE),
    )  # fmt: skip
    card = to_model_card(given)
    assert front_matter(card) == {"tags": ["compress", "quantized"]}
    before, fence, rest = card.partition("````text\n")
    assert fence and "<img" not in before + rest.split("\n````\n")[1]
    assert not {"\x1b", "\u202e"} & set(card)


def manifest(**changes: Any) -> dict[str, Any]:
    files = {"onnx/model.onnx": {"size": 3, "sha256": DIGEST}, "model/a.json": {"size": 1, "sha256": "cd" * 32}}
    given: dict[str, Any] = {
        "schema_version": 1,
        "source": "org/small",
        "source_digest": "00",
        "recipe": {"name": "w4a16", "passes": "rtn"},
        "profile": {"id": "cpu", "target": "onnx", "runtimes": {}},
        "seed": 0,
        "calibration": {"digest": "11"},
        "versions": {"compress": "0.1.0", "torch": "2.13.0+cpu"},
        "files": files,
    }
    return {**given, **changes}


def test_the_subjects_of_the_statement_are_the_files_of_the_manifest() -> None:
    found = statement(manifest())
    assert found["_type"] == "https://in-toto.io/Statement/v1"
    assert found["predicateType"] == "https://slsa.dev/provenance/v1"
    subjects = {each["name"]: each["digest"] for each in found["subject"]}
    assert subjects == {name: {"sha256": facts["sha256"]} for name, facts in manifest()["files"].items()}
    build = found["predicate"]["buildDefinition"]
    assert build["externalParameters"]["recipe"] == {"name": "w4a16", "passes": "rtn"}
    assert build["externalParameters"]["profile_target"] == "onnx"
    assert {"uri": "pkg:pypi/torch@2.13.0%2Bcpu"} in build["resolvedDependencies"]
    assert found["predicate"]["runDetails"]["builder"]["version"] == {"compress": "0.1.0", "torch": "2.13.0+cpu"}


@pytest.mark.parametrize(
    ("name", "facts"),
    [
        ("../up", {"sha256": DIGEST}),
        ("/root", {"sha256": DIGEST}),
        ("a\\b", {"sha256": DIGEST}),
        ("", {"sha256": DIGEST}),
        ("a", {"sha256": DIGEST.upper()}),
        ("a", {"sha256": 3}),
        ("a", {}),
        ("a", "ab"),
    ],
)
def test_a_manifest_that_names_no_file_by_its_digest_makes_no_statement(name: str, facts: Any) -> None:
    with pytest.raises(InputError, match="names no file below its folder"):
        statement(manifest(files={name: facts}))


@pytest.fixture
def out(tmp_path: Path) -> Path:
    folder = tmp_path / "my out"
    folder.mkdir()
    (folder / "report.json").write_text(report().model_dump_json(), encoding="utf8")
    (folder / "manifest.json").write_text(json.dumps(manifest()), encoding="utf8")
    return folder


def test_every_form_is_printed_and_written(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    forms = {
        "--html": to_html(report(), out),
        "--markdown": to_markdown(report(), out),
        "--json": report().model_dump_json(indent=1) + "\n",
        "--model-card": to_model_card(report()),
        "--in-toto": json.dumps(statement(manifest()), indent=1) + "\n",
    }
    for option, text in forms.items():
        assert main(["report", str(out), option]) == 0
        assert capsys.readouterr().out == text, option
        path = out.parent / f"made{option}"
        assert main(["report", str(out / "report.json"), option, "-o", str(path)]) == 0
        assert path.read_text(encoding="utf8") == text, option
    assert main(["report", str(out)]) == 0
    assert "twice as fast." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--html", "--markdown"], "give one of them"),
        (["-o", "x"], "say what to write"),
        (["--html", "-o", "report.json"], "exists"),
        (["--html", "-o", "none/x.html"], "there is no folder"),
    ],
)
def test_a_wrong_use_is_one_paragraph(
    out: Path, arguments: list[str], words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(out)
    assert main(["report", str(out), *arguments]) == 2
    assert words in capsys.readouterr().err


def test_a_page_is_replaced_where_that_is_asked_for(out: Path) -> None:
    assert main(["report", str(out), "--markdown", "-o", str(out / "report.md")]) == 0
    assert main(["report", str(out), "--html", "-o", str(out / "report.md"), "--overwrite"]) == 0
    assert (out / "report.md").read_text(encoding="utf8") == to_html(report(), out)


@pytest.fixture
def nested(out: Path) -> Path:
    """An artifact whose files are there, in a sweep."""
    (out / "onnx").mkdir()
    (out / "onnx" / "model.onnx").write_bytes(b"graph")
    facts = {key: value for key, value in manifest().items() if key not in ("files", "versions", "schema_version")}
    manifests.write(out, facts, ("onnx", "report.json"))
    manifests.write(out.parent, {"kind": "sweep"}, (out.name,))
    return out


def test_a_card_beside_the_graph_is_in_every_manifest_and_in_the_statement(
    nested: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    card = nested / "onnx" / "README.md"
    for more in ([], ["--overwrite"]):
        assert main(["report", str(nested), "--model-card", "-o", str(card), *more]) == 0
        manifests.check_files(nested)
        manifests.check_files(nested.parent)
    assert main(["report", str(nested), "--in-toto"]) == 0
    subjects = {each["name"]: each["digest"]["sha256"] for each in json.loads(capsys.readouterr().out)["subject"]}
    assert subjects["onnx/README.md"] == hashlib.sha256(card.read_bytes()).hexdigest()
    assert main(["report", str(nested), "--markdown", "-o", str(nested / "report.md")]) == 0
    manifests.check_files(nested)


@pytest.mark.parametrize("name", ["onnx/model.onnx", "manifest.json", "report.json"])
def test_no_page_takes_the_place_of_a_file_that_the_artifact_was_made_with(
    nested: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", str(nested), "--model-card", "-o", str(nested / name), "--overwrite"]) == 2
    assert "the artifact was made with" in capsys.readouterr().err
    manifests.check_files(nested)


def test_an_extra_file_is_said_to_be_harmless(nested: Path) -> None:
    (nested / "onnx" / "notes.txt").write_text("x")
    with pytest.raises(InputError, match=r"onnx/notes\.txt.*harmless to delete"):
        manifests.check_files(nested)
