"""TensorRT 10 and 11 on the machine that has the GPU, which here is a stand-in with the real bindings' names
(tests/stubs/tensorrt): building, running, the timing cache, and the report that `compress verify` completes."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

import compress
from compress import doctor, hwprofiles
from compress.__main__ import main
from compress.artifact import open_artifact, verify
from compress.errors import InputError, UnsupportedError
from compress.export.tensorrt import building, engine, flavours, gpu, record, target, timing_cache
from compress.export.tensorrt.flavours import FULL, RTX
from compress.report import load as load_report
from helpers.tensorrt_machine import CARD, VERSIONS, Machine, becoming

HERE = Path(__file__).parent
API = json.loads((HERE / "data" / "tensorrt_api.json").read_text())


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Machine:
    """`machine(version, sm)`: from here on TensorRT of this version is installed beside this GPU."""
    return becoming(monkeypatch, tmp_path / "cache")


@pytest.fixture(scope="module")
def elsewhere(llama: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run for an H100, where there is none."""
    out = tmp_path_factory.mktemp("elsewhere") / "out"
    made = ["--passes", "rtn(format=int4(group=32))", "-p", "nvidia-h100-sxm", "-d", str(text_file), "-o", str(out)]
    options = ["--samples", "4", "--quality-samples", "4", "--length", "64", "-q"]
    assert main(["run", str(llama), *made, *options]) == 0
    return out


@pytest.fixture
def artifact(elsewhere: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(elsewhere, tmp_path / "out"))


def files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("version", VERSIONS)
def test_verify_on_the_machine_with_the_gpu_builds_runs_and_compares(
    version: str, artifact: Path, machine: Machine
) -> None:
    before = files(artifact)
    machine(version, child=True)
    found = verify(artifact)
    assert (found.level, found.agrees, found.runtime) == ("ran", True, f"TensorRT {version} on {CARD}")
    assert 0 < found.max_relative_difference < 0.05 and len(found.greedy_tokens) > 10
    assert found.exact_relative_difference is not None
    place = f"tensorrt/engines/tensorrt-{version}-sm90"
    assert sorted({*files(artifact)} - {*before}) == [f"{place}/{n}" for n in ("build.log", "engine", "timing.cache")]
    kept = record.read(artifact / "tensorrt")
    assert (kept.level, kept.builder, kept.device) == ("built", f"TensorRT {version}", CARD)
    assert kept.settings["builder_flags"] == ["TF32"] and kept.settings["timing_cache"] == "begun empty"
    assert list(kept.ranges) == ["prefill", "decode"]
    engine_bytes = (artifact / place / "engine").read_bytes()
    assert verify(artifact).level == "ran"  # the files are those of the manifest, and nothing is built again
    assert (artifact / place / "engine").read_bytes() == engine_bytes


def test_the_machine_without_the_gpu_says_how_far_it_got_before_and_after(artifact: Path, machine: Machine) -> None:
    found = verify(artifact)
    assert found.level == "checked"
    assert record.read(artifact / "tensorrt").settings == {"strongly_typed": True}
    assert "`compress verify OUT` on a machine with a GPU of SM 90" in " ".join(found.notes)
    assert "What this machine lacks for it: PyTorch sees no NVIDIA GPU here" in found.notes[-1]
    machine()
    verify(artifact)
    machine(sm=None)
    found = verify(artifact)
    assert found.level == "built" and found.agrees and found.runtime == f"TensorRT {VERSIONS[1]} for SM 90"
    assert f"built engines/tensorrt-{VERSIONS[1]}-sm90/engine on {CARD}" in " ".join(found.notes)


def test_the_report_is_completed_in_all_its_forms(
    artifact: Path, machine: Machine, capsys: pytest.CaptureFixture[str]
) -> None:
    out = artifact
    assert "only checked against the rules" in load_report(out).verdict
    machine()
    assert main(["verify", str(out)]) == 0
    assert "now say 'ran'" in capsys.readouterr().out.replace("\n", " ")
    report = load_report(out)
    assert report.verification is not None and report.verification.level == "ran"
    assert f"ran in TensorRT {VERSIONS[1]} on {CARD} and agreed" in report.verdict
    assert "speed not measured" in report.verdict
    name = record.read(out / "tensorrt").engine
    assert report.artifact_bytes == (out / "tensorrt" / name).stat().st_size
    assert f"tensorrt/{name}" in report.files
    assert "now say" not in " ".join(verify(out).notes)
    for form in ("report.md", "report.html"):
        assert CARD in (out / form).read_text()
    facts = open_artifact(out).facts
    assert facts["metrics"]["artifact_bytes"] == report.artifact_bytes
    assert tuple(facts["verification"]["greedy_tokens"]) == report.verification.greedy_tokens


