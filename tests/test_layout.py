"""How the repository hangs together: links, imports one way, light start-up, file sizes."""

import ast
import os
import re
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parents[1]
CONTRIBUTING = ROOT / "CONTRIBUTING.md"
drawn = SimpleNamespace(**runpy.run_path(str(ROOT / "scripts" / "draw_imports")))
LINKED, sources, imports = drawn.LINKED, drawn.sources, drawn.imports
# children import what is installed, not the checkout that the tests were started in
NEUTRAL = {"cwd": tempfile.gettempdir(), "env": {**os.environ, "PYTHONSAFEPATH": "1"}}

PACKAGES = ("compress", "compress.passes", "compress.export")
INNER = re.compile(r"\bcompress\.(?:passes|export)\.\w+")


def named(path: Path) -> set[str]:
    """Modules inside compress.passes and compress.export that a file imports, also in functions, or has in a string."""
    strings = {node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant)}
    found = imports(path, later=True) | {
        hit for text in strings if isinstance(text, str) for hit in INNER.findall(text)
    }
    return {name for name in found if any(name == known or name.startswith(known + ".") for known in INSIDE)}


INSIDE = tuple(name for name in sources() if INNER.match(name))


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


def test_imports_go_one_way_as_contributing_draws_them() -> None:
    text = CONTRIBUTING.read_text(encoding="utf8")
    assert drawn.with_drawing(text) == text, "run scripts/draw_imports"


def test_a_ring_of_imports_is_noticed() -> None:
    with pytest.raises(ValueError, match="ring"):
        drawn.levels({"model": {"walk"}, "walk": {"store"}, "store": {"model"}, "errors": set()})


def test_hardware_profiles_import_nothing_of_ours() -> None:
    for module, path in sources().items():
        if module.startswith("compress.hwprofiles"):
            assert all(name.startswith("compress.hwprofiles") for name in imports(path)), module


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
