"""Static scales of a cache from calibration data, and what a store loses on them.

A range is of magnitudes: of each channel, of all of a head or of all. Slow rotary pairs hardly turn within short
windows, so a channel's own largest value there says little of later positions; the length of its pair says all, since
rotation keeps it (as ONNX Runtime GenAI calibrates, src/python/py/models/kv_cache_calibration.py there). Pure functions
on what compress/kv/observed.py tells.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cache
from typing import Literal

import torch
from torch import Tensor

from compress.errors import InputError
from compress.kv import rotary, static
from compress.kv.observed import Attended
from compress.kv.spec import KvSpec, LayerTensors
from compress.kv.storing import store_of
from compress.maths.observers import SHARES

Method = Literal["percentile", "mse", "minmax"]
Part = Literal["key", "value"]
BINS = 1024
QUERIES = 256


@dataclass(frozen=True)
class Ranges:
    """How scales are made: method; share: percent of the magnitudes that `percentile` holds; envelope: whether keys
    count by the length of their rotary pairs."""

    method: Method
    share: float = 99.99
    envelope: bool = True


def scales(spec: KvSpec, seen: Iterable[Attended], ranges: Ranges) -> dict[str, Tensor]:
    """The static scales that a spec wants, from all windows of one layer: by name, float32. seen is gone through twice.

    Raises: InputError for NaN or infinite keys or values; UnsupportedError for rotary pairs that are not known.
    """
    parts: list[Part] = [part for part in ("key", "value") if spec.static_part(part)]
    pairs = _pairs(seen, ranges) if "key" in parts else None
    forms = {part: static.static_format(spec.keys if part == "key" else spec.values) for part in parts}
    found = {part: Magnitudes(forms[part], pairs if part == "key" else None) for part in parts}
    for batch in seen:
        for part, each in found.items():
            each.reach(getattr(batch, part))
    for batch in seen:
        for part, each in found.items():
            each.count(getattr(batch, part))
    return {f"{part}_scale": each.scale(ranges) for part, each in found.items()}


def _pairs(seen: Iterable[Attended], ranges: Ranges) -> Tensor | None:
    return rotary.partners(next(iter(seen))) if ranges.envelope else None


class Magnitudes:
    """Of keys or values, counted by channel in `BINS` equal bins up to the largest of what shares its scale.

    pairs: the channel that each is rotated with (`rotary.partners`), whose common length counts; None where each counts
    by itself.
    """

    def __init__(self, form: static.StaticFormat, pairs: Tensor | None) -> None:
        self.form, self.pairs = form, pairs
        self.peak = torch.zeros(())
        self.counts = torch.zeros(())

    def _of(self, states: Tensor) -> Tensor:
        found = states.detach().float().cpu()
        return found.abs() if self.pairs is None else rotary.lengths(found, self.pairs)

    def reach(self, states: Tensor) -> None:
        """Take the extremes of states (batch, kv heads, n, size)."""
        found = self._of(states).amax((0, 2))
        if not bool(torch.isfinite(found).all()):
            raise InputError(
                "NaN or infinite keys or values reach a cache that is calibrated. The run stops here; check model and "
                "recipe."
            )
        shared = {"channel": found, "head": found.amax(1, keepdim=True)}.get(str(self.form.group))
        self.peak = torch.maximum(self.peak, found.amax().reshape(1, 1) if shared is None else shared)

    def count(self, states: Tensor) -> None:
        """Count states, once all extremes are known."""
        found = self._of(states)
        heads, size = found.shape[1], found.shape[3]
        width = (self.peak / BINS).expand(heads, size).clamp(min=torch.finfo(torch.float32).tiny)
        bins = (found / width[None, :, None]).long().clamp(max=BINS - 1)
        row = torch.arange(heads * size).reshape(1, heads, 1, size)
        flat = torch.bincount((row * BINS + bins).flatten(), minlength=heads * size * BINS)
        self.counts = self.counts + flat.reshape(heads, size, BINS).double()

    def scale(self, ranges: Ranges) -> Tensor:
        """(kv heads, size), (kv heads, 1) or (1, 1) float32, as the format's codes share them."""
        share = {"minmax": self._whole, "percentile": self._held, "mse": self._least}[ranges.method](ranges)
        tiny = torch.finfo(torch.float16).tiny  # a channel of zeros; half precision holds it too
        return (self.peak * share.float() / static.top(self.form)).clamp(min=tiny)

    def _shared(self, counts: Tensor) -> Tensor:
        """Counts of what shares a scale, (…, BINS) with the shape of the scales before it."""
        axes = {"channel": (), "head": (1,)}.get(str(self.form.group), (0, 1))
        return counts.sum(axes, keepdim=True) if axes else counts

    def _whole(self, _: Ranges) -> Tensor:
        return torch.ones(())

    def _held(self, ranges: Ranges) -> Tensor:
        counts = self._shared(self.counts)
        reached = counts.cumsum(-1) >= ranges.share / 100 * counts.sum(-1, keepdim=True) * (1 - 1e-12)
        return (reached.int().argmax(-1) + 1) / BINS

    def _least(self, _: Ranges) -> Tensor:
        """The share of the peak with the least squared error of the codes themselves."""
        counts = self.counts
        if self.pairs is not None:
            turning = self.pairs != torch.arange(len(self.pairs))
            counts = torch.where(turning[None, :, None], counts @ _phases(), counts)
        errors = torch.stack([_errors(self.form, share) for share in SHARES], 1)  # (BINS, shares)
        return torch.tensor(SHARES)[(self._shared(counts) @ errors).argmin(-1)]


