"""Speed and footprint of a baseline and a variant in the same runtime, threads and placement (design §7)."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from compress import hwprofiles
from compress.errors import InputError
from compress.export import find as find_target
from compress.hwprofiles import Profile
from compress.progress import Progress
from compress.records import Footprint, Speed, Timing
from compress.target import Session, Target
from compress.timing import pair, timing_record

PROBE_PROMPT, PROBE_TOKENS = 128, 8

BUDGET_S = 20.0
"""Seconds of timing per setting, all arms together."""

Phase = Literal["prefill", "decode", "encode", "infer"]


def thread_count(profile: Profile) -> int:
    """Threads for one operator: the profile's, else every physical core this process may use."""
    return (profile.cpu and profile.cpu.threads) or int(hwprofiles.machine()["threads"])


def deployable_bytes(folder: Path) -> int:
    """Bytes of all files in an exported folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def footprint(target: Target, folder: Path, threads: int, longest: int) -> Footprint:
    """Load time and peak memory, from a child process of its own. longest: positions that the model has.

    Raises: InputError when the child does not finish.
    """
    prompt = max(1, min(PROBE_PROMPT, longest - PROBE_TOKENS))
    command = target.probe_command(folder, threads, prompt, PROBE_TOKENS)
    child = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    if child.returncode != 0:
        last = child.stderr.strip().splitlines()[-1:] or [f"exit code {child.returncode}"]
        raise InputError(f"{folder} could not be run in a process of its own: {last[0]}")
    found = json.loads(child.stdout.splitlines()[-1])
    return Footprint(
        disk_bytes=deployable_bytes(folder),
        load_s=found["load_s"],
        peak_memory_bytes=int(found["peak_memory_bytes"]),
    )


def measure(
    baseline: Path,
    variant: Path,
    profile: Profile,
    *,
    vocabulary: int,
    longest: int,
    image: tuple[int, int, int] | None = None,
    seed: int = 0,
    budget_s: float = BUDGET_S,
    progress: Progress,
) -> Speed:
    """Paired timings over the profile's grid, and both footprints.

    Args: two exported folders; vocabulary: random token ids are drawn below it; longest: positions that the
    model has, to which the grid's prompts are cut; image: (channels, h, w) that it takes in place of tokens.
    """
    threads = thread_count(profile)
    target = find_target(profile.target)
    arms = {"baseline": target.session(baseline, threads), "variant": target.session(variant, threads)}
    settings = _image_settings(profile) if image else _settings(profile, arms["baseline"].is_decoder, longest)
    timings = []
    for place, (phase, batch, prompt) in enumerate(settings):
        progress.tick("Timing settings", place, len(settings))
        timings.append(_time(arms, phase, batch, prompt, image or vocabulary, seed, budget_s))
    progress.tick("Timing settings", len(settings), len(settings))
    name = arms["variant"].name
    del arms
    return Speed(
        runtime=name,
        threads=threads,
        machine=hwprofiles.machine_summary(),
        timings=tuple(timings),
        baseline=footprint(target, baseline, threads, longest),
        variant=footprint(target, variant, threads, longest),
    )


def _settings(profile: Profile, is_decoder: bool, longest: int) -> list[tuple[Phase, int, int]]:
    """Decode first, since it leads the verdict. Prompts are cut to what the model can read; equal settings are one."""
    wanted = _grid(profile, is_decoder)
    cut = [(phase, batch, min(prompt, longest - (phase == "decode"))) for phase, batch, prompt in wanted]
    return list(dict.fromkeys(cut))


def _image_settings(profile: Profile) -> list[tuple[Phase, int, int]]:
    """The batches of the grid; an image is one unit."""
    batches = sorted({batch for batch, _ in (*profile.grid.prefill, *profile.grid.decode)})
    return [("infer", batch, 1) for batch in batches]


def _grid(profile: Profile, is_decoder: bool) -> list[tuple[Phase, int, int]]:
    if not is_decoder:
        return [("encode", batch, prompt) for batch, prompt in profile.grid.prefill]
    decode: list[tuple[Phase, int, int]] = [("decode", *cell) for cell in profile.grid.decode]
    return decode + [("prefill", *cell) for cell in profile.grid.prefill]


def _time(
    arms: dict[str, Session],
    phase: Phase,
    batch: int,
    prompt: int,
    drawn: int | tuple[int, int, int],
    seed: int,
    budget_s: float,
) -> Timing:
    """One setting. drawn: random tokens below it, or random images of this shape."""
    length, past = (1, prompt) if phase == "decode" else (prompt, 0)
    random = np.random.default_rng(seed)
    ids: NDArray[Any]
    if isinstance(drawn, tuple):
        ids = random.standard_normal((batch, *drawn), dtype=np.float32)
    else:
        ids = random.integers(0, drawn, (batch, length), dtype=np.int64)
    calls = {name: session.call(ids, past) for name, session in arms.items()}
    samples = pair(calls, baseline="baseline", seed=seed, budget_s=budget_s)
    return timing_record(
        samples, "baseline", "variant", phase=phase, batch=batch, prompt=prompt, tokens_per_call=batch * length
    )
