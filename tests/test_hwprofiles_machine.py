"""Facts about a machine, and finding the hardware profile that fits it."""

from __future__ import annotations

from pathlib import Path

import pytest

from compress.hwprofiles import ProfileError, detect, machine_summary
from compress.hwprofiles.facts import cpu_quota, machine, memory_limit, parse_cpuinfo, parse_meminfo, parse_sysctl
from compress.hwprofiles.files import FOLDER

VNNI, AVX2, ARM = "cpu-x86-avx512-vnni", "cpu-x86-avx2", "cpu-arm-dotprod"
AMX, PI = "cpu-x86-amx", "cpu-raspberry-pi-5"

X86 = """processor\t: {cpu}
model name\t: {name}
physical id\t: 0
core id\t\t: {core}
flags\t\t: fpu sse2 {flags}

"""
AVX512 = "avx2 fma avx512f avx512bw avx512dq avx512vl"
RASPBERRY = """processor\t: 0
BogoMIPS\t: 108.00
Features\t: fp asimd crc32 atomics asimddp
CPU implementer\t: 0x41
CPU part\t: 0xd0b

processor\t: 1
Features\t: fp asimd crc32 atomics asimddp
CPU implementer\t: 0x41
CPU part\t: 0xd0b

Model\t\t: Raspberry Pi 5 Model B Rev 1.0
"""
GRAVITON4 = """processor\t: 0
Features\t: fp asimd asimddp i8mm bf16 sve sve2
CPU implementer\t: 0x41
CPU part\t: 0xd4f
"""
APPLE = """machdep.cpu.brand_string: Apple M4
hw.physicalcpu: 10
hw.logicalcpu: 10
hw.memsize: 17179869184
hw.optional.arm.FEAT_DotProd: 1
hw.optional.arm.FEAT_I8MM: 1
hw.optional.arm.FEAT_SME: 0
"""


def x86(flags: str, processors: int = 1, threads_per_core: int = 1) -> str:
    return "".join(
        X86.format(cpu=cpu, name="Some CPU", core=cpu // threads_per_core, flags=flags) for cpu in range(processors)
    )


@pytest.mark.parametrize(
    ("architecture", "cpuinfo", "expected"),
    [
        ("x86_64", x86(f"{AVX512} avx512_vnni"), VNNI),
        ("x86_64", x86(AVX512), AVX2),
        ("x86_64", x86("avx2 fma avx_vnni"), AVX2),
        ("x86_64", x86(f"{AVX512} avx512_vnni amx_int8 amx_bf16"), AMX),
        ("aarch64", RASPBERRY, PI),
        ("aarch64", RASPBERRY.replace("Raspberry Pi 5", "Orange Pi 5"), ARM),
        ("aarch64", RASPBERRY.partition("Model")[0].replace("0xd0b", "0xd4f"), ARM),
        ("aarch64", GRAVITON4, "cpu-arm-neoverse-v2"),
    ],
)
def test_detect_picks_the_best_profile(architecture: str, cpuinfo: str, expected: str) -> None:
    assert detect({"architecture": architecture, **parse_cpuinfo(cpuinfo)}).id == expected


@pytest.mark.parametrize(
    ("chip", "expected"), [("M4", "cpu-apple-m4"), ("M4 Pro", "cpu-apple-m4-pro"), ("M9 Ultra", ARM)]
)
def test_detect_picks_a_chip_by_its_name_and_else_the_class(chip: str, expected: str) -> None:
    facts = {"architecture": "aarch64", **parse_sysctl(APPLE.replace("Apple M4", f"Apple {chip}"))}
    assert detect(facts).id == expected


def test_what_apple_tells_is_summed_up() -> None:
    facts = {"architecture": "aarch64", **parse_sysctl(APPLE)}
    assert facts["cores"] == "10"
    assert machine_summary(facts) == {"cpu": "Apple M4", "cores": "10", "isa": "asimddp i8mm", "memory_gb": "17.2"}


@pytest.mark.parametrize("architecture", ["x86_64", "riscv64", "aarch64"])
def test_a_machine_that_no_profile_fits_is_told_what_was_found_and_what_to_do(architecture: str) -> None:
    with pytest.raises(ProfileError, match=rf"\({architecture}, 'Some CPU', flags none\)") as error:
        detect({"architecture": architecture, **parse_cpuinfo(x86("sse4_2"))})
    assert "write your own" in str(error.value)
    assert str(FOLDER / "cpu-x86-avx2.yaml") in str(error.value)


def test_cores_are_the_physical_ones_of_the_affinity() -> None:
    text = x86("avx2", processors=8, threads_per_core=2)
    assert parse_cpuinfo(text)["cores"] == "4"
    assert parse_cpuinfo(text) | {"flags": ""} == {"cpu": "Some CPU", "flags": "", "cpus": "8", "cores": "4"}
    assert parse_cpuinfo(text, {0, 1, 2})["cores"] == "2"
    arm = parse_cpuinfo(RASPBERRY)
    assert (arm["cpu"], arm["cores"]) == ("Raspberry Pi 5 Model B Rev 1.0", "2")
    assert parse_cpuinfo("", {0, 5})["cores"] == "2"
    assert parse_cpuinfo("garbage\n\n: :\nprocessor: x")["cpu"] == "unknown"


def test_memory_and_processor_limits_are_read_from_both_cgroup_versions(tmp_path: Path) -> None:
    v2, v1 = "0::/a/b\n", "4:memory:/c\n3:cpu,cpuacct:/c\n0::/\n"
    assert memory_limit(v2, tmp_path) is None
    assert cpu_quota(v1, tmp_path) is None
    for name, text in {
        "a/memory.max": "2000000\n",
        "a/b/memory.max": "max\n",
        "a/b/cpu.max": "150000 100000\n",
        "memory/memory.limit_in_bytes": "9223372036854771712\n",
        "memory/c/memory.limit_in_bytes": "3000000\n",
        "cpu/cpu.cfs_quota_us": "-1\n",
        "cpu/cpu.cfs_period_us": "100000\n",
        "cpu/c/cpu.cfs_quota_us": "400000\n",
        "cpu/c/cpu.cfs_period_us": "100000\n",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert memory_limit(v2, tmp_path) == 2_000_000  # the parent's
    assert cpu_quota(v2, tmp_path) == 1.5
    assert memory_limit(v1, tmp_path) == 3_000_000
    assert cpu_quota(v1, tmp_path) == 4
    assert parse_meminfo("MemTotal:       2000 kB\n") == "2048000"
    assert parse_meminfo("") == "unknown"


def test_this_machine_is_described() -> None:
    facts = machine()
    assert 1 <= int(facts["threads"]) <= int(facts["cores"]) <= int(facts["cpus"])
    summary = machine_summary(facts)
    assert set(summary) == {"cpu", "cores", "isa", "memory_gb"}
    assert machine_summary({}) == dict.fromkeys(summary, "unknown")


def test_a_memory_limit_is_what_the_report_shows() -> None:
    assert machine_summary({"memory_bytes": "64000000000", "memory_limit_bytes": "8000000000"})["memory_gb"] == "8.0"
