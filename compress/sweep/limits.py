"""What `--max-loss`, `--max-latency`, `--max-size` and `--prefer` say, read before any work is done."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import get_args

from compress.errors import UsageError, nearest
from compress.sweep.front import Axis, Limit
from compress.sweep.records import Limits

_AMOUNT = re.compile(r"\s*([0-9.]+(?:[eE][-+]?[0-9]+)?)\s*([a-zA-Z%]*)\s*")
_SECONDS = {"s": 1.0, "ms": 1e-3, "us": 1e-6}
_BYTES = {"": 1.0, "B": 1.0, "kB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}


def read_limits(
    loss: float | None = None, latency: str | None = None, size: str | None = None, prefer: str | None = None
) -> Limits:
    """From the texts of the command line. Raises: UsageError naming what is allowed."""
    if loss is not None and not (math.isfinite(loss) and loss >= 0):
        raise UsageError(f"--max-loss {loss:g}: give a number from 0 up, in the unit of the headline metric.")
    shares = {"latency": "", "size": ""}
    read: dict[str, float] = {}
    if latency is not None:
        value, unit = _amount("--max-latency", latency, "5ms, 0.8x or 80%")
        if unit not in (*_SECONDS, "x", "%"):
            raise UsageError(f"--max-latency {latency}: unit '{unit}'.{nearest(unit, (*_SECONDS, 'x', '%'))}")
        shares["latency"] = latency.strip()
        read["latency_s" if unit in _SECONDS else "latency_share"] = value * _SECONDS.get(unit, _share(unit))
    if size is not None:
        value, unit = _amount("--max-size", size, "3MB, 3000000 or 30%")
        if unit not in (*_BYTES, "%", "x"):
            raise UsageError(f"--max-size {size}: unit '{unit}'.{nearest(unit, (*filter(None, _BYTES), '%', 'x'))}")
        shares["size"] = size.strip()
        read["size_bytes" if unit in _BYTES else "size_share"] = value * _BYTES.get(unit, _share(unit))
    return Limits(loss=loss, latency=shares["latency"], size=shares["size"], prefer=_axes(prefer), read=read)


def resolve(limits: Limits, source_bytes: int, baseline_s: float | None) -> list[Limit]:
    """On the axes of the front: latency as a share of the baseline's time, size in bytes."""
    found = []
    if limits.loss is not None:
        found.append(Limit("loss", limits.loss, f"{limits.loss:g}"))
    if limits.latency:
        share = limits.read.get("latency_share")
        if share is None:  # without a time of the baseline nothing was measured, and nothing meets the limit
            share = limits.read["latency_s"] / baseline_s if baseline_s else 0.0
        found.append(Limit("latency", share, limits.latency))
    if limits.size:
        share = limits.read.get("size_share")
        most = limits.read["size_bytes"] if share is None else share * source_bytes
        found.append(Limit("size", most, limits.size))
    return found


def _amount(option: str, text: str, example: str) -> tuple[float, str]:
    match = _AMOUNT.fullmatch(text)
    try:
        value = float(match[1]) if match else math.nan
    except ValueError:
        value = math.nan
    if match is None or not math.isfinite(value) or value <= 0:
        raise UsageError(f"{option} {text}: give a number above 0 with its unit, such as {example}.")
    return value, match[2]


def _share(unit: str) -> float:
    return 0.01 if unit == "%" else 1.0


def _axes(text: str | None) -> tuple[Axis, ...]:
    known: tuple[Axis, ...] = get_args(Axis)
    found: list[Axis] = []
    for name in _names(text):
        axis = next((each for each in known if each == name), None)
        if axis is None:
            raise UsageError(f"--prefer {text}: '{name}'.{nearest(name, known)}")
        found.append(axis)
    return tuple(dict.fromkeys(found))


def _names(text: str | None) -> Sequence[str]:
    return [] if text is None else [part.strip() for part in text.split(",")]
