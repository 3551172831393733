"""Measure a machine: its memory, its matrix rates, and each format's kernel; the result is a hardware profile.

Kernels are timed against the same layer in float32, in alternating rounds, so that what disturbs one disturbs both.
"""

from __future__ import annotations

import os
import re
import statistics
from collections.abc import Callable, Collection, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import yaml

from compress import hwprofiles
from compress.errors import ResourceError, UnsupportedError, UsageError
from compress.files import write_text
from compress.hwprofiles import Profile
from compress.progress import Progress
from compress.speed import kernel_probe, kernel_speed
from compress.speed.kernel_probe import Probe
from compress.speed.kernel_speed import Speed
from compress.speed.measure import thread_count

SIZE = 2048
BATCHES = {"decode": 1, "prefill": 64}
ROUNDS = 15
READ_BYTES = 1 << 28
MATRIX = 1024
# A kernel is `fast` where neither decode nor prefill is slower than float32 by more than this, and one is quicker.
SLOWER, QUICKER = 0.95, 1.2
NAME = r"[a-z0-9][a-z0-9._-]*"
Ratios = dict[tuple[str, int], dict[str, float] | str]
Speeds = dict[tuple[str, int], list[Speed]]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def calibrate(base: Profile, name: str, *, size: int = SIZE, progress: Progress | None = None) -> Profile:
    """A profile of this machine: `base`, which fits its kind, with measured numbers in place of those of the class.

    Args: name: the new profile's id; size: inputs and outputs of the layers that are timed (a multiple of 32).
    Raises: UnsupportedError where the base is of another kind of machine.
    """
    if base.kind != "cpu" or base.cpu is None:
        raise UnsupportedError(
            f"{base.id} is a profile of kind {base.kind}; calibrate measures the CPU that it runs on. Give one of "
            "kind cpu."
        )
    quiet = progress or Progress(quiet=True)
    threads = thread_count(base)
    here, today = hwprofiles.machine_summary(), datetime.now(UTC).date().isoformat()
    told = f"{here['cpu']}, {threads} thread(s), {today}"
    content = base.model_dump(mode="json")
    quiet.begin("Measuring memory and matrices")
    content["memory"]["bandwidth_gb_s"] = _figure(read_bandwidth(threads), f"read by torch: {told}")
    content["memory"]["capacity_bytes"] = _capacity(told) or content["memory"]["capacity_bytes"]
    content["peak"]["dense_gflops_per_core"] |= _peaks(size, threads, told)
    ratios = kernel_ratios(size, threads, quiet)
    runtime = content["runtimes"].get("onnxruntime")
    if runtime is not None:
        node_s = kernel_speed.node_seconds(threads)
        runtime["node_us"] = _figure(node_s * 1e6, f"a chain of {kernel_speed.NODES} products of 16x16: {told}")
        broken = {kind for kind, found in ratios.items() if isinstance(found, str)}
        speeds = kernel_speeds(size, threads, node_s, quiet, broken)
        for entry in runtime["formats"]:
            _measured(entry, ratios, f"{size}x{size} at batch 1 and {BATCHES['prefill']}, onnxruntime: {told}")
            _with_speeds(entry, speeds, f"a chain of {size}x{size} at batch 1 and {kernel_speed.ROWS}: {told}")
    content |= {"id": name, "name": f"{here['cpu']}, measured", "detect": None}
    return Profile.model_validate(content)


def require_new(path: Path) -> None:
    """Raises: UsageError, ResourceError where a profile cannot be written: told before a minute of measuring."""
    if path.suffix not in {".yaml", ".yml"}:
        raise UsageError(f"{path}: a profile is a .yaml file. Give -o my-machine.yaml.")
    if not re.fullmatch(NAME, path.stem):
        raise UsageError(
            f"{path}: the profile is called as the file, and '{path.stem}' is no name of one. Allowed are small "
            "letters, digits, '.', '_' and '-', beginning with a letter or digit."
        )
    if path.exists():
        raise UsageError(f"{path} exists. Remove it, or give another -o.")
    if not path.parent.is_dir():
        raise UsageError(f"{path.parent} is not a folder. Make it, or give another -o.")
    if not os.access(path.parent, os.W_OK):
        raise ResourceError(f"{path.parent} cannot be written. Give another -o.")


def write(profile: Profile, path: Path) -> None:
    """As a file that `--profile` takes."""
    text = yaml.safe_dump(profile.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=110)
    write_text(path, text)


