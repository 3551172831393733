"""An engine where its GPU is, here a stand-in (tests/stubs/tensorrt): text, classes, embeddings and paired times of it;
and what is said where the GPU or the engine is missing."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from transformers import BertConfig

import compress
from compress import hwprofiles
from compress.__main__ import main
from compress.artifact import open_artifact, profile
from compress.errors import UnsupportedError
from compress.export.tensorrt import building, engine, record, target
from compress.hwprofiles import Profile
from compress.report import load as load_report
from compress.runtime import probing
from compress.runtime.engine import Engine
from compress.target import Placement
from helpers.tensorrt_machine import CARD, TAKEN_BYTES, VERSIONS, Machine, becoming

PROMPTS = ["the river", "a stone runs over the blue tree", "x"]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Machine:
    """See helpers.tensorrt_machine."""
    return becoming(monkeypatch, tmp_path / "cache")


def short() -> Profile:
    """An H100 of one short cell for each phase, so at most two rows at once."""
    h100 = hwprofiles.load("nvidia-h100-sxm")
    grid = h100.grid.model_copy(update={"prefill": ((1, 16),), "decode": ((2, 16),)})
    return h100.model_copy(update={"grid": grid})


def exported(source: Path | str, out: Path) -> Path:
    model = compress.Pipeline.parse("rtn(format=int8(channel))").run(compress.load(source))
    return compress.export(model, profile=short(), out=out).folder


@pytest.fixture(scope="module")
def built(one_block: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Exported where the GPU is. Do not write into it."""
    folder = tmp_path_factory.mktemp("built")
    with pytest.MonkeyPatch.context() as patch:
        becoming(patch, folder / "cache")()
        return exported(one_block, folder / "out")


def opened(out: Path, **options: Any) -> Engine:
    found = compress.load(out, **options)
    assert isinstance(found, Engine)
    return found


def told(capsys: pytest.CaptureFixture[str]) -> str:
    return " ".join(capsys.readouterr().err.split())


def test_text_comes_from_the_engine_also_for_more_prompts_than_it_takes_at_once(built: Path, machine: Machine) -> None:
    machine()
    loaded, session = opened(built), open_artifact(built).session()
    kept = record.read(built / "tensorrt")
    assert loaded.placement == Placement(f"TensorRT {VERSIONS[1]}", CARD, 1, f"tensorrt/{kept.engine}")
    assert len(PROMPTS) > kept.ranges["decode"]["input_ids"][2][0]
    together = loaded.generate(PROMPTS, max_new_tokens=8)
    for prompt, row in zip(PROMPTS, together.rows, strict=True):
        assert loaded.generate(prompt, max_new_tokens=8).rows[0].tokens == row.tokens
        assert tuple(session.greedy(row.prompt_tokens, 8)) == row.tokens
    assert main(["generate", str(built), "--prompt", "the", "-n", "3"]) == 0


def test_without_the_gpu_the_reason_is_exit_code_4_and_anyway_runs_the_graph_on_the_cpu(
    built: Path, machine: Machine, capsys: pytest.CaptureFixture[str]
) -> None:
    machine()
    tokens = [row.tokens for row in opened(built).generate(PROMPTS, max_new_tokens=8).rows]
    machine(sm=None)
    given = ["generate", str(built), "--prompt", "the", "-n", "3"]
    assert main(given) == 4
    assert "It was made for NVIDIA H100 SXM: PyTorch sees no NVIDIA GPU here" in told(capsys)
    assert main(["profile", str(built)]) == 4
    assert "its speed can be measured there only" in told(capsys)
    assert main([*given, "--anyway"]) == 0
    assert "on CPU" in told(capsys)
    assert [row.tokens for row in opened(built, anyway=True).generate(PROMPTS, max_new_tokens=8).rows] == tokens


def test_where_the_engine_is_missing_verify_is_named_and_makes_it_usable(
    one_block: Path, tmp_path: Path, machine: Machine, capsys: pytest.CaptureFixture[str]
) -> None:
    out = exported(one_block, tmp_path / "out")
    machine()
    for verb in (["generate", str(out), "--prompt", "the", "-n", "2"], ["profile", str(out)]):
        assert main(verb) == 4
        assert "No engine was built. `compress verify OUT` builds one that runs here." in told(capsys)
    assert main(["verify", str(out)]) == 0
    assert opened(out).generate("the", max_new_tokens=2).placement.provider == CARD