def _errors(form: static.StaticFormat, share: float) -> Tensor:
    """Squared error of magnitudes in the middle of each bin, the peak being 1, on a scale for a share of it."""
    middle = ((torch.arange(BINS) + 0.5) / BINS).reshape(1, 1, BINS, 1)
    scale = torch.full((1, 1), share / static.top(form))
    rounded = static.decode(form, static.encode(form, middle, scale), scale, 1)
    return (rounded - middle).double().square().flatten()


@cache
def _phases() -> Tensor:
    """(BINS, BINS) float64: how the magnitude of one channel is spread where its pair's length is in the middle of a
    bin and all phases are as likely: P(r · |cos φ| ≤ t) = 2 / π · asin(t / r)."""
    middle = (torch.arange(BINS, dtype=torch.float64) + 0.5)[:, None]
    edges = torch.arange(BINS + 1, dtype=torch.float64)[None]
    return (torch.asin((edges / middle).clamp(max=1)) * 2 / torch.pi).diff(dim=1)


@dataclass(frozen=True)
class Lost:
    """Relative errors (norm of the difference by the norm) of one layer's keys, values and attention outputs."""

    keys: float
    values: float
    output: float

    def told(self, stored: str) -> str:
        """For a report. stored: as what."""
        return (
            f"as {stored}, on calibration data keys are off by {self.keys:.2%}, values by {self.values:.2%}, the "
            f"attention's outputs by {self.output:.2%}"
        )

    def as_tensor(self) -> Tensor:
        """(3,) float64."""
        return torch.tensor([self.keys, self.values, self.output], dtype=torch.float64)


def lost(spec: KvSpec, tensors: LayerTensors, seen: Iterable[Attended]) -> Lost:
    """What the stores themselves lose where every token is read back from them: none stays in float, but the tokens of
    a run of keys by channel that is not full."""
    squares = torch.zeros(3, 2, dtype=torch.float64)
    for batch in seen:
        key, value = (_stored(spec, part, getattr(batch, part), tensors) for part in ("key", "value"))
        exact, rounded = outputs(batch, batch.key, batch.value), outputs(batch, key, value)
        for place, (new, old) in enumerate(((key, batch.key), (value, batch.value), (rounded, exact))):
            squares[place, 0] += float((new.double() - old.double()).square().sum())
            squares[place, 1] += float(old.double().square().sum())
    return Lost(*(squares[:, 0] / squares[:, 1].clamp(min=1e-300)).sqrt().tolist())


def _stored(spec: KvSpec, part: Part, states: Tensor, tensors: LayerTensors) -> Tensor:
    by_run = part == "key" and spec.keys_by == "channel"
    store = store_of(spec if by_run else replace(spec, residual=0, keys_by="token"), part, tensors)
    store.append(states)
    found = store.read()
    assert found is not None
    return found


def outputs(seen: Attended, key: Tensor, value: Tensor) -> Tensor:
    """Causal attention with these keys and values, (batch, kv heads, groups, n, size) float32, before the projection
    that follows."""
    count = key.shape[2]
    other = replace(seen, key=key, value=value)
    found = []
    for start in range(0, count, QUERIES):
        weights = other.weights(slice(start, min(start + QUERIES, count)))
        found.append(torch.einsum("bhgqk,bhkd->bhgqd", weights, value.float()))
    return torch.cat(found, 3)
