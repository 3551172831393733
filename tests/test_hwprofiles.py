"""Hardware profiles: the shipped files, a user's own, and what they answer."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml

from compress import hwprofiles
from compress.hwprofiles import Profile, ProfileError, Use, digest, load, names
from compress.hwprofiles.files import FOLDER, contents

ROOT = Path(__file__).resolve().parents[1]
VNNI, AVX2, ARM = "cpu-x86-avx512-vnni", "cpu-x86-avx2", "cpu-arm-dotprod"
USES: tuple[Use, ...] = get_args(Use)


@pytest.fixture
def own(tmp_path: Path) -> Callable[..., Path]:
    """Writes a copy of a shipped profile after `edit` changed it."""

    def write(edit: Callable[[dict[str, Any]], object] = lambda profile: None) -> Path:
        data = yaml.safe_load((FOLDER / f"{VNNI}.yaml").read_text())
        edit(data)
        path = tmp_path / "mine.yaml"
        path.write_text(yaml.safe_dump(data))
        return path

    return write


def test_the_three_classes_are_shipped() -> None:
    assert {VNNI, AVX2, ARM} <= set(names())


@pytest.mark.parametrize("name", names())
def test_every_shipped_profile_loads_under_its_file_name(name: str) -> None:
    profile = load(name)
    assert profile.id == name
    assert all(runtime.ir_version == 10 for runtime in profile.runtimes.values())
    assert profile.gpu is None or profile.detect is None  # a GPU is never picked by itself


def numbers(found: object, path: str = "") -> Iterator[tuple[str, object, object]]:
    """Each number with its path and the mapping that holds it."""
    if isinstance(found, dict):
        for key, value in found.items():
            if isinstance(value, int | float):
                yield f"{path}.{key}", value, found
            yield from numbers(value, f"{path}.{key}")
    if isinstance(found, list):
        for value in found:
            yield from numbers(value, f"{path}[]")


@pytest.mark.parametrize("name", names())
def test_every_number_has_a_source_and_a_unit_in_its_key(name: str) -> None:
    profile = contents(FOLDER / f"{name}.yaml")
    no_quantity = {".schema_version", ".detect.priority", ".cpu.threads"}  # of the file, the user, not the machine
    checked = 0
    for path, _, holder in numbers(profile):
        settings = path.startswith(".runtimes.") and path.endswith((".opset", ".ir_version"))
        if path in no_quantity or settings:
            continue
        assert isinstance(holder, dict)
        assert holder["source"].strip(), path
        if path.endswith(".value"):
            assert any(unit in path for unit in ("_ghz", "_gb_s", "_bytes", "_gflops_per_core", "_gflops.")), path
        checked += 1
    assert checked >= 4
    entries = [entry for runtime in profile["runtimes"].values() for entry in runtime["formats"]]
    assert entries and all(entry["source"].strip() for entry in entries)


@pytest.mark.parametrize("name", names())
@pytest.mark.parametrize("use", USES)
def test_support_always_answers_and_a_refusal_names_what_is_fast(name: str, use: Use) -> None:
    runtime = next(iter(load(name).runtimes.values()))
    for bits in range(1, 34):
        found = runtime.support(use, bits)
        assert (found.use, found.bits) == (use, bits)
        assert found.stored_bits >= bits
        assert (found.state == "no") == (found.kernel == "")
        if found.state == "no":
            assert "Fast here: " in found.note
            assert f"{use} " in found.note


def test_support_gives_the_exporter_what_it_writes() -> None:
    runtime = load(VNNI).runtime("onnxruntime")
    four = runtime.support("weight_only", 4)
    assert (four.state, four.kernel, four.accuracy_level, four.stored_bits) == ("fast", "MatMulNBits", 4, 4)
    assert four.blocks == (16, 32, 64, 128, 256)
    three = runtime.support("weight_only", 3)
    assert (three.state, three.stored_bits) == ("works", 4)
    assert "4-bit" in three.note
    assert runtime.support("weight_only", 6).stored_bits == 8
    assert runtime.support("weight_only", 2).blocks == (32, 64, 128)  # others fall back, 30 times slower
    eight = runtime.support("weight_and_activation", 8)
    assert (eight.state, eight.kernel, eight.blocks) == ("fast", "DynamicQuantizeMatMul", ())
    assert runtime.support("embedding", 8).kernel == "GatherBlockQuantized"
    assert runtime.support("float", 32).state == "fast"


def named(**changes: Any) -> dict[str, Any]:
    entry = {"use": "lookup", "format": "nf4", "bits": [4], "kernel": "Other", "state": "fast"}
    return {**entry, "evidence": "vendor", "source": "a test", **changes}


def test_an_entry_for_one_format_goes_before_the_one_for_all_others(own: Callable[..., Path]) -> None:
    def edit(data: dict[str, Any]) -> None:
        data["runtimes"]["onnxruntime"]["formats"].append(named())

    runtime = load(str(own(edit))).runtime("onnxruntime")
    found = {form: runtime.support("lookup", 4, format=form).kernel for form in ("nf4", "fp4", None)}
    assert found == {"nf4": "Other", "fp4": "MatMulBnb4", None: "MatMulBnb4"}
    assert runtime.support("weight_only", 4, format="int4") == load(VNNI).runtime("onnxruntime").support(
        "weight_only", 4
    )
    assert "lookup nf4 4 bit (Other)" in runtime.support("lookup", 8).note
    assert runtime.support("lookup", 8, format="nf4").state == "no"  # of another width


def test_an_entry_may_refuse_one_format_or_be_the_only_one_of_its_width(own: Callable[..., Path]) -> None:
    def edit(data: dict[str, Any]) -> None:
        entries = data["runtimes"]["onnxruntime"]["formats"]
        entries.append(named(format="fp4", state="no", kernel="", note="never"))
        entries.append(named(format="vptq", bits=[2]))

    runtime = load(str(own(edit))).runtime("onnxruntime")
    states = [runtime.support("lookup", 4, format=form).state for form in ("fp4", "nf4")]
    assert states[0] == "no" and states[1] != "no"
    assert [runtime.support("lookup", 2, format=form).state for form in ("vptq", "nf4", None)] == ["fast", "no", "no"]


def test_one_format_has_one_entry_per_width(own: Callable[..., Path]) -> None:
    def edit(data: dict[str, Any]) -> None:
        data["runtimes"]["onnxruntime"]["formats"] += [named(), named(kernel="A third")]

    with pytest.raises(ProfileError, match="lists twice: lookup nf4 4 bit"):
        load(str(own(edit)))


def test_the_key_changes_no_digest_of_a_profile_without_it(own: Callable[..., Path]) -> None:
    said = load(VNNI).model_dump(mode="json")
    assert [entry["format"] for entry in formats(said) if "format" in entry] == ["codebook"]
    other = load(str(own(lambda data: data["runtimes"]["onnxruntime"]["formats"].append(named()))))
    assert other.model_dump(mode="json")["runtimes"]["onnxruntime"]["formats"][-1]["format"] == "nf4"
    assert digest(other) != digest(load(str(own())))


def test_avx2_warns_of_saturation_and_offers_seven_bits() -> None:
    runtime = load(AVX2).runtime("onnxruntime")
    eight = runtime.support("weight_and_activation", 8)
    assert eight.state == "works"
    assert "7-bit" in eight.note
    assert runtime.support("weight_and_activation", 7).stored_bits == 8


def test_an_unknown_id_or_runtime_names_the_nearest() -> None:
    with pytest.raises(ProfileError, match=rf"Unknown hardware profile 'cpu-x86-avx512-vni'.*Did you mean '{VNNI}'"):
        load("cpu-x86-avx512-vni")
    with pytest.raises(ProfileError, match=r"has no runtime 'onnx'.*Did you mean 'onnxruntime'"):
        load(VNNI).runtime("onnx")


def test_a_users_file_loads_and_its_digest_is_of_what_it_says(own: Callable[..., Path]) -> None:
    assert digest(load(own())) == digest(load(VNNI))
    changed = load(own(lambda data: data["cpu"].update(threads=1)))
    assert changed.cpu.threads == 1
    assert digest(changed) != digest(load(VNNI))


def test_a_profile_may_take_over_the_kernels_of_another(own: Callable[..., Path]) -> None:
    def borrow(data: dict[str, Any]) -> None:
        for key in ("runtimes", "isa", "grid", "target"):
            del data[key]
        data["like"] = AVX2

    mine, other = load(own(borrow)), load(AVX2)
    assert (mine.runtimes, mine.isa, mine.grid, mine.target) == (other.runtimes, other.isa, other.grid, other.target)
    assert mine.memory == load(VNNI).memory and mine.peak == load(VNNI).peak

    kept = load(own(lambda data: data.update(like=["onnxruntime-cuda", AVX2], isa=["avx2"])))
    assert kept.runtimes == load(VNNI).runtimes and kept.isa == ("avx2",)  # its own come first
    assert "CUDAExecutionProvider" in {each.provider for each in load("nvidia-t4").runtimes.values()}


@pytest.mark.parametrize("name", ["cpu-x86-avx3", "../facts", 3, {}])
def test_what_is_borrowed_must_be_a_shipped_profile(own: Callable[..., Path], name: object) -> None:
    with pytest.raises(ProfileError, match=r"mine\.yaml: like: found .*Allowed: .*cpu-x86-avx2"):
        load(own(lambda data: data.update(like=name)))


def test_an_unknown_key_is_refused_with_the_nearest_one(own: Callable[..., Path]) -> None:
    def misspell(data: dict[str, Any]) -> None:
        data["memory"]["bandwith_gb_s"] = data["memory"].pop("bandwidth_gb_s")

    with pytest.raises(ProfileError, match=r"mine\.yaml: memory\.bandwith_gb_s: unknown key.*mean 'bandwidth_gb_s'"):
        load(own(misspell))

    def misspell_format(data: dict[str, Any]) -> None:
        data["runtimes"]["onnxruntime"]["formats"][0]["kernal"] = "MatMul"

    with pytest.raises(ProfileError, match=r"onnxruntime\.formats\.0\.kernal: unknown key\. Did you mean 'kernel'"):
        load(own(misspell_format))


def formats(data: dict[str, Any]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = data["runtimes"]["onnxruntime"]["formats"]
    return found


def speed(block: int, rate: float = 30.0) -> dict[str, Any]:
    """Figures of a kernel, as a profile has them."""
    figure = {"value": rate, "state": "measured", "source": "made up"}
    return {"block": block, "kernel_gb_s": figure, "kernel_gflops": dict(figure, value=300.0)}


def test_figures_of_kernels_change_the_digest_and_their_absence_does_not(own: Callable[..., Path]) -> None:
    """Digests of profiles without them stay those of before there were any."""
    dumped = load(VNNI).model_dump(mode="json")
    assert "node_us" not in dumped["runtimes"]["onnxruntime"]
    assert not any("speeds" in entry for entry in formats(dumped))
    timed = load(own(lambda data: formats(data)[2].update(speeds=[speed(32)])))
    assert digest(timed) != digest(load(own()))
    assert Profile.model_validate(timed.model_dump(mode="json")) == timed


@pytest.mark.parametrize(
    ("edit", "told"),
    [
        (lambda data: data.update(kind="tpu"), r"kind: found 'tpu': .*'cpu', 'gpu' or 'soc'"),
        (lambda data: data.pop("isa") and data.pop("name"), "name: this key is missing"),
        (lambda data: data["cpu"].update(threads=0), r"cpu\.threads: found 0"),
        (lambda data: data["cpu"].update(threads="2"), r"cpu\.threads: found '2'"),
        (lambda data: data["cpu"]["clock_ghz"].update(value=float("nan")), r"cpu\.clock_ghz\.value: found nan"),
        (lambda data: data["cpu"]["clock_ghz"].update(source=""), r"cpu\.clock_ghz\.source"),
        (lambda data: data.update(schema_version=2), "schema_version: found 2"),
        (lambda data: formats(data).append(formats(data)[0]), "lists twice: float 32 bit"),
        (lambda data: formats(data)[2].update(stored_bits=3), "stored_bits 3 cannot hold codes of 4 bits"),
        (lambda data: formats(data)[2].update(kernel=""), "needs the name of its kernel"),
        (lambda data: formats(data)[2].update(speeds=[speed(32, 0)]), r"speeds\.0\.kernel_gb_s\.value: found 0"),
        (lambda data: formats(data)[2].update(speeds=[speed(32, -1)]), r"speeds\.0\.kernel_gb_s\.value: found -1"),
        (lambda data: formats(data)[2].update(speeds=[speed(32, float("inf"))]), r"kernel_gb_s\.value: found inf"),
        (lambda data: formats(data)[2].update(speeds=[{**speed(32), "gb": 1}]), r"speeds\.0\.gb: unknown key"),
        (lambda data: formats(data)[2].update(speeds=[{"block": 32}]), r"kernel_gflops: this key is missing"),
        (lambda data: formats(data)[2].update(speeds=[speed(32), speed(32)]), "speeds lists a block twice"),
        (lambda data: formats(data)[2].update(speeds=[speed(48)]), "block 48 is none of blocks"),
        (lambda data: formats(data)[0].update(speeds=[speed(32)]), r"block 32 is none of blocks, \[\]"),
        (lambda data: formats(data)[2].update(state="no", speeds=[speed(32)]), "refused, so it has no speeds"),
        (lambda data: data["runtimes"]["onnxruntime"].update(node_us=1.5), r"node_us: found 1\.5"),
    ],
)
def test_a_wrong_value_names_file_key_value_and_rule(
    own: Callable[..., Path], edit: Callable[[dict[str, Any]], object], told: str
) -> None:
    with pytest.raises(ProfileError, match=rf"mine\.yaml: .*{told}"):
        load(own(edit))


def test_a_bare_no_is_read_as_the_state(own: Callable[..., Path]) -> None:
    path = own(lambda data: formats(data)[2].update(state="NO-STATE"))
    path.write_text(path.read_text().replace("NO-STATE", "no"))
    assert load(path).runtime("onnxruntime").support("weight_only", 4).state == "no"


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"id: [", "is not YAML"),
        (b"\xff\xfe\x00", "is not YAML"),
        (b"id: a\nid: b\n", "key 'id' is there twice"),
        (b"? [a]\n: b\n", "is not YAML|unhashable|unknown key|found"),
        (b"!!python/object/apply:os.system ['true']", "is not YAML"),
        (b"- a\n", "a mapping of keys is expected"),
        (b"", "a mapping of keys is expected"),
        (b"[" * 5000, "is not YAML"),
        (b"#" * (1 << 20) + b"##", "at most"),
        (b"id: 2026-99-99\n", "is not YAML|found"),
    ],
)
def test_a_file_that_is_no_profile_is_refused(tmp_path: Path, content: bytes, told: str) -> None:
    path = tmp_path / "broken.yaml"
    path.write_bytes(content)
    with pytest.raises(ProfileError, match=rf"broken\.yaml.*({told})"):
        load(path)


def test_a_missing_file_or_a_folder_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "none.yaml", tmp_path, "none.yaml"):
        with pytest.raises(ProfileError, match=r"Hardware profile .*: (No such file|Is a directory)"):
            load(path)
    with pytest.raises(ProfileError, match="Unknown hardware profile ''"):
        load("")


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)


def test_profiles_import_nothing_heavy_and_nothing_of_ours() -> None:
    run = python(
        "import sys, compress.hwprofiles\n"
        "ours = [m for m in sys.modules if m.startswith('compress.') and not m.startswith('compress.hwprofiles')]\n"
        "heavy = {'torch', 'onnx', 'onnxruntime', 'transformers', 'numpy'} & set(sys.modules)\n"
        "print(ours, sorted(heavy))"
    )
    assert run.stdout.strip() == "[] []", run.stderr


@pytest.mark.skipif(not (ROOT / "hwprofiles").is_dir(), reason="tests of an installed wheel: no real folder here")
def test_the_folder_cannot_be_imported_under_its_own_name() -> None:
    run = python("import hwprofiles")
    assert run.returncode == 1
    assert "ImportError: import this as 'compress.hwprofiles', not as 'hwprofiles'" in run.stderr


def test_profiles_are_frozen() -> None:
    profile: Profile = hwprofiles.load(VNNI)
    with pytest.raises(ValueError, match="frozen"):
        setattr(profile, "id", "other")  # noqa: B010  (a plain assignment is refused by mypy)
