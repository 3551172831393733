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
    envs: Path, name: str, folder: Path, prompts: list[list[int]], count: int, pad: int | None = None
) -> tuple[dict[str, str], list[list[int]]]:
    """Versions, and tokens after each prompt; without network. pad: run all prompts as one batch, padded with it.

    Raises: InputError with the client's last words.
    """
    command = [str(python_of(envs / name)), str(HERE / f"client_{name}.py"), str(folder.resolve())]
    command += [json.dumps(prompts), str(count)]
    command += [] if pad is None else ["--pad", str(pad)]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise InputError(f"{name} did not run ({error}). Build its environment with build_envs.py.") from error
    if done.returncode:
        raise InputError((done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1])
    versions, tokens = done.stdout.splitlines()[-2:]
    return json.loads(versions), json.loads(tokens)
