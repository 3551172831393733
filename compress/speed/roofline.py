"""Predicted latency on a machine that need not be here.

Of a kernel that the profile has figures of (`KernelSpeed`, by `compress hardware calibrate`), a layer takes the reading
of its bytes and the products of each further row, one after the other: measured times are straight lines over the rows,
since a kernel decodes what it reads before it multiplies. Without them it is a roofline (Williams et al. 2009), a time
at best: the longer of reading the weights at the profile's bandwidth and of multiplying at its dense peak. Layers
follow one another, each costs a node of the graph where the profile says what one takes, and what small operators
compute is left out. Caches too: on a model that fits one, a measured time may be shorter than the memory's part.
Nothing here is ever put where a measured figure stands.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from compress.formats.float_grid import FloatGrid
from compress.formats.int_grid import IntGrid
from compress.hwprofiles import KernelSpeed, Profile, Runtime
from compress.layer import LayerKind, LayerSpec
from compress.models.attention import Attention
from compress.records import PredictedLatency

BYTES = {"float32": 4, "tf32": 4, "float16": 2, "bfloat16": 2}
SMALL_NODES = 8
"""Of a block, beside products and attention: two norms, two additions, the activation and what it gates, two changes of
shape. So in the graphs of Llama and its like after fusion; each is counted as a node and no more."""


class Spent(NamedTuple):
    """Seconds by what they are spent on: reading weights, multiplying, being a node of a graph."""

    memory: float = 0.0
    arithmetic: float = 0.0
    overhead: float = 0.0

    @classmethod
    def together(cls, pieces: Iterable[Spent]) -> Spent:
        """One after another."""
        return cls(*map(sum, zip(cls(), *pieces, strict=True)))

    @property
    def seconds(self) -> float:
        """Of all three."""
        return sum(self)

    @property
    def bound(self) -> str:
        """What most of it is spent on."""
        return max(self._fields, key=lambda name: float(getattr(self, name)))


@dataclass(frozen=True)
class Rates:
    """Bytes a second, and operations a second by type of number; a multiply-add is two. float_speed: of the kernel of
    layers that stay in float; node_s: seconds of a node; both where the profile has them."""

    bandwidth: float
    peaks: Mapping[str, float]
    float_speed: KernelSpeed | None = None
    node_s: float = 0.0

    def at_best(self, moved: float, operations: float, dtype: str) -> Spent:
        """Time of the memory or of the arithmetic, whichever is longer. A type without a peak of its own is computed
        as float."""
        peak = self.peaks.get(dtype) or self.peaks.get("float16") or self.peaks["float32"]
        memory, arithmetic = moved / self.bandwidth, operations / peak
        return Spent(memory=memory) if memory >= arithmetic else Spent(arithmetic=arithmetic)


@dataclass(frozen=True)
class Part:
    """A layer as it runs: bytes of its weights, multiply-adds per token, type of the arithmetic, share of an expert's
    tokens, figures of its kernel, nodes."""

    weight_bytes: float
    multiply_adds: float
    dtype: str
    share: float = 1.0
    speed: KernelSpeed | None = None
    nodes: int = 1

    def spent(self, rates: Rates, tokens: int) -> Spent:
        """For so many tokens at once."""
        rows = self.share * tokens
        first = min(1.0, rows)  # of an expert, the chance that a token reaches it
        overhead = self.nodes * rates.node_s
        if self.speed is None:
            work = rates.at_best(self.weight_bytes * first, 2 * self.multiply_adds * rows, self.dtype)
            return work._replace(overhead=overhead)
        reading = self.weight_bytes * first / (self.speed.kernel_gb_s.value * 1e9)
        products = 2 * self.multiply_adds * (rows - first) / (self.speed.kernel_gflops.value * 1e9)
        return Spent(reading, products, overhead)


class Setting(NamedTuple):
    """What is predicted, as a profile's grid has it."""

    phase: str
    batch: int
    prompt: int

    @property
    def tokens(self) -> int:
        """At once."""
        return self.batch if self.phase == "decode" else self.batch * self.prompt

    @property
    def context(self) -> float:
        """Keys that a token meets, on average."""
        return self.prompt if self.phase == "decode" else (self.prompt + 1) / 2


