"""Create the environments of the rivals: FOLDER/NAME from NAME.txt, each with the CPU build of torch installed first.

    python benchmarks/rivals/build_envs.py [FOLDER] [--only NAME ...]

Does nothing for an environment that was finished from the same requirements. Where pip looks for wheels is pip's own
setting (PIP_INDEX_URL, PIP_EXTRA_INDEX_URL, pip.conf); torch is named before the rest and held there, so that no
requirement brings its CUDA build.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import venv
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from interop.build_envs import python_of  # noqa: E402  (the benchmarks folder is no package)

NAMES = ("light", "llmcompressor", "gptqmodel", "nncf", "vq")
TORCH = "torch==2.13.0"
DEFAULT = HERE.parents[1] / ".venv-rivals"

ALONE = {"gptqmodel": "gptqmodel==7.7.0"}
"""Packages installed without their dependencies: this one names a torch that the others do not take."""
BUILD_SETTINGS = {"BUILD_CUDA_EXT": "0", "MAX_JOBS": "2"}
"""Read by source builds: no kernels for a GPU."""


def install(python: Path, *arguments: str) -> None:
    """One pip install."""
    command = [str(python), "-m", "pip", "install", "--quiet", *arguments]
    subprocess.run(command, check=True, env={**os.environ, **BUILD_SETTINGS})


def build(environment: Path, requirements: Path) -> bool:
    """Make one environment. Returns False where it is already as the requirements say."""
    alone = ALONE.get(requirements.stem, "")
    wanted = f"{TORCH}\n{requirements.read_text(encoding='utf8')}{alone}\n"
    stamp, python = environment / "finished.txt", python_of(environment)
    if stamp.is_file() and stamp.read_text(encoding="utf8") == wanted and python.exists():
        return False
    venv.create(environment, with_pip=True, clear=True)
    install(python, TORCH, "setuptools", "wheel", "numpy")
    install(python, TORCH, "-r", str(requirements))
    if alone:
        install(python, "--no-deps", "--no-build-isolation", alone)
    stamp.write_text(wanted, encoding="utf8")
    return True


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=DEFAULT, help="default: .venv-rivals of this checkout")
    parser.add_argument("--only", nargs="+", choices=NAMES, default=NAMES)
    given = parser.parse_args()
    failed = 0
    for name in given.only:
        try:
            made = build(given.folder / name, HERE / f"{name}.txt")
            print(f"{name}: {'built' if made else 'already there'}", flush=True)
        except subprocess.CalledProcessError:
            print(f"{name}: pip could not install {name}.txt; its message is above.", file=sys.stderr, flush=True)
            failed = 1
    return failed


if __name__ == "__main__":
    sys.exit(main())
