"""Speed and footprint of a baseline and a variant in the same runtime, threads and placement (design §7)."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from compress import hwprofiles
from compress.defaults import BUDGET_S
from compress.errors import UnsupportedError, UsageError
from compress.export import find as find_target
from compress.hwprofiles import Profile
from compress.progress import Progress
from compress.records import Speed, Timing
from compress.records.speed import ENERGY, OPERATORS, Setting
from compress.speed import disturbance, energy, operators
from compress.speed.footprint import footprint
from compress.speed.loads import Loads
from compress.speed.paired_samples import PairedSamples
from compress.speed.timing import Clock, pair
from compress.speed.timing_process import Timed, TimingRequest, time_in_process
from compress.speed.timing_record import LEAST_PROCESSES, best_against_best, over_processes, timing_record
from compress.target import Session

LONGEST_S = 120.0
"""Seconds that a process may take beside its timing: imports and loading, on a busy machine."""
SLOW_S = 900.0
"""Seconds that a setting may take beyond its budget: ten rounds are always made, however long its calls take."""


def thread_count(profile: Profile) -> int:
    """Threads for one operator: the profile's, else every physical core this process may use."""
    return (profile.cpu and profile.cpu.threads) or int(hwprofiles.machine()["threads"])


def check_processes(processes: int) -> None:
    """Raises: UsageError for a number of processes whose differences say nothing."""
    if processes != 1 and processes < LEAST_PROCESSES:
        raise UsageError(
            f"Timing in {processes} processes: give 1, or at least {LEAST_PROCESSES}, so that how much they differ is "
            "known."
        )


def measure(
    baseline: Path,
    variant: Path,
    profile: Profile,
    *,
    vocabulary: int,
    longest: int,
    image: tuple[int, ...] | None = None,
    seed: int = 0,
    budget_s: float = BUDGET_S,
    processes: int = 1,
    progress: Progress,
) -> Speed:
    """Paired timings over the profile's grid, and both footprints.

    Args: two exported folders; vocabulary: random token ids are drawn below it; longest: positions that the
    model has, to which the grid's prompts are cut; image: the shape of what it takes in place of tokens;
    processes: 1, or at least 3 fresh ones that each time everything, which takes so many times as long.
    Raises: UsageError for another number of processes; InputError where a process does not finish.
    """
    check_processes(processes)
    target, threads = find_target(profile.target), thread_count(profile)
    request = TimingRequest(
        baseline=baseline,
        variant=variant,
        profile=profile,
        vocabulary=vocabulary,
        longest=longest,
        image=image,
        seed=seed,
        budget_s=budget_s,
    )
    progress.begin("Loading the baseline and the artifact, to time them")
    timings, name = _time_here(request, progress) if processes == 1 else _time_apart(request, processes, progress)
    progress.begin("Measuring memory and loading")
    speed = Speed(
        runtime=name,
        threads=threads,
        machine=hwprofiles.machine_summary(),
        timings=timings,
        best=best_against_best(timings),
        processes=processes,
        baseline=footprint(target, baseline, threads, longest),
        variant=footprint(target, variant, threads, longest),
    )
    progress.begin("Measuring energy and single operators")
    return with_operators(with_energy(speed, request, energy.find_meter), request)


def with_energy(speed: Speed, request: TimingRequest, find: Callable[[str], energy.Meter]) -> Speed:
    """The speed with the energy of the setting that leads the verdict, or with the reason why it is not measured.
    find: gives the meter of "cpu" or "cuda"."""
    target, profile, lead = find_target(request.profile.target), request.profile, speed.lead
    provider = profile.runtimes[target.RUNTIME].provider if target.RUNTIME in profile.runtimes else ""
    try:
        is_gpu = getattr(target, "ON_GPU", False) or provider.startswith(("CUDA", "Tensorrt", "NvTensorRT"))
        meter = find("cuda" if is_gpu else "cpu")
        found = energy.measure_energy(
            _calls(_loads(request).sessions, lead.setting, request.image or request.vocabulary, request.seed),
            meter,
            setting=lead.name,
            unit="sample" if request.image is not None else "token",
            units_per_call=tokens_per_call(lead.setting),
            seed=request.seed,
            budget_s=request.budget_s,
        )
    except UnsupportedError as error:
        return speed.model_copy(update={"unavailable": {**speed.unavailable, ENERGY: str(error)}})
    return speed.model_copy(update={"energy": found})


def with_operators(speed: Speed, request: TimingRequest) -> Speed:
    """The speed with what operators take at the setting that leads the verdict, or with the reason why it is not
    known."""
    target, threads = find_target(request.profile.target), thread_count(request.profile)
    arms, lead = {"baseline": request.baseline, "variant": request.variant}, speed.lead
    drawn = request.image or request.vocabulary

    def bind(session: Session) -> Callable[[], None]:
        return _calls({lead.name: session}, lead.setting, drawn, request.seed)[lead.name]

    try:
        found = operators.operator_times(target, arms, threads, lead.name, bind)
    except UnsupportedError as error:
        return speed.model_copy(update={"unavailable": {**speed.unavailable, OPERATORS: str(error)}})
    return speed.model_copy(update={"operators": found})


def time_request(request: TimingRequest) -> Timed:
    """What a process of its own times (compress.speed.timing_process)."""
    timings, name = _time_here(request, Progress(quiet=True))
    return Timed(runtime=name, timings=timings)


