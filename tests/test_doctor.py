"""`compress doctor` and `compress hardware calibrate`: what they say of a machine can be relied on."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from compress import calibrate, doctor, hwprofiles
from compress.__main__ import main
from compress.errors import UnsupportedError, UsageError
from compress.hwprofiles import Profile
from compress.speed import kernel_probe

PROBES = kernel_probe.probes()


@pytest.mark.parametrize("probe", PROBES, ids=lambda probe: probe.name)
def test_each_kernel_that_the_profiles_name_runs_here_and_computes_its_layer(probe: kernel_probe.Probe) -> None:
    done = kernel_probe.check(probe)
    assert done.problem == ""
    assert done.error is not None and done.error <= probe.bound


def test_a_kernel_that_computes_something_else_is_found() -> None:
    wrong = replace(PROBES[1], answer=lambda x: x)
    assert "off by" in kernel_probe.check(wrong).problem


def test_a_kernel_that_another_one_stands_in_for_is_found() -> None:
    other = replace(PROBES[0], operators=frozenset({"Gemm"}))
    assert kernel_probe.check(other).problem == "runs as MatMul, not as Gemm"


def test_a_graph_that_the_runtime_refuses_is_told_and_not_raised() -> None:
    assert "does not run" in kernel_probe.check(replace(PROBES[0], graph=b"no graph")).problem


def test_codes_of_every_width_are_packed_lowest_bits_first() -> None:
    sizes = {probe.bits: len(probe.graph) for probe in PROBES if probe.use == "weight_only"}
    assert sizes[8] - sizes[4] == 64 * 64 // 2
    assert sizes[4] - sizes[2] == 64 * 64 // 4


def test_packages_that_overwrite_each_other_are_a_failure_that_names_a_file() -> None:
    shared = {"onnxruntime/__init__.py", "onnxruntime/capi.so"}
    (found,) = doctor.overwritten({"onnxruntime": shared | {"a.py"}, "onnxruntime-gpu": shared, "torch": {"t.py"}})
    assert found.state == "failed"
    assert "onnxruntime and onnxruntime-gpu installed 2 files" in found.text
    assert "onnxruntime/__init__.py" in found.text


def test_packages_that_do_not_meet_are_no_finding() -> None:
    assert doctor.overwritten({"onnxruntime": {"a.py"}, "torch": {"b.py"}}) == []


def test_a_noisy_machine_is_a_warning_and_a_quiet_one_is_not() -> None:
    assert doctor.noise([1.0] * 20 + [1.01] * 20).state == "ok"
    loud = doctor.noise([1.0] * 20 + [1.5] * 20)
    assert loud.state == "warning" and "inconclusive" in loud.text


def test_doctor_says_what_works_here(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    told = capsys.readouterr().out
    for part in ("onnxruntime, int4 weights", "runs as MatMulNBits", "GB free", "steps of", "profile "):
        assert part in told


def test_doctor_calls_a_kernel_that_computes_wrongly_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = replace(PROBES[1], answer=lambda x: x)
    monkeypatch.setattr(kernel_probe, "probes", lambda: [PROBES[0], wrong])
    states = {one.what: one.state for one in doctor._onnxruntime()}
    assert states["onnxruntime, int4 weights, blocks of 32"] == "failed"


def test_doctor_fails_with_4_where_a_backend_does_not_work(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = doctor.Finding(what="onnxruntime", state="failed", text="does not import")
    monkeypatch.setattr(doctor, "_onnxruntime", lambda: [broken])
    assert main(["doctor", "--json"]) == 4
    told = json.loads(capsys.readouterr().out)
    assert told["healthy"] is False
    assert broken.model_dump() in told["findings"]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Profile]:
    """A calibration of small layers, with times that are made up."""
    monkeypatch.setattr(calibrate, "READ_BYTES", 1 << 16)
    monkeypatch.setattr(calibrate, "MATRIX", 32)

    def run(decode: float, prefill: float) -> Profile:
        made = {"decode": decode, "prefill": prefill}
        batches = {value: key for key, value in calibrate.BATCHES.items()}
        monkeypatch.setattr(calibrate, "ratio", lambda _plain, _probe, batch, _threads: made[batches[batch]])
        return calibrate.calibrate(hwprofiles.load("cpu-x86-avx2"), "mine", size=64)

    return run


@pytest.mark.parametrize(("decode", "prefill", "state"), [(3.0, 1.0, "fast"), (3.0, 0.5, "works"), (1.0, 1.0, "works")])
def test_a_kernel_is_fast_where_it_gains_and_never_loses(
    quick: Callable[..., Profile], decode: float, prefill: float, state: str
) -> None:
    support = quick(decode, prefill).runtime("onnxruntime").support("weight_only", 4)
    assert (support.state, support.evidence) == (state, "measured")
    assert support.note.startswith(f"decode {decode:.2g}x float32, prefill {prefill:.2g}x float32, with blocks of 32")


def test_a_kernel_that_computes_wrongly_here_is_not_called_usable(
    quick: Callable[..., Profile], monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = kernel_probe.Outcome("int4 weights", "is off by 0.3 of its largest output")
    monkeypatch.setattr(kernel_probe, "check", lambda probe, threads: bad)
    support = quick(2.0, 2.0).runtime("onnxruntime").support("weight_only", 4)
    assert support.state == "no" and "off by 0.3" in support.note


def test_a_calibrated_profile_says_where_its_numbers_come_from(quick: Callable[..., Profile]) -> None:
    found = quick(2.0, 2.0)
    assert found.memory.bandwidth_gb_s.state == "measured"
    assert found.peak.dense_gflops_per_core["float32"].value > 0
    assert found.detect is None  # it is one machine's, never picked by itself
    untimed = found.runtime("onnxruntime").support("embedding", 8)
    assert untimed == hwprofiles.load("cpu-x86-avx2").runtime("onnxruntime").support("embedding", 8)


def test_a_written_profile_is_read_back_whole(quick: Callable[..., Profile], tmp_path: Path) -> None:
    found = quick(2.0, 2.0)
    calibrate.write(found, tmp_path / "mine.yaml")
    assert hwprofiles.load(tmp_path / "mine.yaml") == found


def test_where_a_profile_cannot_go_is_told_before_measuring(tmp_path: Path) -> None:
    (tmp_path / "there.yaml").touch()
    wrong = {"mine.txt": ".yaml file", "My Machine.yaml": "no name of one", "there.yaml": "exists"}
    for name, told in (wrong | {"no/mine.yaml": "not a folder"}).items():
        with pytest.raises(UsageError, match=told):
            calibrate.require_new(tmp_path / name)


def test_only_a_cpus_profile_can_be_calibrated() -> None:
    other = hwprofiles.load("cpu-x86-avx2").model_copy(update={"kind": "gpu"})
    with pytest.raises(UnsupportedError, match="kind cpu"):
        calibrate.calibrate(other, "mine")


def test_a_measured_ratio_is_of_paired_rounds() -> None:
    plain, probe = PROBES[0], PROBES[4]
    assert 0 < calibrate.ratio(plain, probe, 1, 1) < np.inf


def test_a_line_of_a_profile_for_one_format_keeps_what_it_says_of_its_own_kernel() -> None:
    entry = hwprofiles.load("cpu-x86-avx2").runtime("onnxruntime").formats[2].model_dump(mode="json")
    ratios = {(entry["use"], bits): {"decode": 3.0, "prefill": 3.0} for bits in entry["bits"]}
    own = {**entry, "format": "int4"}
    calibrate._measured(own, ratios, "here")
    assert own == {**entry, "format": "int4"}
    calibrate._measured(entry, ratios, "here")
    assert entry["evidence"] == "measured"
