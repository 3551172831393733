"""A comparison as a page of tables, which the renderers of a report print."""

from __future__ import annotations

from collections.abc import Iterable

from compress.comparison.figures import Figure, mapped
from compress.comparison.records import Change, Comparison, Judged, Kind, Side
from compress.report import format as fmt
from compress.report.format import clean
from compress.report.metric_names import metric_name
from compress.report.table import Block, Page, Row, Table, capped

_TITLES: tuple[tuple[str, str, tuple[Kind, ...]], ...] = (
    ("size", "Size, memory and load time", ("size", "memory", "load")),
    ("quality", "Quality of the artifact in its runtime", ("quality",)),
    ("speed", "Latency and speed-up", ("latency", "speedup")),
)
_COLUMNS = ("figure", "A", "B", "change", "verdict")
_MOST_NAMED = 4
_NAMES = {"size": "artifact size", "peak_memory": "peak memory", "load_time": "load time", "speedup": "speed-up"}
_NOTE = (
    "Intervals in brackets are 95% unless they name another level; that of a change follows from those of A and B. "
    "better, worse: all of it lies on one side, for a timing beyond the noise floors."
)


def comparison_page(found: Comparison) -> Page:
    """The conditions first, then size, quality and speed."""
    tables = [_condition_table(found.conditions)] if found.conditions else []
    first = [change for change in found.changes if not change.detail]
    tables += [_table(key, title, first, kinds) for key, title, kinds in _TITLES]
    rest = _table("details", "More of the quality", [change for change in found.changes if change.detail], ("quality",))
    return Page(
        title="compress compare",
        verdict=_verdict(found),
        failed=found.failed,
        facts=(*_facts("A", found.before), *_facts("B", found.after)),
        main=tuple(table for table in tables if table.rows),
        warnings=tuple(clean(note, limit=1000) for note in found.notes),
        details=(rest,) if rest.rows else (),
        blocks=tuple(_recipes(found)),
    )


def _verdict(found: Comparison) -> str:
    parts = []
    told = [change for change in found.changes if not change.detail and change.kind != "speedup"]
    failed = [judged for judged in found.conditions if judged.failed]
    if failed:
        named = list(dict.fromkeys(clean(judged.condition) for judged in failed))
        parts.append(f"{fmt.count(len(named), 'condition')} FAILED: {', '.join(named)}")
    elif found.conditions:
        parts.append(f"no condition failed ({fmt.count(len(found.conditions), 'figure')} held against them)")
    for word in ("worse", "better"):
        names = [_named(change.name) for change in told if change.word == word]
        if names:
            parts.append(f"B is {word} at {fmt.listing(names)}")
    if not any(change.word in ("better", "worse") for change in told):
        parts.append("no clear change")
    return "; ".join(parts) + "."


def _facts(name: str, side: Side) -> tuple[tuple[str, str], ...]:
    return (
        (name, clean(f"{side.title}, {side.created}")),
        (f"source of {name}", clean(f"{side.source} ({side.source_digest[:16]})")),
        (f"made by {name}", clean(f"{side.recipe} for {side.profile}, {side.target}")),
    )


def _recipes(found: Comparison) -> Iterable[Block]:
    if found.before.recipe != found.after.recipe:
        yield Block("Recipe of A", fmt.clean_block(found.before.recipe) or "not recorded")
        yield Block("Recipe of B", fmt.clean_block(found.after.recipe) or "not recorded")


def _condition_table(conditions: tuple[Judged, ...]) -> Table:
    rows = [
        (
            clean(judged.condition),
            f"change of {_named(judged.figure)}" if judged.is_change else f"{_named(judged.figure)} of B",
            *_bounded(judged),
            judged.end,
            "FAILED" if judged.failed else "passed",
        )
        for judged in conditions
    ]
    kept, notes = capped(rows)
    columns = ("fail if", "figure", "found", "bound", "what decides", "result")
    return Table("conditions", "Conditions", columns, "llrrll", kept, notes=notes)