def test_an_engine_that_does_not_agree_is_exit_code_5_and_stands_first_in_the_report(
    artifact: Path, machine: Machine
) -> None:
    machine(shift=9)
    assert main(["verify", str(artifact)]) == 5
    assert "did NOT agree" in load_report(artifact).verdict.split(";")[0]


def test_a_timing_cache_is_kept_by_version_and_gpu_and_beside_the_engine(
    artifact: Path, machine: Machine, tmp_path: Path
) -> None:
    machine()
    verify(artifact)
    usual = tmp_path / "cache" / "compress" / "tensorrt" / f"tensorrt-{VERSIONS[1]}-sm90-nvidia-h100-80gb-hbm3.timing"
    place = artifact / "tensorrt" / record.read(artifact / "tensorrt").engine
    assert usual.read_bytes() == place.with_name(timing_cache.BESIDE).read_bytes()
    assert "timed 0 kernels" not in place.with_name("build.log").read_text()
    assert not list(artifact.parent.glob(".compress-engine-*"))


def test_a_timing_cache_that_was_named_is_read_and_one_of_another_gpu_is_left_alone(
    elsewhere: Path, tmp_path: Path, machine: Machine
) -> None:
    named = tmp_path / "mine.timing"
    machine()
    for number, state in enumerate(("begun empty", "read")):
        out = Path(shutil.copytree(elsewhere, tmp_path / str(number)))
        verify(out, timing_cache=named)
        kept = record.read(out / "tensorrt")
        assert kept.settings["timing_cache"] == state
    assert "timed 0 kernels" in (out / "tensorrt" / kept.engine).with_name("build.log").read_text()
    before = named.read_bytes()
    machine(card="NVIDIA H200")
    out = Path(shutil.copytree(elsewhere, tmp_path / "2"))
    found = verify(out, timing_cache=named)
    assert named.read_bytes() == before and "of another GPU or version, not used" in " ".join(found.notes)


def test_another_version_or_gpu_gets_an_engine_of_its_own(artifact: Path, machine: Machine) -> None:
    machine(VERSIONS[0])
    verify(artifact)
    machine(VERSIONS[1])
    assert "10.16.1.11; 11.4.0.106 is installed" in engine.misfit(record.read(artifact / "tensorrt"))
    assert verify(artifact).runtime == f"TensorRT {VERSIONS[1]} on {CARD}"
    machine(VERSIONS[1], card="NVIDIA H200")
    assert verify(artifact).runtime == f"TensorRT {VERSIONS[1]} on NVIDIA H200"