def test_an_engine_of_another_version_is_named_with_what_to_do(
    built: Path, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine()
    kept = record.read(built / "tensorrt")
    assert building.misfit(kept) == ""
    assert "`compress verify OUT` builds one" in building.misfit(kept.model_copy(update={"version": "11.0"}))
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", SimpleNamespace(__version__="1.8.0"))
    ahead = {"module": "tensorrt-rtx", "builder": "TensorRT-RTX 1.7.1", "version": "1.7.1", "device": ""}
    told = building.misfit(kept.model_copy(update=ahead))
    assert told.endswith("1.8.0 is installed here. Install that version, or export the model again.")


def test_classes_and_embeddings_come_from_engines(
    cnn: str, images_file: Path, save_random: Callable[..., Path], tmp_path: Path, machine: Machine
) -> None:
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
    bert = BertConfig(**sizes, num_hidden_layers=1, max_position_embeddings=64)
    machine()
    images = exported(cnn, tmp_path / "images")
    texts = exported(save_random("tiny-bert", bert, "AutoModel"), tmp_path / "texts")
    given: dict[Path, Any] = {images: np.load(images_file)["images"][:5].transpose(0, 3, 1, 2), texts: [[1, 2, 3], [4]]}
    found = {}
    for out, inputs in given.items():
        loaded = opened(out)
        assert loaded.placement.provider == CARD
        found[out] = loaded.predict(inputs, batch=4)
        np.testing.assert_allclose(found[out][-1], loaded.predict(inputs[-1:])[0], rtol=1e-2, atol=1e-2)
    machine(sm=None)
    for out, inputs in given.items():
        np.testing.assert_allclose(found[out], opened(out, anyway=True).predict(inputs), rtol=1e-2, atol=1e-2)


def in_this_process(command: Sequence[str], *_: object) -> str:
    """What `Target.probe_command` starts, without its process."""
    assert list(command[1:3]) == ["-m", "compress.export.tensorrt.engine"]
    return json.dumps(probing.probe(engine._probed(Path(command[3]), 1), 8, 2))


def test_its_speed_is_that_of_two_engines_in_turn(
    built: Path, text_file: Path, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine()
    monkeypatch.setattr("compress.speed.footprint.last_line", in_this_process)
    monkeypatch.setattr("compress.speed.end_to_end.MOST_BUDGETS", 1e-9)
    timed: list[engine.EngineSession] = []
    once = engine.EngineSession.call
    monkeypatch.setattr(engine.EngineSession, "call", lambda self, *given: timed.append(self) or once(self, *given))
    found = profile(built, inputs=text_file, budget_s=0.1)
    assert found.runtime == f"TensorRT {VERSIONS[1]} on {CARD}"
    assert [(each.phase, each.batch, each.prompt) for each in found.timings] == [("decode", 2, 16), ("prefill", 1, 16)]
    folders = {each.placement.file.partition("/")[0] for each in timed}
    assert len(folders) == 2 and "tensorrt" in folders
    kept = record.read(built / "tensorrt")
    assert found.variant.disk_bytes == kept.engine_bytes != found.baseline.disk_bytes
    assert found.variant.peak_memory_bytes == TAKEN_BYTES and found.variant.load_s
    assert "one request takes" in found.unavailable["end to end"]  # one was made, which was all that the budget let


def test_a_call_to_be_timed_stays_itself_whatever_ran_meanwhile(built: Path, machine: Machine) -> None:
    machine()
    session = target.session(built / "tensorrt", 1)
    assert isinstance(session, engine.EngineSession)
    decode, prefill = session.call(np.ones((2, 1), np.int64), 5), session.call(np.ones((1, 9), np.int64), 0)
    for call, rows, length in ((decode, 2, 1), (prefill, 1, 9), (prefill, 1, 9), (decode, 2, 1)):
        call()
        assert tuple(session._context.get_tensor_shape("logits"))[:2] == (rows, length)
    with pytest.raises(UnsupportedError, match="no range of shapes for input_ids 3x1"):
        session.call(np.ones((3, 1), np.int64), 5)


def test_a_run_on_the_machine_with_the_gpu_times_what_it_built(
    one_block: Path, text_file: Path, tmp_path: Path, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine()
    monkeypatch.setattr("compress.speed.footprint.last_line", in_this_process)
    monkeypatch.setattr("compress.speed.end_to_end.MOST_BUDGETS", 1e-9)
    out = tmp_path / "out"
    wanted = tmp_path / "h100.yaml"
    wanted.write_text(short().model_dump_json())
    made = ["--passes", "rtn(format=int8(channel))", "-p", str(wanted), "-d", str(text_file), "-o", str(out)]
    options = ["--samples", "2", "--quality-samples", "2", "--length", "32", "--budget", "0.1", "-q"]
    assert main(["run", str(one_block), *made, *options]) == 0
    report = load_report(out)
    assert report.speed is not None and report.speed.runtime == f"TensorRT {VERSIONS[1]} on {CARD}"
