"""Numbers and names as text: one spelling for all pages, with no more digits than the interval supports.

Everything returned is ASCII unless a name was not, so a page survives a log file and a plain terminal.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Sequence

from compress.records import Interval, Metric

NOT_MEASURED = "not measured"
_FRACTION = "fraction"  # the unit of shares between 0 and 1, shown as percent
_NO_UNITS = frozenset({"", "1", _FRACTION})

_SIZES = ("B", "kB", "MB", "GB", "TB", "PB")
_MANTISSA_ONE_DIGIT = 3.55  # above it a second digit of the half-width says nothing (the rule of the PDG tables)
_HIDDEN = frozenset({"Cc", "Cf", "Cs", "Co", "Zl", "Zp"})  # Unicode categories that do something instead of showing
_MOST_FIXED = 9  # decimals of a figure near 1, such as a cosine
_SMALLEST_FIXED = 6  # decimals; smaller figures read better as 1.2e-07


def significant(value: float) -> str:
    """Three significant digits: `0.00520`, `7.60`, `1230`."""
    if not math.isfinite(value):
        return _not_finite(value)
    if value == 0:
        return "0"
    rounded = float(f"{value:.2e}")
    decimals = 2 - math.floor(math.log10(abs(rounded)))
    if decimals > _SMALLEST_FIXED + 1 or decimals < -6:
        return f"{rounded:.2e}"
    return f"{rounded:.{max(decimals, 0)}f}"


def short(value: float) -> str:
    """Three significant digits without trailing zeros, for exact quantities: `4.7`, `2`."""
    text = significant(value)
    return text.rstrip("0").rstrip(".") if "." in text and "e" not in text else text


def size(count: float) -> str:
    """Bytes in steps of 1000: `14.7 MB`."""
    step = 0
    while step < len(_SIZES) - 1 and float(f"{count / 1000**step:.2e}") >= 1000:
        step += 1
    return f"{short(count / 1000**step)} {_SIZES[step]}"


def duration(seconds: float) -> str:
    """A time with the unit that suits it: `7.60 ms`, `12.3 s`, `3.4 min`."""
    for limit, factor, unit in ((1e-3, 1e6, "us"), (1.0, 1e3, "ms"), (120.0, 1.0, "s"), (7200.0, 1 / 60, "min")):
        if seconds < limit:
            return f"{significant(seconds * factor)} {unit}"
    return f"{significant(seconds / 3600)} h"


def percent(fraction: float) -> str:
    """`99.2%`; what is not quite all or nothing is never rounded to it."""
    if not math.isfinite(fraction):
        return _not_finite(fraction)
    text = f"{100 * fraction:.1f}"
    if text == "100.0" and fraction < 1:
        return "over 99.9%"
    if text == "0.0" and fraction > 0:
        return "under 0.1%"
    return f"{text}%"


def bounds(interval: Interval, decimals: int | None) -> str:
    """`1.55 to 1.69`."""
    return f"{_fixed(interval.low, decimals)} to {_fixed(interval.high, decimals)}"


def level(interval: Interval) -> str:
    """`95%`."""
    return f"{100 * interval.level:.4g}%"


def estimate(value: float, interval: Interval | None, most_decimals: int = 9) -> tuple[str, str]:
    """A figure and its interval to the same decimals: `("0.0052", "0.0048 to 0.0056")`; the second may be empty."""
    if interval is None:
        return significant(value), ""
    decimals = _decimals(value, interval, most_decimals)
    return _fixed(value, decimals), bounds(interval, decimals)


def speedup(ratio: float, interval: Interval) -> tuple[str, str]:
    """`("1.62x", "1.55 to 1.69")`: a ratio keeps two decimals however wide its interval is, which says so itself."""
    decimals = _decimals(ratio, interval, 2)
    if decimals is None or not math.isfinite(ratio) or ratio <= 0:
        return f"{significant(ratio)}x", bounds(interval, decimals)
    power = math.floor(math.log10(ratio))
    kept = max(decimals, 2 - power if power >= 0 else 1 - power)
    return f"{_fixed(ratio, kept)}x", bounds(interval, kept)


def plain(metric: Metric) -> str:
    """The figure alone, of three significant digits or more: `21.8`, `98.6%`."""
    if metric.unit == _FRACTION or metric.interval is None or not metric.value or not math.isfinite(metric.value):
        return metric_parts(metric)[0]
    decimals = _decimals(metric.value, metric.interval, 9)
    return _fixed(metric.value, max(decimals or 0, 2 - math.floor(math.log10(abs(metric.value))), 0))


def metric_parts(metric: Metric) -> tuple[str, str]:
    """As `estimate`, with fractions as percent."""
    if metric.unit != _FRACTION:
        return estimate(metric.value, metric.interval)
    if metric.interval is None:
        return percent(metric.value), ""
    ends = {"low": 100 * metric.interval.low, "high": 100 * metric.interval.high}
    scaled = metric.interval.model_copy(update=ends)
    decimals = _by_width(scaled)
    if decimals is None:
        return percent(metric.value), bounds(scaled, 1)
    kept = min(max(decimals, 1), 3)
    return f"{_fixed(100 * metric.value, kept)}%", bounds(scaled, kept)


def unit_text(unit: str, before: str = "") -> str:
    """The unit to print after a figure: nothing for pure numbers and for fractions, which carry their sign."""
    return "" if unit in _NO_UNITS else before + clean(unit)


def told_apart(found: float, bound: float) -> tuple[str, str]:
    """Two figures with digits enough to see which is larger: a gate missed by a hair must not read `0.98, 0.98`."""
    texts = short(found), short(bound)
    for digits in range(4, 17):
        if texts[0] != texts[1] or found == bound:
            break
        texts = f"{found:.{digits}g}", f"{bound:.{digits}g}"
    return texts


def speedup_text(ratio: float, interval: Interval) -> str:
    """`1.62x (1.55 to 1.69)`."""
    return with_interval(speedup(ratio, interval), interval)


def with_interval(parts: tuple[str, str], interval: Interval | None) -> str:
    """One cell: `0.0052 (0.0048 to 0.0056)`; the level is spelled out only when it is not 95%."""
    value, text = parts
    if interval is None or not text:
        return value
    prefix = "" if math.isclose(interval.level, 0.95) else f"{level(interval)} "
    return f"{value} ({prefix}{text})"


def value_range(values: Sequence[float | None]) -> str:
    """Smallest to largest of what is known: `0.0012 to 0.0051`; `-` when nothing is."""
    known = sorted(value for value in values if value is not None)
    if not known:
        return "-"
    low, high = short(known[0]), short(known[-1])
    return low if low == high else f"{low} to {high}"


def count(number: int, noun: str) -> str:
    """`1 layer`, `57 layers`."""
    return f"{number} {noun if number == 1 else f'{noun}s'}"


def times_smaller(before: float, after: float) -> str:
    """`3.13x smaller`, `1.2x larger`, `the same`; empty when one side is unknown."""
    if before <= 0 or after <= 0:
        return ""
    ratio = before / after
    if 0.995 < ratio < 1.005:
        return "the same"
    return f"{short(ratio)}x smaller" if ratio > 1 else f"{short(1 / ratio)}x larger"


def clean(text: str, limit: int = 200) -> str:
    """A name from a file made safe to show on one line: controls and direction marks made visible, length capped."""
    line = " ".join(text.split())
    if len(line) > limit:
        half = (limit - 5) // 2
        line = f"{line[:half]} ... {line[-half:]}"
    return _visible(line)


def clean_block(text: str, limit: int = 12_000) -> str:
    """The same for a text of several lines, such as a recipe."""
    cut = text if len(text) <= limit else f"{text[:limit]}\n... ({len(text) - limit} more characters in report.json)"
    return "\n".join(_visible(line.replace("\t", "    ").rstrip()) for line in cut.strip("\n").splitlines())


def listing(names: Sequence[str], limit: int = 6) -> str:
    """`a, b, c and 4 more`."""
    shown = ", ".join(clean(name) for name in names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"


def _visible(line: str) -> str:
    # Escape sequences drive terminals and direction marks (category Cf) reorder what is read: show both as text.
    return "".join(
        char if unicodedata.category(char) not in _HIDDEN else char.encode("unicode_escape").decode("ascii")
        for char in line
    )


def _not_finite(value: float) -> str:
    if math.isnan(value):
        return "not a number"
    return "infinite" if value > 0 else "minus infinite"


def _fixed(value: float, decimals: int | None) -> str:
    if decimals is None or not math.isfinite(value):
        return significant(value)
    if decimals > _SMALLEST_FIXED and abs(value) < 1e-3:
        return f"{value:.1e}"
    text = f"{value:.{min(max(decimals, 0), _MOST_FIXED)}f}"
    return text.removeprefix("-") if float(text) == 0 else text


def _by_width(interval: Interval) -> int | None:
    half = (interval.high - interval.low) / 2
    if not math.isfinite(half) or half <= 0:
        return None
    power = math.floor(math.log10(half))
    return -power if half / 10.0**power >= _MANTISSA_ONE_DIGIT else 1 - power


def _decimals(value: float, interval: Interval, most: int) -> int | None:
    by_width = _by_width(interval)
    if by_width is None:
        return None
    largest = max(abs(value), abs(interval.low), abs(interval.high))
    kept = min(by_width, 2 - math.floor(math.log10(largest)), most)
    if _fixed(interval.low, kept) == _fixed(interval.high, kept):  # three digits would hide a narrow interval
        return -math.floor(math.log10((interval.high - interval.low) / 2))
    return kept
