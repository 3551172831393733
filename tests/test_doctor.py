"""`compress doctor` and `compress hardware calibrate`: what they say of a machine can be relied on."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from compress import calibrate, doctor, hwprofiles
from compress.__main__ import main
from compress.errors import UnsupportedError, UsageError
from compress.hwprofiles import Profile
from compress.speed import kernel_probe, kernel_speed, provider_probe

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
    for part in (
        "onnxruntime, int4 weights",
        "runs as MatMulNBits",
        "GB free",
        "steps of",
        "profile ",
        "on a CUDA device by",
    ):
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


LOG = (
    "\x1b[1;31m2026-01-01 15:53:35.002 [E:onnxruntime:Default, provider_bridge.cc:2458 operator()] a.cc:2043 Get() "
    "[ONNXRuntimeError] : 1 : FAIL : Failed to load library libonnxruntime_providers_cuda.so with error: "
    "libcublasLt.so.13: cannot open shared object file: No such file or directory\n\x1b[m"
)


class Runtime:
    """As ONNX Runtime with two providers, one of whose libraries is missing."""

    SessionOptions = object

    def get_available_providers(self) -> list[str]:
        return ["CUDAExecutionProvider", "CPUExecutionProvider"]

    def InferenceSession(self, *_: object, providers: list[str], enable_fallback: int) -> Runtime:  # noqa: N802
        if providers[0].startswith("CUDA"):
            os.write(2, LOG.encode())
        return self

    def get_providers(self) -> list[str]:
        return ["CPUExecutionProvider"]


def test_a_provider_without_its_libraries_is_one_line_and_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    runs, (found,) = doctor.providers(provider_probe.probe_providers(Runtime(), b""))
    assert runs == "runs on CPU"
    assert found.state == "absent" and "libcublasLt.so.13: cannot open" in found.text
    assert found.text.endswith("Only needed for nvidia profiles")
    assert capfd.readouterr().err == ""


def test_standard_error_is_back_after_an_error(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="x"), provider_probe.captured_stderr():
        raise ValueError("x")
    os.write(2, b"told")
    assert capfd.readouterr().err == "told"


def test_why_a_provider_takes_no_graph_is_its_first_error() -> None:
    other = "2026-01-01 15:53 [E:onnxruntime:, inference_session.cc:1 x] CUDA failure 100: no device\nmore"
    assert provider_probe.reason(other, "") == "CUDA failure 100: no device"
    assert provider_probe.reason("", "Install TensorRT.\nmore") == "Install TensorRT."
    assert provider_probe.reason("", "") == "it takes no graph here"


def test_doctor_names_every_extra_that_a_user_may_install() -> None:
    import tomllib

    text = (Path(__file__).resolve().parents[1] / "pyproject.toml").read_text(encoding="utf8")
    extras = set(tomllib.loads(text)["project"]["optional-dependencies"]) - {"test", "dev"}
    assert set(doctor.EXTRAS.values()) == extras


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Profile]:
    """A calibration of small layers, with times that are made up."""
    monkeypatch.setattr(calibrate, "READ_BYTES", 1 << 16)
    monkeypatch.setattr(calibrate, "MATRIX", 32)
    monkeypatch.setattr(kernel_speed, "CHAIN_BYTES", 1)
    monkeypatch.setattr(kernel_speed, "NODES", 2)

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
    assert not support.speeds


def test_a_calibrated_profile_says_where_its_numbers_come_from(quick: Callable[..., Profile]) -> None:
    found = quick(2.0, 2.0)
    assert found.memory.bandwidth_gb_s.state == "measured"
    assert found.peak.dense_gflops_per_core["float32"].value > 0
    assert found.detect is None  # it is one machine's, never picked by itself
    untimed = found.runtime("onnxruntime").support("embedding", 8)
    assert untimed == hwprofiles.load("cpu-x86-avx2").runtime("onnxruntime").support("embedding", 8)


def test_a_calibrated_profile_has_figures_of_each_kernel_that_was_timed(
    quick: Callable[..., Profile], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One row takes 2 ms and 64 rows 4.52 ms, in a chain of two layers of 64 x 64; a chain of nodes is as long."""
    spans = {kernel_speed.ONE_CALLS: 2e-3, kernel_speed.ROWS_CALLS: 4.52e-3, kernel_speed.PEAK_CALLS: 1e-9}
    monkeypatch.setattr(kernel_speed, "times", lambda _call, count: [spans[count]] * count)
    monkeypatch.setattr(kernel_speed, "NODES", 100)  # 20 microseconds each
    found = quick(2.0, 2.0)
    runtime = found.runtime("onnxruntime")
    assert runtime.node_us is not None and (runtime.node_us.value, runtime.node_us.state) == (20, "measured")
    speed = runtime.support("weight_only", 4).speed(32)
    assert speed is not None and (speed.block, speed.kernel_gb_s.state) == (32, "measured")
    stored = 64 * 64 // 2 + 2 * 64 * 64 // 32
    assert speed.kernel_gb_s.value == pytest.approx(stored / (1e-3 - 20e-6) / 1e9, rel=0.01)
    assert speed.kernel_gflops.value == pytest.approx(2 * 64 * 64 * 63 / 1.26e-3 / 1e9, rel=0.01)
    assert runtime.support("weight_only", 3).speed(32) == speed  # stored as 4 bits
    for use, bits in (("float", 32), ("weight_and_activation", 8)):
        alone = runtime.support(use, bits).speed()  # type: ignore[arg-type]
        assert alone is not None and alone.block is None
    for use, bits in (("float", 16), ("lookup", 4), ("embedding", 8)):
        assert runtime.support(use, bits).speed(32) is None  # type: ignore[arg-type]
    assert "onnxruntime, faster than torch" in found.peak.dense_gflops_per_core["float32"].source


def test_where_torch_multiplies_faster_its_rate_is_the_peak(
    quick: Callable[..., Profile], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel_speed, "times", lambda _call, count: [1e3] * count)
    peak = quick(2.0, 2.0).peak.dense_gflops_per_core["float32"]
    assert "by torch" in peak.source and "onnxruntime" not in peak.source


def test_a_chain_computes_what_its_layers_do_one_after_another() -> None:
    """Each with weights of its own: onnxruntime keeps equal ones once, which a cache would hold."""
    for product in kernel_speed.products(128):
        probe = replace(PROBES[0], graph=kernel_probe.chain(product, 3), bound=kernel_probe.ROUNDED)
        weight = product.decoded
        whole = replace(
            probe,
            make=kernel_probe.rows(128),
            answer=lambda x, weight=weight: x @ weight.T @ np.roll(weight, 1, 0).T @ np.roll(weight, 2, 0).T,
            operators=frozenset({product.operator}),
        )
        assert kernel_probe.check(whole).problem == "", product.name


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
