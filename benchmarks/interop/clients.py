"""Running a client in its own environment."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

from build_envs import HERE, python_of

from compress.errors import InputError

# environment → the side on which that runtime expects the padding of a batch
CLIENTS = {"genai": "right", "optimum": "left"}
TIMEOUT_S = 600


def run_client(
    envs: Path,
    name: str,
    folder: Path,
    prompts: list[list[int]],
    count: int,
    pad: int | None = None,
    graph: str | None = None,
) -> tuple[dict[str, str], list[list[int]]]:
    """Versions, and tokens after each prompt; without network. pad: run all prompts as one batch, padded with it;
    graph: another than the folder names (genai only).

    Raises: InputError with the client's last words.
    """
    command = [str(python_of(envs / name)), str(HERE / f"client_{name}.py"), str(folder.resolve())]
    command += [json.dumps(prompts), str(count)]
    command += [] if pad is None else ["--pad", str(pad)]
    command += ["--graph", graph] if graph else []
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise InputError(f"{name} did not run ({error}). Build its environment with build_envs.py.") from error
    if done.returncode:
        raise InputError(_last_words(done.stderr) or f"exit status {done.returncode}")
    versions, tokens = done.stdout.splitlines()[-2:]
    return json.loads(versions), json.loads(tokens)


def _last_words(text: str) -> str:
    """The exception at the end of a traceback: the last line that is not indented, and what follows it."""
    lines = [line for line in text.splitlines() if line.strip()]
    start = max((place for place, line in enumerate(lines) if not line[0].isspace()), default=0)
    return " ".join(line.strip() for line in lines[start:])
