"""How the repository hangs together: links, imports one way, light start-up, file sizes."""

import ast
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LINKED = ("passes", "export", "hwprofiles")
# children import what is installed, not the checkout that the tests were started in
NEUTRAL = {"cwd": tempfile.gettempdir(), "env": {**os.environ, "PYTHONSAFEPATH": "1"}}

# A module may import those of its own level or below; a module in no level may import anything.
LEVELS = (
    ("compress.hwprofiles",),
    (
        "compress.errors",
        "compress.bnb",
        "compress.base_record",
        "compress.quality_records",
        "compress.run_records",
        "compress.task_records",
        "compress.records",
        "compress.spec",
        "compress.grid",
        "compress.rotation",
        "compress.floats",
        "compress.speed_records",
        "compress.disturbance",
        "compress.stats",
        "compress.proportions",
        "compress.quantiles",
        "compress.tables",
        "compress.progress",
        "compress.memory",
        "compress.sampling",
        "compress.text_stream",
        "compress.embedding",
        "compress.onnx_interface",
        "compress.executor",
        "compress.front",
    ),
    (
        "compress.folder",
        "compress.leaks",
        "compress.stub",
        "compress.activations",
        "compress.target",
        "compress.probing",
        "compress.left_padded",
        "compress.profiles",
        "compress.formats",
        "compress.hessian",
        "compress.products",
        "compress.solve",
        "compress.histogram",
        "compress.observers",
        "compress.windows",
        "compress.layer",
        "compress.transforms",
        "compress.timing",
        "compress.timing_record",
        "compress.timing_process",
        "compress.spans",
        "compress.energy",
        "compress.metrics",
        "compress.token_scores",
        "compress.embedding_scores",
        "compress.fidelity",
        "compress.calibration_error",
        "compress.quality",
        "compress.task_pairs",
        "compress.token_quality",
        "compress.classification",
        "compress.user_module",
        "compress.fold_norms",
        "compress.image_source",
        "compress.reader",
        "compress.outputs",
        "compress.onnx_file",
        "compress.onnx_layers",
        "compress.onnx_prepare",
        "compress.report",
        "compress.comparison",
        "compress.provenance",
    ),
    ("compress.skeleton", "compress.weights", "compress.experts", "compress.image_model"),
    ("compress.onnx_module", "compress.onnx_model"),
    ("compress.distill", "compress.trainable", "compress.soft"),
    ("compress.model",),
    (
        "compress.collect",
        "compress.stream",
        "compress.turns",
        "compress.data",
        "compress.store",
        "compress.images",
        "compress.image_stream",
        "compress.backward",
        "compress.kernel_probe",
    ),
    ("compress.layerpass", "compress.workspace", "compress.sources", "compress.pictures", "compress.prompts"),
    ("compress.generation",),
    ("compress.continuations", "compress.harness_model"),
    ("compress.blockpass",),
    ("compress.applying", "compress.folding", "compress.tracing"),
    ("compress.wiring", "compress.residual", "compress.modelpass"),
    ("compress.heads",),
    ("compress.passes", "compress.matching", "compress.export"),
    ("compress.walk", "compress.shared_stages"),
    ("compress.stages",),
    ("compress.pipeline",),
    (
        "compress.recipe",
        "compress.evaluate",
        "compress.token_evaluate",
        "compress.image_evaluate",
        "compress.output_evaluate",
        "compress.measure",
        "compress.end_to_end",
        "compress.harness",
        "compress.predict",
        "compress.roofline",
        "compress.manifest",
        "compress.asked",
    ),
    ("compress.plan", "compress.describe", "compress.calibrate", "compress.doctor"),
    ("compress.run_report",),
    ("compress.run",),
    ("compress.artifact", "compress.quickstart", "compress.reproduction"),
    ("compress.engine", "compress.sweep"),
    ("compress.opening", "compress.predictions"),
    (
        "compress.cli",
        "compress.cli_engine",
        "compress.cli_artifact",
        "compress.cli_info",
        "compress.cli_options",
        "compress.cli_report",
        "compress.cli_sweep",
    ),
)


PACKAGES = ("compress", "compress.passes", "compress.export")
INNER = re.compile(r"\bcompress\.(?:passes|export)\.\w+")


def named(path: Path) -> set[str]:
    """Modules inside compress.passes and compress.export that a file imports, also in functions, or has in a string."""
    strings = {node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant)}
    found = imports(path, later=True) | {
        hit for text in strings if isinstance(text, str) for hit in INNER.findall(text)
    }
    return {name for name in found if any(name == known or name.startswith(known + ".") for known in INSIDE)}


def sources() -> dict[str, Path]:
    """Module name → file of everything we ship."""
    found = {}
    for path in [*(ROOT / "compress").rglob("*.py"), *(p for name in LINKED for p in (ROOT / name).rglob("*.py"))]:
        relative = path.relative_to(ROOT)
        if relative.parts[0] == "compress" and len(relative.parts) > 1 and relative.parts[1] in LINKED:
            continue
        parts = relative.with_suffix("").parts
        name = ".".join(parts if parts[0] == "compress" else ("compress", *parts)).removesuffix(".__init__")
        found[name] = path
    return found


