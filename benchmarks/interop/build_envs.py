"""Create the two environments of this check: FOLDER/genai and FOLDER/optimum, each from its requirement file.

Does nothing for an environment that was finished from the same requirements. Where pip looks for wheels is pip's own
setting (PIP_INDEX_URL, PIP_EXTRA_INDEX_URL, pip.conf); the CPU build of torch is enough.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import venv
from pathlib import Path

HERE = Path(__file__).resolve().parent
NAMES = ("genai", "optimum")
DEFAULT = HERE.parents[1] / ".venv-interop"


def python_of(environment: Path) -> Path:
    """The interpreter of a virtual environment."""
    return environment / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")


def build(environment: Path, requirements: Path) -> bool:
    """Make one environment. Returns False where it is already as the requirements say."""
    stamp, wanted = environment / "finished.txt", requirements.read_text(encoding="utf8")
    if stamp.is_file() and stamp.read_text(encoding="utf8") == wanted and python_of(environment).exists():
        return False
    venv.create(environment, with_pip=True, clear=True)
    subprocess.run([python_of(environment), "-m", "pip", "install", "--quiet", "-r", requirements], check=True)
    stamp.write_text(wanted, encoding="utf8")
    return True


def main() -> int:
    parser = argparse.ArgumentParser(description="Create the environments of onnxruntime-genai and of optimum.")
    parser.add_argument("folder", type=Path, nargs="?", default=DEFAULT, help="default: .venv-interop of this checkout")
    folder = parser.parse_args().folder
    for name in NAMES:
        try:
            made = build(folder / name, HERE / f"{name}.txt")
        except subprocess.CalledProcessError:
            print(f"{name}: pip could not install {name}.txt; its message is above.", file=sys.stderr)
            return 1
        print(f"{name}: {'built' if made else 'already there'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
