"""The records of a model's speed and footprint: paired latencies, percentiles, rounds that something disturbed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import Field

from compress.records.base import Interval, Record

SpeedVerdict = Literal["faster", "slower", "same", "inconclusive"]
FEW_ROUNDS = 20
"""With fewer the interval covers less than it says: 83 % at 10 rounds of correlation 0.6
(benchmarks/timing/simulate.py)."""
MANY_DISTURBED = 0.25
"""A share of disturbed rounds from which on a report says so beside the figure."""
UNSETTLED = "had not settled"
"""Is in the warning of an arm whose warm-up did not come to rest."""
LONGER = "compress profile OUT --budget 60 --processes 3"
"""The command that settles a timing which is not; OUT is the artifact's folder."""
Phase = Literal["prefill", "decode", "encode", "infer"]
SpanName = Literal["before", "compute", "after"]
EnergyVerdict = Literal["less", "more", "same", "inconclusive"]
Setting = tuple[Phase, int, int]
"""Phase, batch, prompt."""
END_TO_END, ENERGY, OPERATORS = "end to end", "energy", "operators"
"""Names of what may be `unavailable`."""


def leading(settings: Sequence[Setting]) -> Setting:
    """What a report leads with: decoding with the smallest batch, else the first (of images the smallest batch)."""
    decode = [each for each in settings if each[0] == "decode"]
    return min(decode, key=lambda each: each[1], default=settings[0])


class Percentiles(Record):
    """Seconds within which a share of an arm's calls ended; None where the calls were too few to say."""

    calls: int
    seconds: dict[str, float | None] = Field(description="p50, p90, p95 and p99")
    needs: dict[str, int] = Field(description="calls that each of them takes")

    def text(self, name: str) -> str:
        """`12.3 ms`, or `needs n >= 473`."""
        found = self.seconds[name]
        return f"needs n >= {self.needs[name]}" if found is None else f"{1000 * found:.4g} ms"


class ArmTiming(Record):
    """What one arm took at one setting, beside its median."""

    first_call_s: float = Field(description="the first call at this setting, before any warm-up")
    first_token_s: float | None = Field(
        default=None, description="median seconds to the first token: the prompt read, one sequence, no queue"
    )
    per_token_s: float | None = Field(
        default=None, description="median seconds per output token of each sequence, the first token apart"
    )
    percentiles: Percentiles | None = Field(default=None, description="none where calls are too short to time singly")


class EveryRound(Record):
    """The estimate with the disturbed rounds left in, and how many were disturbed by what."""

    disturbed: int
    causes: dict[str, int] = Field(description="rounds per cause; a round may have several")
    left_out: bool = Field(description="false where too many were disturbed to go without them")
    rounds: int
    speedup: float
    interval: Interval
    control: Interval


class Timing(Record):
    """Paired latency of baseline and variant at one setting; every figure here was measured."""

    phase: Phase = Field(description="infer: images or other samples, of which one is a token")
    batch: int
    prompt: int
    rounds: int = Field(description="that the estimate is made of")
    baseline_s: float = Field(description="median seconds per call")
    variant_s: float = Field(description="median seconds per call")
    baseline_tokens_per_s: float
    variant_tokens_per_s: float
    speedup: float = Field(description="trimmed mean of paired log ratios, as a ratio")
    interval: Interval
    control: Interval = Field(description="baseline against itself: the noise floor")
    verdict: SpeedVerdict
    baseline_arm: ArmTiming | None = None
    variant_arm: ArmTiming | None = None
    every_round: EveryRound | None = Field(default=None, description="none where no counter could be read")
    process_speedups: tuple[float, ...] = Field(default=(), description="of each process, where there were several")
    loads: int = Field(default=1, description="times that all arms were loaded; the interval takes loads for clusters")
    load_spread: float | None = Field(
        default=None,
        description="standard deviation of ln(speed-up) from one load to the next, beyond what differs within one",
    )
    warnings: tuple[str, ...] = ()

    @property
    def setting(self) -> Setting:
        """What was timed."""
        return self.phase, self.batch, self.prompt

    @property
    def name(self) -> str:
        """`decode batch 1 prompt 128`, `infer batch 4`."""
        if self.phase == "infer":
            return f"{self.phase} batch {self.batch}"
        return f"{self.phase} batch {self.batch} prompt {self.prompt}"

    @property
    def provisional(self) -> str:
        """`13 rounds, 5 disturbed` where the estimate rests on few rounds or many were disturbed; else empty."""
        disturbed, made = (self.every_round.disturbed, self.every_round.rounds) if self.every_round else (0, 0)
        if self.rounds >= FEW_ROUNDS and disturbed <= MANY_DISTURBED * made:
            return ""
        return f"{self.rounds} rounds" + (f", {disturbed} disturbed" if disturbed else "")

    @property
    def is_open(self) -> bool:
        """Whether longer timing may change what is said: no verdict, few or disturbed rounds, arms still warming up."""
        unsettled = any(UNSETTLED in text for text in self.warnings)
        return self.verdict == "inconclusive" or bool(self.provisional) or unsettled