INSIDE = tuple(name for name in sources() if INNER.match(name))


def level(module: str) -> int | None:
    names = [(name, place) for place, group in enumerate(LEVELS) for name in group]
    return next((place for name, place in names if module == name or module.startswith(name + ".")), None)


def imports(path: Path, later: bool = False) -> set[str]:
    """Modules of ours that a file imports when it is imported itself; those for type checkers do not count.

    later: also what its functions import when they are called.
    """
    tree, found = ast.parse(path.read_text()), set()
    guarded = {
        id(child)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for child in ast.walk(node)
    }
    inside = {
        id(child)
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef)
        for child in ast.walk(node)
        if child is not node
    }
    for node in ast.walk(tree):
        if id(node) in guarded or (id(node) in inside and not later):
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {
                node.module,
                *(f"{node.module}.{alias.name}" for alias in node.names if node.module in PACKAGES),
            }
    return {name for name in found if name.startswith("compress.")}


@pytest.mark.parametrize("name", LINKED)
def test_the_folders_at_the_top_are_linked_into_the_package(name: str) -> None:
    link = ROOT / "compress" / name
    assert link.is_symlink() and link.resolve() == ROOT / name
    assert not link.readlink().is_absolute()


@pytest.mark.parametrize("name", LINKED)
def test_a_folder_cannot_be_imported_under_another_name(name: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", f"import {name}"], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 1 and "ImportError" in done.stderr and f"compress.{name}" in done.stderr


def test_imports_go_one_way() -> None:
    wrong = []
    for module, path in sources().items():
        own = level(module)
        for other in imports(path):
            place = level(other)
            if own is not None and place is not None and place > own:
                wrong.append(f"{module} imports {other}")
    assert not wrong


def test_hardware_profiles_import_nothing_of_ours() -> None:
    for module, path in sources().items():
        if module.startswith("compress.hwprofiles"):
            assert all(name.startswith("compress.hwprofiles") for name in imports(path)), module


def test_every_module_has_a_level() -> None:
    assert [name for name in sources() if level(name) is None and name not in ("compress", "compress.__main__")] == []


def test_the_engine_names_no_pass_and_no_target() -> None:
    """It reaches them through `compress.passes.find` and `compress.export.find`."""
    for module, path in sources().items():
        own = next((folder for folder in PACKAGES[1:] if module == folder or module.startswith(folder + ".")), None)
        others = {name for name in named(path) if own is None or not name.startswith(own + ".")}
        assert not others, f"{module} names {others}"


@pytest.mark.parametrize(
    "text",
    [
        "from compress.export.onnx.runtime import Session",
        "import compress.passes.gptq",
        "def f():\n    from compress.export import onnx",
        "command = ['-m', 'compress.export.onnx.runtime']",
    ],
)
def test_naming_a_target_or_a_pass_is_noticed_wherever_it_stands(tmp_path: Path, text: str) -> None:
    (tmp_path / "one.py").write_text(text)
    assert named(tmp_path / "one.py")
    (tmp_path / "one.py").write_text("from compress.export import find\nfrom compress.passes import table")
    assert not named(tmp_path / "one.py")


@pytest.mark.parametrize(
    "arguments",
    [
        *(["--help"], ["--version"], ["passes"], ["hardware", "list"]),
        *([verb, "--help"] for verb in ("run", "plan", "generate", "predict", "report", "compare", "reproduce")),
    ],
)
def test_help_and_lists_import_nothing_heavy(arguments: list[str]) -> None:
    code = (
        "import sys\nfrom compress.__main__ import main\n"
        f"code = main({arguments!r})\n"
        "heavy = sorted({'torch', 'transformers', 'onnx', 'onnxruntime', 'scipy', 'numpy'} & set(sys.modules))\n"
        "sys.exit(f'exit {code}, heavy {heavy}' if code or heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, **NEUTRAL)
    assert done.returncode == 0, done.stderr


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = "import sys, compress; sys.exit(int(bool({'torch', 'transformers', 'pydantic'} & set(sys.modules))))"
    assert subprocess.run([sys.executable, "-c", code], check=False, **NEUTRAL).returncode == 0


def test_files_and_functions_stay_short() -> None:
    long = []
    for module, path in sources().items():
        text = path.read_text()
        if text.count("\n") > 350:
            long.append(f"{module}: {text.count(chr(10))} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef) and node.end_lineno and node.end_lineno - node.lineno > 60:
                long.append(f"{module}.{node.name}: {node.end_lineno - node.lineno} lines")
    assert not long


def test_binary_files_stay_small() -> None:
    tracked = subprocess.run(["git", "ls-files", "-z"], capture_output=True, cwd=ROOT, check=False).stdout.split(b"\0")
    paths = [ROOT / name.decode() for name in tracked if name]
    if not paths:
        pytest.skip("not a git checkout")
    binary = [path for path in paths if path.is_file() and not path.is_symlink() and b"\0" in path.read_bytes()[:8192]]
    assert sum(path.stat().st_size for path in binary) < 20_000_000