def test_what_cannot_be_built_here_is_exit_code_4_that_names_verify(
    artifact: Path, machine: Machine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    machine()
    monkeypatch.setenv("STUB_GPU", "")  # PyTorch sees the GPU, TensorRT's driver does not
    before = files(artifact)
    assert main(["verify", str(artifact)]) == 4
    told = " ".join(capsys.readouterr().err.split())
    assert "makes no builder here (ERROR: CUDA initialization failure" in told and "`compress verify OUT`" in told
    with pytest.raises(UnsupportedError, match="makes no builder here"):
        target.require_tools(hwprofiles.load("nvidia-h100-sxm"))
    assert files(artifact) == before
    machine(sm=89)
    given = ["verify", str(artifact), "--timing-cache", "t"]
    assert main(given) == 4
    assert "The GPU here is of SM 89" in " ".join(capsys.readouterr().err.split())
    monkeypatch.setattr(gpu, "capability", lambda: 90)
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    assert main(given) == 4
    assert "pip install 'compress[tensorrt]'" in " ".join(capsys.readouterr().err.split())
    found = verify(artifact)
    assert found.level == "checked" and "pip install 'compress[tensorrt]'" in found.notes[-1]


def test_the_doctor_says_whether_engines_can_be_built_here(machine: Machine) -> None:
    for sm, told in ((90, "makes a builder here"), (None, "makes no builder here: there is no GPU for it")):
        machine(sm=sm)
        found = [each for each in doctor._tensorrt() if each.what == "tensorrt"]
        assert [each.text for each in found] == [f"TensorRT {VERSIONS[1]} {told}"]


def test_a_timing_cache_for_a_target_without_engines_is_refused(llama: Path, tmp_path: Path) -> None:
    made = compress.Pipeline.parse("rtn(format=int8(channel))").run(compress.load(llama))
    out = compress.export(made, profile="cpu-x86-avx2", out=tmp_path / "out").folder
    with pytest.raises(UnsupportedError, match="builds no engines: leave --timing-cache out"):
        verify(out, timing_cache=tmp_path / "t")


def test_an_export_on_the_machine_with_the_gpu_builds_at_once(llama: Path, tmp_path: Path, machine: Machine) -> None:
    h100 = hwprofiles.load("nvidia-h100-sxm")
    assert building.flavour_for(h100) is None
    assert building.flavour_for(hwprofiles.load("nvidia-l4")) is RTX
    machine()
    assert building.flavour_for(h100) is FULL
    model = compress.Pipeline.parse("rtn(format=int8(channel))").run(compress.load(llama))
    done = compress.export(model, profile=h100, out=tmp_path / "out")
    assert record.read(done.deployable).builder == f"TensorRT {VERSIONS[1]}"
    assert done.session().name == f"TensorRT {VERSIONS[1]} on {CARD}"
    assert not (done.deployable / target.COMMAND).exists()


def test_an_image_classifier_runs_in_more_batches_than_one_and_weights_may_stay_in_host_memory(
    cnn: str, tmp_path: Path, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine()
    monkeypatch.setattr(gpu, "total_bytes", lambda: 1000)
    target.write(compress.load(cnn), hwprofiles.load("nvidia-h100-sxm"), tmp_path)
    kept = record.read(tmp_path)
    assert kept.settings["builder_flags"] == ["TF32", "WEIGHT_STREAMING"]
    most, *size = kept.ranges["whole"]["images"][2]
    session = target.session(tmp_path, 1)
    assert any("host memory" in note for note in session.notes)
    images = np.random.default_rng(0).standard_normal((most + 3, *size), np.float32)
    np.testing.assert_allclose(session.logits(images)[-3:], session.logits(images[-3:]), rtol=1e-2, atol=1e-3)
    with pytest.raises(UnsupportedError, match="no range of shapes for images"):
        session.logits(images[:, :, :-1])


def test_an_engine_that_was_replaced_is_refused(artifact: Path, machine: Machine) -> None:
    machine()
    verify(artifact)
    place = artifact / "tensorrt" / record.read(artifact / "tensorrt").engine
    place.write_bytes(place.read_bytes() + b"more")
    with pytest.raises(InputError, match=r"changed tensorrt/engines/.*/engine"):
        verify(artifact)


def test_versions_that_this_was_not_written_for_are_refused(monkeypatch: pytest.MonkeyPatch, machine: Machine) -> None:
    machine()
    monkeypatch.setattr(sys.modules["tensorrt"], "__version__", "8.6.1")
    with pytest.raises(UnsupportedError, match=r"TensorRT 8\.6\.1 is installed; engines are built with 10 or 11"):
        flavours.load_module(FULL)


@pytest.mark.parametrize("name", ["tensorrt", "tensorrt_rtx"])
def test_the_table_of_names_is_that_of_the_installed_bindings(name: str) -> None:
    path = HERE.parent / "benchmarks" / "tensorrt_api.py"
    if not path.is_file():
        pytest.skip("the benchmarks are not here")
    module = pytest.importorskip(name, reason=f"{name} is not installed", exc_type=ImportError)
    key = f"{name} {module.__version__}"
    if key not in API:
        pytest.skip(f"tests/data/tensorrt_api.json holds no {key}")
    found = importlib.util.spec_from_file_location("tensorrt_api", path)
    assert found is not None and found.loader is not None
    script = importlib.util.module_from_spec(found)
    found.loader.exec_module(script)
    assert script.api(module) == API[key]


def test_all_three_builders_have_every_name_that_the_code_uses() -> None:
    text = "".join((HERE.parent / "export" / "tensorrt" / f"{name}.py").read_text() for name in ("builder", "engine"))
    members = {name for classes in API.values() for kind in classes.values() for name in kind}
    ahead = {"num_compute_capabilities", "set_compute_capability"}  # TensorRT-RTX's own, used for it only
    used = {name for name in members if f".{name}(" in text or f".{name} = " in text or f".{name}\n" in text}
    assert len(used) > 25 and ahead <= used
    for version, classes in API.items():
        names = {name for kind in classes.values() for name in kind}
        assert used - names == (set() if version.startswith("tensorrt_rtx") else ahead), version
        assert {"STRONGLY_TYPED", "WEIGHT_STREAMING", "INPUT", "OUTPUT"} <= names