def time_sessions(
    loads: Loads,
    settings: Sequence[Setting],
    drawn: int | tuple[int, ...],
    *,
    seed: int,
    budget_s: float,
    progress: Progress,
    clock: Clock = time.perf_counter,
) -> tuple[Timing, ...]:
    """Every setting (phase, batch, prompt) of the arms "baseline" and "variant", loaded anew meanwhile. drawn:
    random tokens below it, or random images of this shape."""
    timings = []
    for place, setting in enumerate(settings):
        progress.tick("Timing settings", place, len(settings))
        samples = sample_setting(
            loads, setting, drawn, seed=seed, budget_s=budget_s, clock=clock, between=progress.check
        )
        timings.append(setting_record(samples, "variant", setting))
    progress.tick("Timing settings", len(settings), len(settings))
    return tuple(timings)


def settings_of(profile: Profile, is_decoder: bool, longest: int, is_image: bool = False) -> list[Setting]:
    """Decode first, since it leads the verdict. Prompts are cut to what the model can read; equal settings are one."""
    if is_image:  # the batches of the grid; an image is one unit
        batches = sorted({batch for batch, _ in (*profile.grid.prefill, *profile.grid.decode)})
        return [("infer", batch, 1) for batch in batches]
    wanted = _grid(profile, is_decoder)
    cut = [(phase, batch, min(prompt, longest - (phase == "decode"))) for phase, batch, prompt in wanted]
    return list(dict.fromkeys(cut))


def _time_here(request: TimingRequest, progress: Progress) -> tuple[tuple[Timing, ...], str]:
    """All settings in this process, and the runtime's name. The sessions end with it: they take memory."""
    loads = _loads(request)
    is_decoder, name = loads.sessions["baseline"].is_decoder, loads.sessions["variant"].name
    settings = settings_of(request.profile, is_decoder, request.longest, request.image is not None)
    drawn = request.image or request.vocabulary
    found = time_sessions(loads, settings, drawn, seed=request.seed, budget_s=request.budget_s, progress=progress)
    return found, name


def _loads(request: TimingRequest) -> Loads:
    return loads_of({"baseline": request.baseline, "variant": request.variant}, request.profile, request.seed)


def loads_of(folders: Mapping[str, Path], profile: Profile, seed: int) -> Loads:
    """Exported folders by arm, loaded in the profile's runtime."""
    target, threads = find_target(profile.target), thread_count(profile)
    return Loads({name: partial(target.session, folder, threads) for name, folder in folders.items()}, seed)


def _time_apart(request: TimingRequest, processes: int, progress: Progress) -> tuple[tuple[Timing, ...], str]:
    """All settings in each of several processes, one after another, each with a seed of its own."""
    grid = request.profile.grid
    most_s = LONGEST_S + (3 * request.budget_s + SLOW_S) * (len(grid.prefill) + len(grid.decode))
    timed_s = request.budget_s * (len(grid.prefill) + len(grid.decode))
    progress.note(
        f"Each of {processes} processes times for up to about {timed_s:.0f} s beside loading, and tells nothing until "
        "it ends."
    )
    found = []
    for place in range(processes):
        progress.tick("Timing processes", place, processes)
        found.append(time_in_process(request.model_copy(update={"seed": request.seed + place}), most_s))
    progress.tick("Timing processes", processes, processes)
    by_setting = zip(*(each.timings for each in found), strict=True)
    return tuple(over_processes(each) for each in by_setting), found[0].runtime


def _grid(profile: Profile, is_decoder: bool) -> list[Setting]:
    if not is_decoder:
        return [("encode", batch, prompt) for batch, prompt in profile.grid.prefill]
    decode: list[Setting] = [("decode", *cell) for cell in profile.grid.decode]
    return decode + [("prefill", *cell) for cell in profile.grid.prefill]


def sample_setting(
    loads: Loads,
    setting: Setting,
    drawn: int | tuple[int, ...],
    *,
    seed: int,
    budget_s: float,
    clock: Clock = time.perf_counter,
    between: Callable[[], None] | None = None,
) -> PairedSamples:
    """One setting (phase, batch, prompt) of "baseline" and any other arms, in the same rounds and loads. drawn: see
    `time_sessions`; between: called before every round, may raise."""
    arms, reload = loads.arms(lambda sessions: _calls(sessions, setting, drawn, seed))
    watch = disturbance.watch()
    return pair(
        arms,
        baseline="baseline",
        seed=seed,
        clock=clock,
        budget_s=budget_s,
        watch=watch,
        reload=reload,
        between=between,
    )


def _calls(
    arms: Mapping[str, Session], setting: Setting, drawn: int | tuple[int, ...], seed: int
) -> dict[str, Callable[[], None]]:
    """One call of each arm, all with the same random tokens or images."""
    phase, batch, prompt = setting
    length, past = (1, prompt) if phase == "decode" else (prompt, 0)
    random = np.random.default_rng(seed)
    ids: NDArray[Any]
    interface = getattr(next(iter(arms.values())), "interface", None)
    if isinstance(drawn, tuple) and interface is not None:  # rows of a graph that was given as ONNX
        ids = interface.drawn(batch, interface.length_of(drawn), random)
    elif isinstance(drawn, tuple):
        ids = random.standard_normal((batch, *drawn), dtype=np.float32)
    else:
        ids = random.integers(0, drawn, (batch, length), dtype=np.int64)
    return {name: session.call(ids, past) for name, session in arms.items()}


def setting_record(samples: PairedSamples, variant: str, setting: Setting) -> Timing:
    """What `sample_setting` found of an arm against "baseline"."""
    phase, batch, prompt = setting
    count = tokens_per_call(setting)
    return timing_record(samples, "baseline", variant, phase=phase, batch=batch, prompt=prompt, tokens_per_call=count)


def tokens_per_call(setting: Setting) -> int:
    """Of the whole batch; an image is one."""
    phase, batch, prompt = setting
    return batch if phase == "decode" else batch * prompt
