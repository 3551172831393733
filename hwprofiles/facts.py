"""Facts about this machine, as text: processor, cores and memory that this process may really use.

Parsers take text and folders, so that they can be tried without the machine; what cannot be found is 'unknown'.
"""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Collection, Iterator
from pathlib import Path

UNKNOWN = "unknown"
CGROUPS = Path("/sys/fs/cgroup")
UNLIMITED_BYTES = 1 << 60  # cgroup v1 writes a huge number for "no limit"

_ARCHITECTURES = {"amd64": "x86_64", "x64": "x86_64", "arm64": "aarch64"}
_APPLE_FLAGS = {"feat_dotprod": "asimddp", "feat_i8mm": "i8mm", "feat_bf16": "bf16", "avx512vnni": "avx512_vnni"}


def machine() -> dict[str, str]:
    """system, architecture, cpu, flags, cpus, cores, threads, memory_bytes, memory_limit_bytes.

    `cpus` are logical, `cores` physical, both of the process's affinity; `threads` is `cores` under the CPU quota.
    """
    name = platform.machine().lower()
    facts = {"system": platform.system(), "architecture": _ARCHITECTURES.get(name, name) or UNKNOWN}
    quota = None
    if facts["system"] == "Darwin":
        facts |= parse_sysctl(_sysctl())
    else:
        groups = _text(Path("/proc/self/cgroup"))
        quota = cpu_quota(groups)
        facts |= parse_cpuinfo(_text(Path("/proc/cpuinfo")), _affinity())
        facts["memory_bytes"] = parse_meminfo(_text(Path("/proc/meminfo")))
        facts["memory_limit_bytes"] = str(memory_limit(groups) or UNKNOWN)
    cores = int(facts["cores"])
    facts["threads"] = str(max(1, min(cores, int(quota))) if quota else cores)
    return facts


def parse_cpuinfo(text: str, affinity: Collection[int] | None = None) -> dict[str, str]:
    """cpu, flags, cpus and cores from the text of /proc/cpuinfo, for the processors in `affinity` (null: all)."""
    sections = [_fields(part) for part in text.split("\n\n")]
    processors = [each for each in sections if each.get("processor", "").isdigit()]
    ours = [each for each in processors if affinity is None or int(each["processor"]) in affinity] or processors
    flags = [set((each.get("flags") or each.get("Features") or "").split()) for each in ours]
    cores = {(each.get("physical id"), each["core id"]) for each in ours if "core id" in each}
    cpus = len(ours) or len(affinity or ()) or os.cpu_count() or 1
    return {
        "cpu": _model_name(sections, ours),
        "flags": " ".join(sorted(set.intersection(*flags))) if flags else "",
        "cpus": str(cpus),
        "cores": str(len(cores) or cpus),
    }


def parse_meminfo(text: str) -> str:
    """Bytes of main memory from the text of /proc/meminfo."""
    words = _fields(text).get("MemTotal", "").split()
    return str(int(words[0]) * 1024) if words and words[0].isdigit() else UNKNOWN


def parse_sysctl(text: str) -> dict[str, str]:
    """The same facts from macOS's `sysctl machdep.cpu hw`."""
    found = _fields(text)
    named = f"{found.get('machdep.cpu.features', '')} {found.get('machdep.cpu.leaf7_features', '')}".lower().split()
    named += [key.split(".")[-1].lower() for key, on in found.items() if key.startswith("hw.optional.") and on == "1"]
    cpus = found.get("hw.logicalcpu", "") or str(os.cpu_count() or 1)
    return {
        "cpu": found.get("machdep.cpu.brand_string", UNKNOWN),
        "flags": " ".join(sorted({_APPLE_FLAGS.get(name, name) for name in named})),
        "cpus": cpus,
        "cores": found.get("hw.physicalcpu", cpus),
        "memory_bytes": found.get("hw.memsize", UNKNOWN),
        "memory_limit_bytes": UNKNOWN,
    }


def memory_limit(groups: str, root: Path = CGROUPS) -> int | None:
    """The lowest memory limit of the process's cgroup and those above it; `groups`: text of /proc/self/cgroup."""
    files = _group_files(groups, root, "memory", "memory.max", "memory.limit_in_bytes")
    limits = [int(text) for text in (_text(file).strip() for file in files) if text.isdigit()]
    return min((limit for limit in limits if limit < UNLIMITED_BYTES), default=None)


def cpu_quota(groups: str, root: Path = CGROUPS) -> float | None:
    """How many processors' worth of time the process's cgroups allow, where they limit it."""
    quotas = []
    for file in _group_files(groups, root, "cpu", "cpu.max", "cpu.cfs_quota_us"):
        words = _text(file).split()
        if len(words) == 1:  # version 1 keeps the period in a file of its own
            words += _text(file.with_name("cpu.cfs_period_us")).split()
        if len(words) == 2 and all(word.isdigit() and int(word) > 0 for word in words):
            quotas.append(int(words[0]) / int(words[1]))
    return min(quotas, default=None)


def _group_files(groups: str, root: Path, controller: str, v2_file: str, v1_file: str) -> Iterator[Path]:
    """The controller's file in the process's cgroup and in each one above it, for cgroup versions 1 and 2."""
    for line in groups.splitlines():
        number, controllers, path = [*line.split(":", 2), "", ""][:3]
        if controller in controllers.split(","):
            folder, name = root / controller, v1_file
        elif number == "0":
            folder, name = root, v2_file
        else:
            continue
        parts = [part for part in path.split("/") if part not in {"", ".."}]
        yield from (folder.joinpath(*parts[:depth], name) for depth in range(len(parts) + 1))


def _model_name(sections: list[dict[str, str]], ours: list[dict[str, str]]) -> str:
    """x86 names the model in each processor; Arm gives numbers, and some boards a `Model` line at the end."""
    first = ours[0] if ours else {}
    if "model name" in first:
        return first["model name"]
    board = next((each["Model"] for each in sections if "Model" in each), "")
    if board or "CPU part" not in first:
        return board or UNKNOWN
    return f"Arm implementer {first.get('CPU implementer', '?')} part {first['CPU part']}"


def _fields(text: str) -> dict[str, str]:
    pairs = (line.partition(":") for line in text.splitlines() if ":" in line)
    return {key.strip(): value.strip() for key, _, value in pairs}


def _affinity() -> frozenset[int] | None:
    return frozenset(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _sysctl() -> str:
    command = ["/usr/sbin/sysctl", "machdep.cpu", "hw"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=5, check=False).stdout
    except (OSError, subprocess.SubprocessError):
        return ""
