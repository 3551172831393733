"""Quality and speed of many artifacts beside one baseline: the same windows in step, the same shuffled rounds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path

import torch

from compress.errors import CompressError, Interrupted
from compress.export import find as find_target
from compress.hwprofiles import Profile
from compress.inputs.datasets import Samples
from compress.inputs.windows import Windows
from compress.models.model import Model, Task
from compress.progress import Named, Progress
from compress.quality.continuations import Amount, Known, plan_prompts
from compress.quality.evaluate import Evaluation, evaluate, runners_of, stream_logits
from compress.quality.token_evaluate import TokenJudge, with_continuations
from compress.records import Interval, Quality, Timing
from compress.records.speed import leading
from compress.speed.measure import loads_of, sample_setting, setting_record, settings_of, thread_count
from compress.speed.paired_samples import PairedSamples
from compress.stats.intervals import noise_floor, paired_difference, speedup
from compress.sweep.front import Axis
from compress.sweep.records import Difference
from compress.target import Session

BASELINE = "baseline"
MEMORY_FACTOR = 3
"""A loaded session takes up to so many times its files: packed weights beside those that were read, and buffers."""


@dataclass(frozen=True)
class Artifact:
    """One variant: its exported folder, and the compressed model in its store."""

    folder: Path
    model: Model


@dataclass(frozen=True)
class Stand:
    """What every variant is judged with: the original model, its exported folder, the machine, the seed."""

    source: Model
    baseline: Path
    profile: Profile
    seed: int

    def session(self, folder: Path) -> Session:
        """An exported folder in the runtime."""
        return find_target(self.profile.target).session(folder, thread_count(self.profile))


@dataclass
class Judged:
    """Evaluations by variant, why others have none, and how far variants are apart."""

    evaluations: dict[str, Evaluation] = field(default_factory=dict)
    failures: dict[str, CompressError] = field(default_factory=dict)
    differences: list[Difference] = field(default_factory=list)


@dataclass
class Timed:
    """Timings by variant, and how far variants are apart at the setting that leads the report."""

    runtime: str = ""
    timings: dict[str, tuple[Timing, ...]] = field(default_factory=dict)
    differences: list[Difference] = field(default_factory=list)


def together(sizes: Mapping[str, int], room: int | None) -> list[list[str]]:
    """Variants in groups that memory holds at once, in their order. sizes: bytes of each; room: None: not known."""
    groups: list[list[str]] = []
    used = 0
    for name, size in sizes.items():
        needed = MEMORY_FACTOR * size
        if not groups or (room is not None and used + needed > room):
            groups.append([])
            used = 0
        groups[-1].append(name)
        used += needed
    return groups


def judge(
    stand: Stand, artifacts: Mapping[str, Artifact], windows: Samples, amount: Amount, progress: Progress
) -> Judged:
    """Every artifact beside the baseline. Of a language model each window goes once through the baseline and the
    original, then through all artifacts; of other models the baseline runs again for each. A variant that puts out NaN
    fails alone. Raises: Interrupted."""
    if isinstance(windows, Windows) and stand.source.task is Task.CAUSAL_LM:
        return _judge_tokens(stand, artifacts, windows, amount, progress)
    found = Judged()
    for name, artifact in artifacts.items():
        baseline, session = stand.session(stand.baseline), stand.session(artifact.folder)
        try:
            named = Named(progress, name)
            found.evaluations[name] = evaluate(baseline, session, stand.source, artifact.model, windows, named)
        except Interrupted:
            raise
        except CompressError as error:
            found.failures[name] = error
    return found


def _judge_tokens(
    stand: Stand, artifacts: Mapping[str, Artifact], windows: Windows, amount: Amount, progress: Progress
) -> Judged:
    found, rows = Judged(), windows.rows()
    baseline = stand.session(stand.baseline)
    progress.begin("Loading the models")
    sessions = {name: stand.session(artifact.folder) for name, artifact in artifacts.items()}
    judges = {name: TokenJudge(windows) for name in artifacts}
    order = next(iter(judges.values())).order
    ordered = [rows[place] for place in order]
    outputs = {
        name: stream_logits(artifact.model, ordered, progress=progress, name=name)
        for name, artifact in artifacts.items()
    }
    original = stream_logits(stand.source, ordered, progress=progress, name="the original")
    for done, (place, reference) in enumerate(zip(order, original, strict=True)):
        progress.tick("Evaluating windows", done, len(rows))
        one = rows[place].numpy()[None]
        first = torch.tensor(baseline.logits(one)[0])  # a copy: a runtime may hand out memory that it writes again
        for name in [name for name in judges if name not in found.failures]:
            try:
                output = next(outputs[name])
                judges[name].see(place, first, torch.tensor(sessions[name].logits(one)[0]), reference, output)
            except Interrupted:
                raise
            except CompressError as error:
                found.failures[name] = error
    progress.tick("Evaluating windows", len(rows), len(rows))
    target, plan = find_target(stand.profile.target), plan_prompts(stand.source, rows, amount)
    known: Known = {}
    for name in [name for name in judges if name not in found.failures]:
        session = sessions[name]
        judged = judges[name].qualities(session.name, stand.source.tokenizer())
        runners = runners_of(target, (baseline, stand.baseline), (session, artifacts[name].folder))
        continued = with_continuations(judged[:2], runners, plan, Named(progress, name), known)
        found.evaluations[name] = Evaluation(*continued, judged[2])
    found.differences = _losses({name: judges[name] for name in found.evaluations})
    return found


def _losses(judges: Mapping[str, TokenJudge]) -> list[Difference]:
    """Divergence from the original, pair by pair on the same windows."""
    sums = {name: [score.sums for score in each.scores] for name, each in judges.items()}
    found = []
    for first, second in combinations(sums, 2):
        one, other = ([each.kl or 0.0 for each in sums[name]] for name in (first, second))
        value, interval = paired_difference(one, other, [each.tokens for each in sums[first]])
        if interval is not None and all(math.isfinite(end) for end in (interval.low, interval.high)):
            found += _both_ways("loss", first, second, value, interval)
    return found


def time_together(
    stand: Stand, folders: Mapping[str, Path], budget_s: float, progress: Progress, image: tuple[int, ...] | None
) -> Timed:
    """Every setting of the profile's grid: the baseline and all variants in the same shuffled rounds.

    budget_s: seconds of a setting with one variant; with more it grows, so that each gets as much.
    """
    loads = loads_of({BASELINE: stand.baseline, **folders}, stand.profile, stand.seed)
    source, is_decoder = stand.source, loads.sessions[BASELINE].is_decoder
    settings = settings_of(stand.profile, is_decoder, source.longest, image is not None)
    found, timings = Timed(next(reversed(loads.sessions.values())).name), dict[str, list[Timing]]()
    for place, setting in enumerate(settings):
        progress.tick("Timing settings", place, len(settings))
        budget = budget_s * (1 + len(folders)) / 2
        samples = sample_setting(
            loads,
            setting,
            image or source.vocabulary,
            seed=stand.seed,
            budget_s=budget,
            between=progress.check,
        )
        for name in folders:
            timings.setdefault(name, []).append(setting_record(samples, name, setting))
        if setting == leading(settings):
            found.differences = _latencies(samples, list(folders))
    progress.tick("Timing settings", len(settings), len(settings))
    found.timings = {name: tuple(each) for name, each in timings.items()}
    return found


def _latencies(samples: PairedSamples, names: Sequence[str]) -> list[Difference]:
    """ln(time of the first / time of the second), round by round, widened by what the baseline differs from itself."""
    floor = math.log(noise_floor(samples.control_interval()))
    found = []
    for first, second in combinations(names, 2):
        series = samples.log_ratios(second) - samples.log_ratios(first)
        ratio, interval = speedup(series, loads=samples.loads_of())
        wide = Interval(low=math.log(interval.low) - floor, high=math.log(interval.high) + floor, level=interval.level)
        found += _both_ways("latency", first, second, math.log(ratio), wide)
    return found


def _both_ways(axis: Axis, first: str, second: str, value: float, interval: Interval) -> list[Difference]:
    turned = Interval(low=-interval.high, high=-interval.low, level=interval.level)
    return [
        Difference(axis=axis, first=first, second=second, value=value, interval=interval),
        Difference(axis=axis, first=second, second=first, value=-value, interval=turned),
    ]


def loss_of(quality: Quality) -> tuple[str, float, Interval | None] | None:
    """What the axis of loss is made of, from 0 up: the divergence from the original of a language model, percentage
    points of accuracy lost by a classifier, one less the cosine of what else is compared."""
    for name in ("accuracy_change", "kl", "cosine"):
        metric = quality.metrics.get(name)
        if metric is None:
            continue
        if metric.better == "lower":
            return f"{name}, {metric.unit}", metric.value, metric.interval
        top = 1.0 if name == "cosine" else 0.0
        turned = metric.interval and Interval(
            low=top - metric.interval.high, high=top - metric.interval.low, level=metric.interval.level
        )
        label = "1 - cosine" if name == "cosine" else f"accuracy lost, {metric.unit}"
        return label, top - metric.value, turned
    return None
