"""What this machine and this installation can do: `compress doctor`.

Each check is a function that returns findings; nothing here changes anything.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Iterable
from importlib import import_module
from importlib.metadata import Distribution, distributions
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from compress.errors import CompressError
from compress.records import Record

if TYPE_CHECKING:
    from compress.speed.provider_probe import Provider

State = Literal["ok", "warning", "failed", "absent"]
# families of packages that install files of the same names over each other
FAMILIES = ("onnxruntime", "tensorrt", "torch")
PACKAGES = ("compress", "torch", "transformers", "safetensors", "onnx", "onnx-ir", "compressed-tensors", "numpy")
# package → extra of ours that installs it
EXTRAS = {
    "bitsandbytes": "bitsandbytes",
    "faiss-cpu": "retrieval",
    "ray": "distributed",
    "lm-eval": "eval",
    "pillow": "images",
    "openvino": "openvino",
    "tensorrt": "tensorrt",
    "tensorrt-rtx": "tensorrt-rtx",
    "triton": "triton",
}
NVIDIA = ("Tensorrt", "CUDA", "NvTensorRTRTX")
"""Providers of ONNX Runtime."""
BUILDERS = {"tensorrt_rtx": "TensorRT-RTX", "tensorrt": "TensorRT"}
SMALLEST_DISK, SMALLEST_MEMORY = 2e9, 2e9
TRIALS, TRIAL_SECONDS = 40, 0.004
# A spread of repeated work beyond this makes small differences invisible: compress.speed.timing needs more rounds then.
NOISY = 0.10


class Finding(Record):
    """One line of the report. what: a short name; text: for people, with what to do where it is not ok."""

    what: str
    state: State
    text: str


class Diagnosis(Record):
    """All findings; healthy: whether nothing that `compress run` needs failed."""

    healthy: bool = Field(description="no finding failed")
    findings: tuple[Finding, ...]


def diagnose(folder: Path) -> Diagnosis:
    """Every check. folder: where outputs would be written."""
    checks: list[Callable[[], Iterable[Finding]]] = [_machine, _packages, _overwritten, _torch, _kernels]
    checks += [_onnxruntime, _tensorrt]
    found = [finding for check in checks for finding in check()]
    found += [*_disk(folder), *_memory(), _timer(), _noise()]
    return Diagnosis(healthy=all(one.state != "failed" for one in found), findings=tuple(found))


def _machine() -> list[Finding]:
    from compress import hwprofiles
    from compress.profiles import as_profile

    facts = ", ".join(f"{key} {value}" for key, value in hwprofiles.machine_summary().items())
    try:
        profile = as_profile(None)
    except (CompressError, hwprofiles.ProfileError) as error:
        return [Finding(what="machine", state="warning", text=f"{facts}. {error}")]
    return [Finding(what="machine", state="ok", text=f"{facts}; profile {profile.id}, target {profile.target}")]


def _packages() -> list[Finding]:
    installed = {_name(each): each.version for each in distributions() if each.metadata["Name"]}
    found = ", ".join(f"{name} {installed[name]}" for name in PACKAGES if name in installed)
    findings = [Finding(what="packages", state="ok", text=found)]
    for name, extra in EXTRAS.items():
        if name in installed:
            findings.append(Finding(what=name, state="ok", text=f"{name} {installed[name]}"))
        else:
            text = f"not installed; `pip install '.[{extra}]'` adds it"
            findings.append(Finding(what=name, state="absent", text=text))
    return findings


def _name(distribution: Distribution) -> str:
    return str(distribution.metadata["Name"]).lower().replace("_", "-")


def _overwritten() -> list[Finding]:
    """Distributions of one family that installed the same files: the last one installed won, silently."""
    return overwritten(
        {
            _name(each): {str(path) for path in each.files or () if path.suffix in {".py", ".so"}}
            for each in distributions()
            if each.metadata["Name"] and _name(each).startswith(FAMILIES)
        }
    )


def overwritten(files: dict[str, set[str]]) -> list[Finding]:
    """A failed finding per pair of distributions that share files. files: distribution → its modules and libraries."""
    findings = []
    names = sorted(files)
    for place, first in enumerate(names):
        for second in names[place + 1 :]:
            shared = sorted(files[first] & files[second])
            if shared:
                text = (
                    f"{first} and {second} installed {len(shared)} files over each other, such as {shared[0]}: which "
                    f"one runs is an accident. Uninstall both, then install the one you want."
                )
                findings.append(Finding(what=f"{first} and {second}", state="failed", text=text))
    return findings


def _torch() -> list[Finding]:
    try:
        import torch
    except (ImportError, OSError) as error:  # OSError: its libraries do not load
        return [Finding(what="torch", state="failed", text=f"does not import ({error}). Install it again.")]
    layers = torch.nn.Sequential(torch.nn.Linear(32, 32), torch.nn.Linear(32, 8))
    with torch.no_grad():
        finite = bool(torch.isfinite(layers(torch.ones(2, 32))).all())
    device = "no CUDA device" if not torch.cuda.is_available() else f"CUDA device {torch.cuda.get_device_name()}"
    text = f"two layers run in torch {torch.__version__} on the CPU with {torch.get_num_threads()} threads; {device}"
    return [Finding(what="torch", state="ok" if finite else "failed", text=text)]


def _kernels() -> list[Finding]:
    """Kernels of this package for codebook weights, on the CPU and for CUDA devices."""
    try:
        from compress import kernels
    except (ImportError, OSError):  # told by `_torch`
        return []
    reason = kernels.missing()
    text = f"on the CPU by {', '.join(kernels.kernel_paths())}" + (f" ({reason})" if reason else "")
    text += f"; on a CUDA device by {', '.join(kernels.gpu_paths())}"
    return [Finding(what="codebook kernels", state="warning" if reason else "ok", text=text)]


def _onnxruntime() -> list[Finding]:
    from compress.speed import kernel_probe
    from compress.speed.provider_probe import probe_providers

    try:
        import onnxruntime

        probes = kernel_probe.probes()
    except (ImportError, OSError) as error:
        text = f"it or onnx does not import ({error}). Install onnx, and one of onnxruntime and onnxruntime-gpu."
        return [Finding(what="onnxruntime", state="failed", text=text)]
    findings = []
    for probe in probes:
        done = kernel_probe.check(probe)
        name = f"onnxruntime, {probe.name}"
        if done.problem and done.error is not None and done.error > probe.bound:
            text = f"{done.problem}: it computes wrongly here, do not use it. Another version of onnxruntime may not"
            findings.append(Finding(what=name, state="failed", text=text))
        elif done.problem:
            findings.append(Finding(what=name, state="warning", text=f"{done.problem}: slower, or not usable, here"))
        else:
            kernel = ", ".join(sorted(probe.operators))
            findings.append(Finding(what=name, state="ok", text=f"runs as {kernel}, error {done.error:.1g}"))
    works = findings[0].state == "ok"  # float32, without which nothing runs
    runs, lacking = providers(probe_providers(onnxruntime, probes[0].graph))
    text = f"onnxruntime {onnxruntime.__version__}, {runs}"
    return [Finding(what="onnxruntime", state="ok" if works else "failed", text=text), *findings, *lacking]


def providers(found: Iterable[Provider]) -> tuple[str, list[Finding]]:
    """What the runtime runs on, and a line about NVIDIA's providers that are there but take no graph."""
    found = list(found)
    working = ", ".join(each.name for each in found if not each.problem) or "nothing"
    lacking = [each for each in found if each.problem and each.name in NVIDIA]
    if not lacking:
        return f"runs on {working}", []
    told = "; ".join(f"{each.name} does not run here ({each.problem})" for each in lacking)
    text = f"{told}. Only needed for nvidia profiles"
    return f"runs on {working}", [Finding(what="onnxruntime, NVIDIA", state="absent", text=text)]