@dataclass(frozen=True)
class Arm:
    """A model as it runs: its layers by name, and its attentions."""

    parts: Mapping[str, Part]
    rates: Rates
    blocks: Sequence[Attention]
    float_dtype: str

    def layers(self, setting: Setting) -> dict[str, Spent]:
        """Of each layer in a call."""
        return {name: part.spent(self.rates, setting.tokens) for name, part in self.parts.items()}

    def attention(self, setting: Setting) -> Spent:
        """Of all blocks' scores and sums: keys and values are read once, each token meets `context` of them."""
        cached = setting.batch * setting.prompt
        moved = 2 * cached * BYTES[self.float_dtype] * sum(each.kv_heads * each.size for each in self.blocks)
        operations = 4 * setting.tokens * setting.context * sum(each.heads * each.size for each in self.blocks)
        work = self.rates.at_best(moved, operations, self.float_dtype)
        return work._replace(overhead=len(self.blocks) * self.rates.node_s)

    def others(self) -> Spent:
        """Of the small operators."""
        return Spent(overhead=SMALL_NODES * len(self.blocks) * self.rates.node_s)

    def whole(self, setting: Setting) -> Spent:
        """Of a call."""
        return Spent.together((*self.layers(setting).values(), self.attention(setting), self.others()))


@dataclass(frozen=True)
class Lowered:
    """What a target said of its layers, by name: bytes of the quantized ones in the artifact; those whose kernel rounds
    inputs to 8 bits by itself; the figures that the profile has of their kernels; those that are decoded to float, and
    no faster than it."""

    stored: Mapping[str, int]
    rounded: Collection[str] = ()
    speeds: Mapping[str, KernelSpeed] = field(default_factory=dict)
    decoded: Collection[str] = ()


def rates(profile: Profile, threads: int, runtime: Runtime | None = None, float_dtype: str = "float32") -> Rates:
    """Of a profile; threads: cores that a CPU's peak is multiplied with; runtime: the profile's that is to run."""
    per_core, whole = profile.peak.dense_gflops_per_core, profile.peak.dense_gflops
    peaks = {str(name): figure.value * 1e9 * threads for name, figure in per_core.items()}
    peaks |= {str(name): figure.value * 1e9 for name, figure in whole.items()}
    node = runtime.node_us.value / 1e6 if runtime and runtime.node_us else 0.0
    speed = runtime.support("float", 8 * BYTES[float_dtype]).speed() if runtime else None
    return Rates(profile.memory.bandwidth_gb_s.value * 1e9, peaks, speed, node)


def arm(
    specs: Iterable[LayerSpec],
    lowered: Lowered | None,
    config: Any,
    blocks: Sequence[Attention],
    machine: Rates,
    float_dtype: str,
) -> Arm:
    """The variant, or without `lowered` the uncompressed baseline. config: of the text model; blocks: its attentions;
    float_dtype: what the runtime computes float layers in."""
    if lowered is None:
        specs = [replace(spec, format=None, act=None) for spec in specs]
    parts = {spec.name: _part(spec, lowered or Lowered({}), machine, float_dtype, config) for spec in specs}
    return Arm(parts, machine, blocks, float_dtype)


def predict(variant: Arm, baseline: Arm, profile: Profile, *, decodes: bool) -> tuple[PredictedLatency, ...]:
    """Latency of both over the profile's grid. decodes: whether it is a decoder, whose prefill and decode are apart."""
    grid = [Setting("prefill" if decodes else "encode", *each) for each in profile.grid.prefill]
    grid += [Setting("decode", *each) for each in profile.grid.decode] if decodes else []
    found = []
    for setting in grid:
        ours, plain = variant.whole(setting), baseline.whole(setting)
        told = {"variant_s": ours.seconds, "baseline_s": plain.seconds, "bound": ours.bound}
        found.append(PredictedLatency.model_validate({**setting._asdict(), **told}))
    return tuple(found)


def _part(spec: LayerSpec, lowered: Lowered, machine: Rates, float_dtype: str, config: Any) -> Part:
    weights = spec.shape[0] * spec.shape[1]
    if spec.kind is LayerKind.EMBEDDING and len(spec.users) == 1:  # a row per token is looked up, no more
        return Part(0.0, 0.0, float_dtype)
    plain, expert = spec.format is None or spec.name in lowered.decoded, spec.kind is LayerKind.EXPERT
    moved = weights * BYTES[float_dtype] if plain else lowered.stored.get(spec.name, 0)
    dtype = "int8" if spec.name in lowered.rounded else _arithmetic(spec, float_dtype)
    speed = machine.float_speed if plain else lowered.speeds.get(spec.name)
    return Part(moved, weights, dtype, _share(spec, config), speed, nodes=0 if expert else 1)


def _share(spec: LayerSpec, config: Any) -> float:
    """Of all tokens, those that an expert gets."""
    if spec.kind is not LayerKind.EXPERT:
        return 1.0
    count = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None) or 1
    return min(1.0, int(getattr(config, "num_experts_per_tok", None) or 1) / int(count))


def _arithmetic(spec: LayerSpec, float_dtype: str) -> str:
    """The type that the kernel multiplies in: that of rounded inputs, else float, into which codes are decoded."""
    form = spec.act.format if spec.act is not None else None
    if isinstance(form, IntGrid):
        return f"int{form.bits}"
    if isinstance(form, FloatGrid):
        return "float8" if form.bits > 4 else "float4"
    return float_dtype