def read_bandwidth(threads: int) -> float:
    """GB/s of reading memory once, the best of several: noise only takes away."""
    values = torch.ones(READ_BYTES // 4)
    with _threads(threads):
        return READ_BYTES / 1e9 / min(kernel_speed.seconds(values.sum) for _ in range(7))


def matrix_gflops(dtype: torch.dtype, threads: int) -> float:
    """Billions of operations a second of a matrix product in torch, a multiply-add being two; the best of several."""
    left = torch.ones(MATRIX, MATRIX, dtype=dtype)
    with _threads(threads):
        return 2 * MATRIX**3 / 1e9 / min(kernel_speed.seconds(lambda: left @ left) for _ in range(7))


def kernel_ratios(size: int, threads: int, progress: Progress) -> Ratios:
    """(use, bits) → how many times faster than float32 the kernel is, for decode and prefill, or what is wrong with
    it."""
    plain, *others = kernel_probe.probes(size)
    found: Ratios = {}
    for place, probe in enumerate(others):
        progress.tick("Timing kernels", place, len(others))
        if probe.use == "weight_and_static_activation":  # a convolution: float32 here is a layer
            continue
        problem = kernel_probe.check(probe, threads).problem
        timed = {phase: ratio(plain, probe, batch, threads) for phase, batch in BATCHES.items()} if not problem else {}
        found[probe.use, probe.bits] = problem or timed
    progress.tick("Timing kernels", len(others), len(others))
    return found


def kernel_speeds(
    size: int, threads: int, node_s: float, progress: Progress, broken: Collection[tuple[str, int]] = ()
) -> Speeds:
    """(use, bits) → the figures of the kernel, one per block; none of those that are broken here."""
    found: Speeds = {}
    count = 2 + len(kernel_speed.BITS) * len(kernel_speed.BLOCKS)
    for place, product in enumerate(kernel_speed.products(size)):
        progress.tick("Timing layers in a chain", place, count)
        if (product.use, product.bits) not in broken:
            timed = kernel_speed.measure(product, threads, node_s)
            found.setdefault((product.use, product.bits), []).append(timed)
    progress.tick("Timing layers in a chain", count, count)
    return found


def _peaks(size: int, threads: int, told: str) -> dict[str, dict[str, Any]]:
    """Per core. Of float32 what the faster of torch and onnxruntime reaches, else it would bound nothing; onnxruntime
    has no other type here."""
    rates = {key: (matrix_gflops(dtype, threads), f"{MATRIX}x{MATRIX} by torch") for key, dtype in DTYPES.items()}
    other = kernel_speed.matmul_gflops(size, threads)
    if other > rates["float32"][0]:
        rates["float32"] = other, f"{size}x{size} with {kernel_speed.PEAK_ROWS} rows by onnxruntime, faster than torch"
    return {key: _figure(rate / threads, f"products of {what}: {told}") for key, (rate, what) in rates.items()}


def ratio(plain: Probe, probe: Probe, batch: int, threads: int) -> float:
    """Median of the paired ratios of time, plain to probe, over alternating rounds."""
    calls = [_call(each, batch, threads) for each in (plain, probe)]
    for call in calls:
        call()
    pairs = [[kernel_speed.seconds(call) for call in calls] for _ in range(ROUNDS)]
    return statistics.median(first / second for first, second in pairs)


def _call(probe: Probe, batch: int, threads: int) -> Callable[[], Any]:
    session, _ = kernel_probe.open_probe(probe, threads)
    feeds = {"x": probe.make(batch)}
    return lambda: session.run(None, feeds)


def _measured(entry: dict[str, Any], ratios: Ratios, told: str) -> None:
    """Fill in one line of a profile's table, where all its widths were tried; a stored width may be wider. A line for
    one format alone keeps what it says: it is another kernel that was tried."""
    if entry.get("format"):
        return
    widths = [entry["stored_bits"] or bits for bits in entry["bits"]]
    found = [ratios.get((entry["use"], bits)) for bits in widths]
    if not found or None in found:
        return
    problem = next((each for each in found if isinstance(each, str)), None)
    if problem is not None:
        entry |= {"state": "no", "evidence": "measured", "note": f"the kernel {problem}", "source": told}
        return
    worst = {phase: min(each[phase] for each in found if isinstance(each, dict)) for phase in BATCHES}
    fast = min(worst.values()) >= SLOWER and max(worst.values()) >= QUICKER
    blocks = f", with blocks of {kernel_probe.BLOCK}" if entry["blocks"] else ""
    figures = ", ".join(f"{phase} {value:.2g}x float32" for phase, value in worst.items()) + blocks
    figures += f". Of the class: {entry['note']}" if entry["note"] and entry["evidence"] != "measured" else ""
    entry |= {"state": "fast" if fast else "works", "evidence": "measured", "note": figures, "source": told}


def _with_speeds(entry: dict[str, Any], speeds: Speeds, told: str) -> None:
    """Fill in the figures of one line of a profile's table, where all its widths were timed on its kernel: the slowest
    of them, for each block."""
    entry.pop("speeds", None)
    widths = [(entry["use"], entry["stored_bits"] or bits) for bits in entry["bits"]]
    found = [speeds.get(width, []) for width in widths]
    if entry["state"] == "no" or entry.get("format") or entry["element"] != "integer" or not all(found):
        return
    timed = [one for each in found for one in each if one.product.operator == entry["kernel"]]
    figures = []
    for block in dict.fromkeys(one.product.block for one in timed):
        alike = [one for one in timed if one.product.block == block]
        if len(alike) == len(widths) and (block in entry["blocks"] or (not block and not entry["blocks"])):
            rates = {key: min(getattr(one, key) for one in alike) for key in ("gb_s", "gflops")}
            figures.append({"block": block or None, **{f"kernel_{key}": _figure(v, told) for key, v in rates.items()}})
    if figures:
        entry["speeds"] = figures


def _capacity(told: str) -> dict[str, Any] | None:
    from compress.memory import allowed_memory

    allowed = allowed_memory()
    return None if allowed is None else {"value": allowed, "state": "measured", "source": f"of the system: {told}"}


def _figure(value: float, source: str) -> dict[str, Any]:
    return {"value": float(f"{value:.3g}"), "state": "measured", "source": source}


class _threads:  # noqa: N801 (a context, used like a function)
    """Meanwhile torch uses so many threads."""

    def __init__(self, count: int) -> None:
        self.count, self.before = count, torch.get_num_threads()

    def __enter__(self) -> None:
        torch.set_num_threads(self.count)

    def __exit__(self, *_: Sequence[object]) -> None:
        torch.set_num_threads(self.before)
