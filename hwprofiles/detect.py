"""Which profile fits a machine, from facts about it."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase

from compress.hwprofiles.facts import UNKNOWN, machine
from compress.hwprofiles.files import FOLDER, load, names
from compress.hwprofiles.schema import Profile, ProfileError

# Flags that decide which kernels run, as Linux spells them.
# fmt: off
ISA = (
    "avx2", "fma", "f16c", "avx_vnni", "avx_vnni_int8", "avx512f", "avx512bw", "avx512_vnni", "avx512_bf16",
    "avx512_fp16", "amx_int8", "amx_bf16", "asimd", "asimdhp", "asimddp", "i8mm", "bf16", "sve", "sve2",
)
# fmt: on


def detect(facts: Mapping[str, str] | None = None) -> Profile:
    """The profile of highest priority that fits `facts` (null: this machine)."""
    facts = machine() if facts is None else facts
    profiles = [profile for profile in map(load, names()) if profile.detect is not None]
    fits = [profile for profile in profiles if not _unmet(profile, facts)]
    if not fits:
        raise ProfileError(_nothing_fits(profiles, facts))
    return max(fits, key=lambda profile: profile.detect.priority if profile.detect else 0)


def machine_summary(facts: Mapping[str, str] | None = None) -> dict[str, str]:
    """What a report says of the machine: cpu, cores, isa, memory_gb (what this process may use)."""
    facts = machine() if facts is None else facts
    sizes = [facts.get(key, UNKNOWN) for key in ("memory_bytes", "memory_limit_bytes")]
    known = [int(size) for size in sizes if size.isdigit()]
    return {
        "cpu": facts.get("cpu", UNKNOWN),
        "cores": facts.get("cores", UNKNOWN),
        "isa": " ".join(_isa(facts)) or UNKNOWN,
        "memory_gb": f"{min(known) / 1e9:.1f}" if known else UNKNOWN,
    }


def _isa(facts: Mapping[str, str]) -> list[str]:
    flags = set(facts.get("flags", "").split())
    return [flag for flag in ISA if flag in flags]


def _unmet(profile: Profile, facts: Mapping[str, str]) -> str:
    """Why the profile does not fit; empty where it does."""
    flags = set(facts.get("flags", "").split())
    if profile.detect is None:
        return "is never picked by itself"
    if facts.get("architecture") not in profile.detect.architecture:
        return f"is for {' or '.join(profile.detect.architecture)}"
    name = facts.get("cpu", UNKNOWN)
    if profile.detect.cpu and not any(fnmatchcase(name, pattern) for pattern in profile.detect.cpu):
        return f"is for {' or '.join(profile.detect.cpu)}"
    if missing := [flag for flag in profile.isa if flag not in flags]:
        return f"needs {', '.join(missing)}"
    if excluded := [flag for flag in profile.detect.forbidden if flag in flags]:
        return f"is for machines without {', '.join(excluded)}"
    return ""


def _nothing_fits(profiles: list[Profile], facts: Mapping[str, str]) -> str:
    flags = " ".join(_isa(facts)) or "none"
    found = f"{facts.get('architecture', UNKNOWN)}, '{facts.get('cpu', UNKNOWN)}', flags {flags}"
    classes = [profile for profile in profiles if profile.detect and not profile.detect.cpu]  # not those of one chip
    reasons = "; ".join(f"{profile.id} {_unmet(profile, facts)}" for profile in classes)
    example = FOLDER / "cpu-x86-avx2.yaml"
    return (
        f"No hardware profile fits this machine ({found}): {reasons}. Name one of these if it is near enough, or write "
        f"your own: copy {example} to my-machine.yaml, edit id, isa, detect, peak and runtimes, and give that path "
        "as the profile."
    )
