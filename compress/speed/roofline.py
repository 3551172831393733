"""Predicted latency on a machine that need not be here: the time that its memory and its arithmetic take at best.

A roofline (Williams et al. 2009): each layer takes the longer of reading its weights at the profile's bandwidth and
multiplying at the profile's dense peak; layers follow one another. Overheads, small operators and caches are left out,
so a measured time is longer on a large model, and on one that fits a cache it may be shorter than the memory's part.
Nothing here is ever put where a measured figure stands.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from compress.formats.float_grid import FloatGrid
from compress.formats.int_grid import IntGrid
from compress.hwprofiles import Profile
from compress.layer import LayerKind, LayerSpec
from compress.models.attention import attentions
from compress.records import PredictedLatency

BYTES = {"float32": 4, "tf32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True)
class Rates:
    """Bytes a second, and operations a second by type of number; a multiply-add is two."""

    bandwidth: float
    peaks: Mapping[str, float]

    def seconds(self, moved: float, operations: float, dtype: str) -> tuple[float, float]:
        """Time of the memory and of the arithmetic. A type without a peak of its own is computed as float."""
        peak = self.peaks.get(dtype) or self.peaks.get("float16") or self.peaks["float32"]
        return moved / self.bandwidth, operations / peak


@dataclass(frozen=True)
class Part:
    """A layer as it runs: bytes of its weights, multiply-adds per token, type of the arithmetic, share of an expert's
    tokens."""

    weight_bytes: float
    multiply_adds: float
    dtype: str
    share: float = 1.0

    def seconds(self, rates: Rates, tokens: int) -> tuple[float, float]:
        """Time of the memory and of the arithmetic for so many tokens at once."""
        moved = self.weight_bytes * min(1.0, self.share * tokens)
        return rates.seconds(moved, 2 * self.multiply_adds * self.share * tokens, self.dtype)


def rates(profile: Profile, threads: int) -> Rates:
    """Of a profile; threads: cores that a CPU's peak is multiplied with."""
    per_core, whole = profile.peak.dense_gflops_per_core, profile.peak.dense_gflops
    peaks = {name: figure.value * 1e9 * threads for name, figure in per_core.items()}
    peaks |= {name: figure.value * 1e9 for name, figure in whole.items()}
    return Rates(profile.memory.bandwidth_gb_s.value * 1e9, {str(name): value for name, value in peaks.items()})


def predict(
    specs: Iterable[LayerSpec],
    stored: Mapping[str, int],
    config: Any,
    profile: Profile,
    *,
    float_dtype: str,
    threads: int,
    decodes: bool,
    rounded: Collection[str] = (),
) -> tuple[PredictedLatency, ...]:
    """Latency of the variant and of the uncompressed baseline over the profile's grid.

    Args: stored: bytes of each quantized layer in the artifact; config: of the text model; float_dtype: what the
    runtime computes float layers in; decodes: whether it is a decoder, whose prefill and decode are apart; rounded:
    layers whose kernel rounds inputs to 8 bits by itself.
    """
    specs, found = list(specs), []
    machine, size = rates(profile, threads), BYTES[float_dtype]
    variant = [_part(spec, stored.get(spec.name, 0), float_dtype, config, spec.name in rounded) for spec in specs]
    baseline = [_part(_plain(spec), 0, float_dtype, config) for spec in specs]
    grid = [("prefill" if decodes else "encode", *each) for each in profile.grid.prefill]
    grid += [("decode", *each) for each in profile.grid.decode] if decodes else []
    for phase, batch, prompt in grid:
        tokens, context = (batch, prompt) if phase == "decode" else (batch * prompt, (prompt + 1) / 2)
        attention = _attention(machine, config, tokens, context, batch * prompt, size, float_dtype)
        times = [_total(parts, machine, tokens, attention) for parts in (variant, baseline)]
        found.append(
            PredictedLatency(
                phase=phase,  # type: ignore[arg-type]
                batch=batch,
                prompt=prompt,
                variant_s=times[0][0],
                baseline_s=times[1][0],
                bound=times[0][1],  # type: ignore[arg-type]
            )
        )
    return tuple(found)


def _plain(spec: LayerSpec) -> LayerSpec:
    return replace(spec, format=None, act=None)


def _part(spec: LayerSpec, stored: int, float_dtype: str, config: Any, rounded: bool = False) -> Part:
    rows, columns = spec.shape
    weights = rows * columns
    moved = stored if spec.format is not None else weights * BYTES[float_dtype]
    if spec.kind is LayerKind.EMBEDDING and len(spec.users) == 1:  # a row per token is looked up, no more
        return Part(0.0, 0.0, float_dtype)
    dtype = "int8" if rounded else _arithmetic(spec, float_dtype)
    return Part(moved, weights, dtype, _share(spec, config))


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


def _attention(
    machine: Rates, config: Any, tokens: int, context: float, cached: int, size: int, dtype: str
) -> tuple[float, float]:
    """Time of all layers' scores and sums: `cached` keys and values are read, each token meets `context` of them."""
    blocks = attentions(config)
    moved = 2 * cached * size * sum(each.kv_heads * each.size for each in blocks)
    return machine.seconds(moved, 4 * tokens * context * sum(each.heads * each.size for each in blocks), dtype)


def _total(parts: Sequence[Part], machine: Rates, tokens: int, attention: tuple[float, float]) -> tuple[float, str]:
    """Seconds, and what most of them are spent on."""
    pieces = [*(part.seconds(machine, tokens) for part in parts), attention]
    spent = {"memory": 0.0, "arithmetic": 0.0}
    for memory, arithmetic in pieces:
        spent["memory" if memory >= arithmetic else "arithmetic"] += max(memory, arithmetic)
    return sum(spent.values()), max(spent, key=lambda name: spent[name])
