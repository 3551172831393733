"""The exported folder in onnxruntime-genai and optimum, and the comparison itself."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

INTEROP = Path(__file__).resolve().parents[1] / "benchmarks" / "interop"
PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [200], [30, 40, 50]]


@pytest.fixture(scope="module")
def artifacts(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What `compress run` writes, as far as the comparison reads it: a float folder and one with int4 weights."""
    import compress
    from compress import hwprofiles, manifest
    from compress.export.onnx import target
    from compress.pipeline import Pipeline

    made, profile = {}, hwprofiles.load("cpu-x86-avx2")
    source = compress.load(str(llama))
    for name, text in (("float", ""), ("int4", "rtn(format=int4(group=32))")):
        made[name] = tmp_path_factory.mktemp("artifacts") / name
        model = Pipeline.parse(text).run(source, folder=made[name] / "model").model if text else source
        target.write(model, profile, made[name] / "onnx")
        rows = [[(7 * place + 11 * row) % 251 for place in range(128)] for row in range(2)]
        manifest.write(made[name], {"verification": {"ids": rows}}, ("onnx",))
    return made


@pytest.fixture
def tokens(monkeypatch: pytest.MonkeyPatch) -> Any:
    """benchmarks/interop/tokens.py."""
    monkeypatch.syspath_prepend(str(INTEROP))
    return import_module("tokens")


@pytest.fixture
def envs() -> Path:
    """The environments of build_envs.py."""
    folder = os.environ.get("COMPRESS_INTEROP_ENVS")
    if not folder:
        pytest.skip("no environments of onnxruntime-genai and optimum (COMPRESS_INTEROP_ENVS names their folder)")
    return Path(folder)


def compare(
    artifacts: dict[str, Path], envs: Path, out: Path
) -> tuple[subprocess.CompletedProcess[str], dict[str, Any]]:
    command = [sys.executable, str(INTEROP / "compare.py"), *map(str, artifacts.values())]
    command += ["--envs", str(envs), "--json", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done, json.loads(out.read_text(encoding="utf8"))


def test_genai_and_optimum_generate_the_tokens_of_our_session(
    artifacts: dict[str, Path], envs: Path, tmp_path: Path
) -> None:
    done, result = compare(artifacts, envs, tmp_path / "interop.json")
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [row for artifact in result["artifacts"] for row in artifact["rows"] if row["runtime"] != "onnxruntime"]
    assert len(rows) == 6 * len(artifacts)  # genai runs both graphs
    assert not [row for row in rows if row["refusal"] or row["differences"]]


@pytest.mark.parametrize("text", ["int8(channel)", "int4(channel)", "int8(tensor)"])
def test_genai_generates_the_tokens_of_our_session_with_a_cache_in_codes(
    text: str, llama: Path, envs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    import compress
    from compress import hwprofiles
    from compress.export.onnx import target
    from compress.kv.spec import KvSpec

    monkeypatch.syspath_prepend(str(INTEROP))
    source, spec = compress.load(str(llama)), KvSpec(keys=text, values=text, static=True)
    made = dataclasses.replace(source, kv=(spec,) * len(source.attentions))
    shape = (1, 1) if text == "int8(tensor)" else (source.attentions[0].kv_heads, source.attentions[0].size)
    top = 7 if text.startswith("int4") else 127
    vars(made)["kv_tensors"] = tuple({name: torch.full(shape, 1 / top) for name in spec.wants} for _ in made.kv)
    target.write(made, hwprofiles.load("cpu-x86-avx2"), tmp_path)
    ours = [target.session(tmp_path, 1).greedy(prompt, 32) for prompt in PROMPTS]
    config = json.loads((tmp_path / "genai_config.json").read_text())["model"]
    pad, end = config["pad_token_id"], config["eos_token_id"]
    run_client = import_module("clients").run_client
    assert run_client(envs, "genai", tmp_path, PROMPTS, 32)[1] == ours
    batch = run_client(envs, "genai", tmp_path, PROMPTS, 32, pad)[1]
    for theirs, own in zip(batch, ours, strict=True):  # a row that has ended means nothing beyond
        count = own.index(end) + 1 if end in own else len(theirs)
        assert theirs[:count] == own[:count]


def test_a_runtime_that_is_not_there_fails_the_comparison(artifacts: dict[str, Path], tmp_path: Path) -> None:
    done, result = compare({"float": artifacts["float"]}, tmp_path / "nothing", tmp_path / "interop.json")
    assert done.returncode == 1
    assert not result["passes"]
    assert "genai did not run" in done.stdout
    assert "build_envs.py" in done.stdout


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_does_not_change_the_tokens_of_a_float_graph(
    artifacts: dict[str, Path], tokens: Any, side: str
) -> None:
    from compress.export.onnx.runtime import Session

    session = Session(artifacts["float"] / "onnx", threads=1)
    alone = [session.greedy(prompt, 12) for prompt in PROMPTS]
    assert tokens.greedy_batch(session, PROMPTS, pad=77, side=side, count=12) == alone


def test_a_wrong_token_is_found_with_its_position_and_margin(artifacts: dict[str, Path], tokens: Any) -> None:
    from compress.export.onnx.runtime import Session

    session = Session(artifacts["float"] / "onnx", threads=1)
    ours = [session.greedy(prompt, 6) for prompt in PROMPTS]
    theirs = [list(row) for row in ours]
    theirs[1][3] = (theirs[1][3] + 1) % 256
    (found,) = tokens.compare(session, PROMPTS, ours, theirs)
    assert (found.prompt, found.position, found.ours, found.theirs) == (1, 3, ours[1][3], theirs[1][3])
    assert found.margin > 0
    assert "differs at 3" in found.text()


def test_a_list_that_ends_early_differs_where_it_ends(tokens: Any) -> None:
    assert tokens.first_difference([1, 2, 3], [1, 2]) == 2
    assert tokens.first_difference([1, 2], [1, 2]) is None


def test_prompts_leave_room_for_the_tokens_to_generate(tokens: Any) -> None:
    from compress.errors import InputError

    prompts = tokens.choose_prompts([list(range(512))], context=1024, count=64)
    assert [len(prompt) for prompt in prompts] == [16, 16, 16, 1, 100]
    assert [prompt[0] for prompt in prompts] == [0, 128, 256, 0, 0]
    assert [len(prompt) for prompt in tokens.choose_prompts([list(range(128))], context=80, count=64)] == [16, 1, 16]
    with pytest.raises(InputError, match="no room"):
        tokens.choose_prompts([[1, 2]], context=64, count=64)


def test_the_environments_are_in_a_folder_that_git_ignores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(INTEROP))
    patterns = (INTEROP.parents[1] / ".gitignore").read_text(encoding="utf8").splitlines()
    assert import_module("build_envs").DEFAULT.name.startswith(".venv")
    assert ".venv*/" in patterns