class BestAgainstBest(Record):
    """Throughput of each arm at its own best batch, for one phase and prompt.

    The best batch may move, for instance when a smaller model leaves room for a larger one.
    """

    phase: Phase
    prompt: int
    baseline_batch: int
    variant_batch: int
    baseline_tokens_per_s: float
    variant_tokens_per_s: float
    ratio: float = Field(description="the variant's best over the baseline's best")
    interval: Interval | None = Field(
        default=None, description="where both are best at one setting; others were not timed in the same rounds"
    )
    same_setting: dict[int, float] = Field(description="batch to the paired speed-up at that batch")


class Footprint(Record):
    """What one arm takes: bytes of the deployable files, seconds to load, peak resident memory of a run."""

    disk_bytes: int
    load_s: float | None = None
    first_call_s: float | None = Field(default=None, description="the first call after loading, in a fresh process")
    peak_memory_bytes: int | None = None
    cache_tokens: int | None = Field(default=None, description="tokens of one sequence, of which cache_bytes are")
    cache_bytes: int | None = Field(default=None, description="held of its keys and values, with all that goes along")


class Span(Record):
    """Median seconds per request of one part of it."""

    name: SpanName
    what: str
    baseline_s: float
    variant_s: float


class EndToEnd(Record):
    """A whole request, one at a time: a text or an image file in, a text or a result out; every figure was measured."""

    what: str = Field(description="one request in words")
    rounds: int
    spans: tuple[Span, ...]
    baseline_s: float = Field(description="median seconds per request")
    variant_s: float = Field(description="median seconds per request")
    speedup: float = Field(description="of the whole request: trimmed mean of paired log ratios, as a ratio")
    interval: Interval
    control: Interval = Field(description="baseline against itself: the noise floor")
    verdict: SpeedVerdict
    compute_speedup: float = Field(description="of the model alone, in the same requests")
    compute_interval: Interval
    ceiling: float = Field(description="the whole request's speed-up if the model took no time (Amdahl)")
    ceiling_interval: Interval
    warnings: tuple[str, ...] = ()


class OperatorTime(Record):
    """All operators of one kind in a call; the runtime's own name of the kind."""

    kind: str
    baseline_nodes: int = Field(description="that run in a call")
    variant_nodes: int
    baseline_s: float = Field(description="median seconds per call, 0 where there is none")
    variant_s: float


class OperatorTimes(Record):
    """What each kind of operator takes of a call, counted by the runtime in sessions of their own. What counting costs
    lies between the operators and is left out, and so is what the runtime itself does there."""

    profiler: str
    setting: str
    calls: int
    baseline_s: float = Field(description="median seconds per call of all operators together")
    variant_s: float
    operators: tuple[OperatorTime, ...]


class Energy(Record):
    """Joules of both arms at one setting, by the machine's own counters, over whole blocks in paired rounds."""

    counter: str = Field(description="what was read, and of what")
    setting: str
    unit: str = Field(description="token or image")
    rounds: int
    block_s: float = Field(description="least seconds of a block")
    baseline_j: float = Field(description="median joules per unit")
    variant_j: float = Field(description="median joules per unit")
    saving: float = Field(description="baseline / variant: trimmed mean of paired log ratios, as a ratio")
    interval: Interval
    control: Interval = Field(description="baseline against itself: the noise floor")
    verdict: EnergyVerdict = Field(description="less: the variant takes less")


class Speed(Record):
    """All timings of a run, against `baseline` of the same runtime, threads and graph optimizations."""

    runtime: str
    threads: int
    machine: dict[str, str]
    timings: tuple[Timing, ...]
    best: tuple[BestAgainstBest, ...] = ()
    processes: int = Field(default=1, description="fresh processes that the timing was repeated in")
    baseline: Footprint
    variant: Footprint
    end_to_end: EndToEnd | None = None
    energy: Energy | None = None
    operators: OperatorTimes | None = None
    unavailable: dict[str, str] = Field(
        default_factory=dict, description="what was to be measured and could not be, and why"
    )

    @property
    def lead(self) -> Timing:
        """Of the setting that leads."""
        setting = leading([each.setting for each in self.timings])
        return next(each for each in self.timings if each.setting == setting)

    def __str__(self) -> str:
        from compress.report.parts import speed_text

        return speed_text(self)