def _tensorrt() -> list[Finding]:
    """Whether the libraries for NVIDIA engines that are installed make a builder here."""
    findings = []
    for module, title in BUILDERS.items():
        if find_spec(module) is None:  # told by `_packages`
            continue
        state: State = "warning"
        try:
            trt = import_module(module)
            trt.Builder(trt.Logger(trt.Logger.ERROR))
            state, text = "ok", f"{title} {trt.__version__} makes a builder here"
        except (ImportError, OSError) as error:
            text = f"is installed, but its libraries do not load ({error})"
        except TypeError:  # the bindings' way of telling that the library made none
            text = f"{title} {trt.__version__} makes no builder here: there is no GPU for it"
        findings.append(Finding(what=module, state=state, text=text))
    return findings


def _disk(folder: Path) -> list[Finding]:
    findings = []
    for what, place in (("disk for outputs", folder), ("disk for temporary files", Path(tempfile.gettempdir()))):
        free = shutil.disk_usage(place).free
        state: State = "ok" if free >= SMALLEST_DISK else "warning"
        findings.append(Finding(what=what, state=state, text=f"{free / 1e9:.1f} GB free in {place}"))
    return findings


def _memory() -> list[Finding]:
    from compress.memory import allowed_memory

    allowed = allowed_memory()
    if allowed is None:
        return [Finding(what="memory", state="warning", text="how much this process may use is not known")]
    state: State = "ok" if allowed >= SMALLEST_MEMORY else "warning"
    return [Finding(what="memory", state=state, text=f"{allowed / 1e9:.1f} GB may be used")]


def _timer() -> Finding:
    ticks = []
    for _ in range(1000):
        first = time.perf_counter_ns()
        while (second := time.perf_counter_ns()) == first:
            pass
        ticks.append(second - first)
    tick = sorted(ticks)[len(ticks) // 2]
    state: State = "ok" if tick < 10_000 else "warning"
    return Finding(what="timer", state=state, text=f"the clock advances in steps of {tick} ns")


def _noise() -> Finding:
    """The spread of the same work done again and again."""
    import numpy as np

    matrix = np.random.default_rng(0).standard_normal((128, 128)).astype(np.float32)
    times = []
    for _ in range(TRIALS):
        started, rounds = time.perf_counter(), 0
        while time.perf_counter() - started < TRIAL_SECONDS:
            matrix @ matrix
            rounds += 1
        times.append((time.perf_counter() - started) / rounds)
    return noise(times)


def noise(times: list[float]) -> Finding:
    """How far the middle 80 % of repeated times spread around their median. times: seconds."""
    ordered = sorted(times)
    low, middle, high = (ordered[round(share * (len(ordered) - 1))] for share in (0.1, 0.5, 0.9))
    spread = (high - low) / middle
    text = f"the same work takes {low / middle:.2f} to {high / middle:.2f} of its median time (the middle 80 %)"
    if spread > NOISY:
        text += ". Other work runs on this machine: speed-ups below that will come out as inconclusive"
    return Finding(what="noise", state="ok" if spread <= NOISY else "warning", text=text)
