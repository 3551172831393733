"""Folders for NVIDIA GPUs through ONNX Runtime: their session options, on machines with such a GPU and without."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import onnxruntime
import pytest

import compress
from compress import hwprofiles
from compress.__main__ import main
from compress.errors import InputError, UnsupportedError
from compress.export.onnx import providers, target
from compress.export.onnx.runtime import Session
from compress.models.model import Model
from compress.profiles import as_profile
from compress.report import load as load_report

CUDA = providers.CUDA
PROFILE = as_profile(hwprofiles.load("nvidia-l4"), "onnx")


@pytest.fixture(scope="module")
def small(make_llama: Callable[..., Path]) -> Path:
    return make_llama("providers-llama", num_hidden_layers=1)


@pytest.fixture(scope="module")
def model(small: Path) -> Model:
    found = compress.load(small)
    assert isinstance(found, Model)
    return found


@pytest.fixture(scope="module")
def graph(model: Model) -> bytes:
    return target.capture(model, PROFILE)


@pytest.fixture(scope="module")
def folder(model: Model, graph: bytes, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of one block in 4 bits, for an L4. Do not write into it."""
    made = compress.Pipeline.parse("rtn(format=int4(group=32))").run(model).model
    return target.write(made, PROFILE, tmp_path_factory.mktemp("cuda") / "onnx", graph).folder


class Loaded:
    """What an `InferenceSession` of the CPU is, but on the provider that a test says."""

    got = CUDA
    asked: list[Any]

    def __init__(self, content: Any, options: Any, providers: list[Any]) -> None:
        type(self).asked = providers
        self._session = REAL(content, options, providers=["CPUExecutionProvider"])

    def get_providers(self) -> list[str]:
        return [self.got, "CPUExecutionProvider"]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)


REAL = onnxruntime.InferenceSession


@pytest.fixture
def with_cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Loaded]]:
    """A machine whose onnxruntime has CUDA, as far as its answers tell."""
    monkeypatch.setattr(onnxruntime, "InferenceSession", Loaded)
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [CUDA, "CPUExecutionProvider"])
    monkeypatch.setattr(Loaded, "got", CUDA)
    providers.usable.cache_clear()
    yield Loaded
    providers.usable.cache_clear()


def test_a_folder_says_with_which_providers_and_options_it_is_run(folder: Path) -> None:
    content = json.loads((folder / providers.NAME).read_text())
    assert content["profile"] == "nvidia-l4"
    assert [name for name, _ in content["providers"]] == [CUDA]
    (first, options), (second, _) = content["tensorrt"]
    assert (first, second) == (providers.TENSORRT, CUDA)
    assert options["trt_engine_cache_enable"] == options["trt_timing_cache_enable"] == options["trt_fp16_enable"] == "1"
    assert options["trt_engine_cache_path"] == "trt_cache"
    shapes = {end: options[f"trt_profile_{end}_shapes"].split(",") for end in ("min", "opt", "max")}
    ids = {end: [each for each in found if each.startswith("input_ids:")] for end, found in shapes.items()}
    assert ids == {  # prompts first, single tokens after a past second; batches as the profile's grid
        "min": ["input_ids:1x1", "input_ids:1x1"],
        "opt": ["input_ids:1x128", "input_ids:1x1"],
        "max": ["input_ids:8x128", "input_ids:8x1"],
    }
    assert "past_key_values.0.value:8x2x127x16" in shapes["max"]
    genai = json.loads((folder / "genai_config.json").read_text())["model"]["decoder"]
    assert genai["session_options"]["provider_options"] == [{"cuda": providers.CUDA_OPTIONS}]
    assert genai["filename"] == "model_gqa.onnx" and (folder / "model_gqa.onnx").is_file()


def test_a_folder_for_the_cpu_has_no_such_file_and_an_older_one_goes(
    model: Model, graph: bytes, tmp_path: Path
) -> None:
    (tmp_path / providers.NAME).write_text("{}")
    target.write(model, hwprofiles.load("cpu-x86-avx512-vnni"), tmp_path, graph)
    assert not (tmp_path / providers.NAME).exists()
    assert providers.wanted(tmp_path) == [("CPUExecutionProvider", {})]


def test_where_the_provider_is_there_the_session_asks_for_it_and_says_that_it_got_it(
    folder: Path, with_cuda: type[Loaded]
) -> None:
    session = Session(folder, 1)
    assert with_cuda.asked == [(CUDA, providers.CUDA_OPTIONS)]
    assert session.level == "ran" and session.name.endswith(" CUDA") and session.built_for == session.name
    assert target.runner(session, folder).placement.provider == "CUDA, CPU"
    assert target.timed_here(PROFILE)


def test_a_provider_that_does_not_take_the_graph_is_an_error_and_no_silent_cpu(
    folder: Path, with_cuda: type[Loaded], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert providers.usable(CUDA)  # as the machine says before the graph is loaded
    monkeypatch.setattr(with_cuda, "got", "CPUExecutionProvider")
    with pytest.raises(UnsupportedError, match="asked for CUDAExecutionProvider and runs on CPUExecutionProvider"):
        Session(folder, 1)


def test_a_runtime_that_lists_cuda_without_a_gpu_counts_as_one_without(
    with_cuda: type[Loaded], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(with_cuda, "got", "CPUExecutionProvider")
    assert not providers.usable(CUDA) and not target.timed_here(PROFILE)


@pytest.mark.parametrize("text", ["", "{}", '{"providers": []}', '{"providers": [1]}', '{"providers": [["a", 1]]}'])
def test_damaged_session_options_are_an_input_error(text: str, tmp_path: Path) -> None:
    (tmp_path / providers.NAME).write_text(text)
    with pytest.raises(InputError, match=r"session_options\.json"):
        providers.wanted(tmp_path)


def test_options_that_would_load_a_library_are_not_passed_on(tmp_path: Path) -> None:
    hostile = [[providers.TENSORRT, {"trt_extra_plugin_lib_paths": "evil.so"}]]
    (tmp_path / providers.NAME).write_text(json.dumps({"providers": hostile}))
    with pytest.raises(InputError, match="trt_extra_plugin_lib_paths, which are not passed on"):
        providers.wanted(tmp_path)


@pytest.mark.skipif(providers.usable(CUDA), reason="this machine has a GPU that onnxruntime runs on")
def test_a_run_without_the_gpu_is_checked_on_the_cpu_says_so_and_is_not_loaded_there(
    small: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    made = ["--passes", "rtn(format=int4(group=32))", "-p", "nvidia-l4", "--target", "onnx", "-d", str(text_file)]
    options = ["--samples", "4", "--quality-samples", "4", "--length", "64", "-q", "-o", str(out)]
    assert main(["run", str(small), *made, *options]) == 0
    report = load_report(out / "report.json")
    found = report.verification
    assert found is not None and found.agrees and (found.level, found.runtime) == ("checked", "onnxruntime CUDA")
    assert any("has not run on CUDAExecutionProvider" in note for note in found.notes)
    assert report.speed is None and "speed not measured" in report.verdict
    capsys.readouterr()
    assert main(["generate", str(out), "--prompt", "the"]) == 4
    assert "runs on CPU here, not on CUDAExecutionProvider as nvidia-l4 says" in capsys.readouterr().err
    assert main(["profile", str(out)]) == 4
    copied = shutil.copytree(out, tmp_path / "copied")
    assert main(["verify", str(copied)]) == 0
    assert "checked in onnxruntime CUDA" in capsys.readouterr().out