def _bounded(judged: Judged) -> tuple[str, str]:
    """What was found and the bound, with digits enough to tell them apart, in percent where they are shares."""
    is_share = judged.unit == "fraction"
    scale = 100 if is_share else 1
    found, bound = fmt.told_apart(scale * judged.found, scale * judged.bound)
    unit = "%" if is_share else "x" if judged.unit == "x" else fmt.unit_text(judged.unit, " ")
    return (_plus(found) if judged.is_change else found) + unit, (_plus(bound) if judged.is_change else bound) + unit


def _table(key: str, title: str, changes: Iterable[Change], kinds: tuple[Kind, ...]) -> Table:
    kept = [change for change in changes if change.kind in kinds]
    general = (_NOTE,) if any(change.ratio or change.difference for change in kept) and key != "size" else ()
    rows, notes = capped((_row(change) for change in kept), (*_ways(kept), *general), where="--json")
    return Table(key, title, _COLUMNS, "lrrrl", rows, notes=notes)


def _ways(changes: list[Change]) -> Iterable[str]:
    """How figures were compared, and why others were not, with their names."""
    notes: dict[str, set[str]] = {}
    for change in changes:
        notes.setdefault(_base(change), set()).add(change.note)
    grouped: dict[str, dict[str, None]] = {}
    for change in changes:
        name = _base(change) if len(notes[_base(change)]) == 1 else change.name  # settings that are all alike are one
        if change.note:
            grouped.setdefault(clean(change.note), {})[_named(name)] = None
    for note, names in grouped.items():
        shown, more = list(names)[:_MOST_NAMED], len(names) - _MOST_NAMED
        # names have commas in them
        yield f"{'; '.join(shown)}{f' and {more} more' if more > 0 else ''}: {note}."


def _base(change: Change) -> str:
    return change.name.partition(":")[0]


def _row(change: Change) -> Row:
    return (
        _name(change),
        _value(change, change.before),
        _value(change, change.after),
        _change(change),
        change.word,
    )


def _name(change: Change) -> str:
    unit = fmt.unit_text(change.unit) if change.kind == "quality" else ""
    return f"{_named(change.name)} ({unit})" if unit else _named(change.name)


def _named(name: str) -> str:
    """`latency at decode batch 1 prompt 128`."""
    first, colon, setting = name.partition(":")
    known = _NAMES.get(first) or metric_name(clean(first))
    return f"{known} at {clean(setting)}" if colon else known


def _value(change: Change, figure: Figure | None) -> str:
    if figure is None:
        return fmt.NOT_MEASURED
    if change.unit == "bytes":
        return fmt.size(figure.value)
    if change.unit == "s":
        return fmt.duration(figure.value)
    if change.unit == "fraction":
        shares = mapped(figure, lambda value: 100 * value)
        return fmt.with_interval(_percent(shares), figure.interval)
    value, text = fmt.estimate(figure.value, figure.interval, most_decimals=2 if change.unit == "x" else 9)
    return fmt.with_interval((f"{value}x" if change.unit == "x" else value, text), figure.interval)


def _percent(shares: Figure) -> tuple[str, str]:
    value, text = fmt.estimate(shares.value, shares.interval, most_decimals=3)
    return f"{value}%", text


def _change(change: Change) -> str:
    """In percent where it is one of a time, a size or a ratio, else in the figure's unit; shares in points."""
    if change.word == "not compared":
        return "-"
    if change.ratio is not None and (change.kind != "quality" or change.name == "perplexity"):
        return _signed(mapped(change.ratio, lambda value: 100 * (value - 1)), "%")
    if change.difference is None:
        return "-"
    if change.unit == "fraction":
        return _signed(mapped(change.difference, lambda value: 100 * value), " points")
    return _signed(change.difference, "")


def _signed(figure: Figure, unit: str) -> str:
    """`+3.2% (+1.1 to +5.3)`."""
    interval = figure.interval
    if interval is not None and interval.low == interval.high:  # nothing is uncertain
        interval = None
    value, text = fmt.estimate(figure.value, interval)
    ends = " to ".join(_plus(end) for end in text.split(" to ")) if text else ""
    return fmt.with_interval((f"{_plus(value)}{unit}", ends), interval)


def _plus(text: str) -> str:
    """With a sign, but for zero and for what is no number."""
    return f"+{text}" if text[:1].isdigit() and text.strip("0.") else text
