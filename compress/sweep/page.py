"""A sweep on a terminal, as Markdown and as one HTML page: pure functions of its record."""

from __future__ import annotations

from typing import TYPE_CHECKING

from compress.records import Timing
from compress.records.base import Interval
from compress.report import format as fmt
from compress.report.format import NOT_MEASURED, clean
from compress.report.front_chart import Point, State, Trade, front_caption, front_chart
from compress.report.html_page import Drawing, page_html
from compress.report.markdown import page_markdown
from compress.report.metric_names import metric_name
from compress.report.speed_rows import speedup_text
from compress.report.table import Block, Page, Row, Table, Tile
from compress.report.terminal import print_page
from compress.report.tiles import TONES
from compress.sweep.records import Figure, Sweep, Variant

if TYPE_CHECKING:
    from rich.console import Console

_NONE = "-"
_TABLE = "variants"


def to_terminal(found: Sweep, console: Console, *, full: bool = False) -> None:
    """Print it; `full` adds the settings and the environment."""
    print_page(build_page(found), console, full=full)


def to_markdown(found: Sweep) -> str:
    """For a pull request."""
    return page_markdown(build_page(found))


def to_html(found: Sweep) -> str:
    """The whole page, with the record in it as JSON."""
    trade = trade_of(found)
    svg = front_chart(trade) if trade else ""
    drawings = {_TABLE: Drawing(svg, front_caption(trade))} if trade and svg else {}
    text = "The whole record of the sweep is embedded in this page as JSON."
    return page_html(build_page(found), drawings, [(found.model_dump_json(), text)])


def build_page(found: Sweep) -> Page:
    """Everything that any page shows of a sweep."""
    facts = (
        ("source", found.source),
        ("recipes", fmt.count(len(found.variants), "recipe")),
        ("profile", found.profile),
        ("target", found.target),
        ("created", found.created),
    )
    warnings = [f"{each.name} failed: {each.reason}" for each in found.variants if each.state == "failed"]
    warnings += _timing_warnings(found)
    return Page(
        title=clean(found.title),
        verdict=clean(verdict(found), limit=2000),
        failed=not found.choice.allowed,
        facts=tuple((name, clean(value, limit=120)) for name, value in facts if value),
        main=tuple(table for table in (variant_table(found), reason_table(found)) if table.rows),
        warnings=tuple(clean(text, limit=600) for text in warnings),
        details=(speed_table(found), recipe_table(found), environment_table(found)),
        tiles=_tiles(found),
        blocks=(Block("Exact command", fmt.clean_block(found.command) or "not recorded"),),
    )


def verdict(found: Sweep) -> str:
    """The choice and what it is worth, in one sentence."""
    picked = next((each for each in found.variants if each.name == found.choice.recommended), None)
    if picked is None:
        return f"{found.choice.sentence}."
    findings = [found.choice.sentence]
    lead = _lead(found, picked)
    if lead is not None:
        value, bounds = fmt.speedup(lead.speedup, lead.interval)
        findings.append(
            f"{lead.name} {value} the baseline's speed ({fmt.level(lead.interval)} {bounds}, {lead.verdict})"
        )
    if picked.artifact_bytes:
        findings.append(
            f"{fmt.times_smaller(found.source_bytes, picked.artifact_bytes)} ({fmt.size(picked.artifact_bytes)})"
        )
    if "loss" in picked.figures:
        findings.append(f"{_loss_name(found)} {_figure(picked.figures['loss'])}")
    return ", ".join(findings) + f"; {_counted(found)}."


def variant_table(found: Sweep) -> Table:
    """The baseline on top, then every variant with its figures and whether it is on the front."""
    columns = ("variant", "choice", "size", "smaller", _loss_header(found), "ms per call", "speed-up", "speed")
    base_ms = fmt.significant(1000 * found.baseline_s) if found.baseline_s else NOT_MEASURED
    rows: list[Row] = [
        ("baseline", _NONE, fmt.size(found.source_bytes), _NONE, "reference", base_ms, _NONE, _NONE),
        *(_variant_row(found, each) for each in found.variants),
    ]
    notes = [
        "Front: no other variant is better in size, speed or loss beyond the interval without being worse in another.",
        f"Speed at {found.setting or 'no setting'}: all variants and the baseline in the same shuffled rounds; above 1 "
        "a variant is faster than the baseline.",
        "Intervals in brackets are 95%.",
        *found.notes,
    ]
    return Table(_TABLE, "Variants", columns, "llrrrrrl", tuple(rows), notes=tuple(notes))


def reason_table(found: Sweep) -> Table:
    """Why each other was not taken."""
    rows = tuple((name, clean(reason, limit=400)) for name, reason in found.choice.reasons.items())
    return Table("reasons", "Why not the others", ("variant", "reason"), "ll", rows, notes=_limit_notes(found))


def speed_table(found: Sweep) -> Table:
    """Every setting of every variant."""
    rows = [
        (each.name, timing.name, fmt.significant(1000 * timing.baseline_s), fmt.significant(1000 * timing.variant_s),
         speedup_text(timing), timing.verdict)
        for each in found.done for timing in each.timings
    ]  # fmt: skip
    columns = ("variant", "setting", "baseline ms", "variant ms", "speed-up", "verdict")
    return Table("speed", "Speed at every setting", columns, "llrrrl", tuple(rows), keys=2)


def recipe_table(found: Sweep) -> Table:
    """What each variant is, and what it took to make."""
    rows = [
        (each.name, clean(each.recipe), NOT_MEASURED if each.seconds is None else fmt.duration(each.seconds),
         ", ".join(each.reused) or _NONE, each.folder or _NONE)
        for each in found.variants
    ]  # fmt: skip
    columns = ("variant", "passes", "time to make", "stages taken from another", "folder")
    return Table("recipes", "Recipes", columns, "llrll", tuple(rows))


def environment_table(found: Sweep) -> Table:
    """Where it was measured."""
    rows = (
        ("runtime", clean(found.runtime) or NOT_MEASURED),
        ("threads", str(found.threads)),
        *((clean(name), clean(value)) for name, value in found.machine.items()),
        ("seed", str(found.seed)),
        ("source digest", clean(found.source_digest)),
        ("versions", clean(", ".join(f"{name} {number}" for name, number in found.versions.items()), limit=400)),
    )
    return Table("environment", "Environment", ("what", "found"), "ll", rows)


def trade_of(found: Sweep) -> Trade | None:
    """Loss against speed-up, for the drawing; None where either was not measured."""
    shown = [each for each in found.done if {"loss", "latency"} <= each.figures.keys()]
    if not shown:
        return None
    points = [Point("baseline", 0.0, 1.0, found.source_bytes, "baseline"), *(_point(found, each) for each in shown)]
    return Trade(
        metric=_loss_name(found),
        setting=found.setting,
        better="lower",
        points=tuple(points),
        worst_quality=found.limits.loss,
        least_speedup=_least_speedup(found),
        unit=found.loss_metric.partition(", ")[2],
    )


def _point(found: Sweep, variant: Variant) -> Point:
    loss, latency, choice = variant.figures["loss"], variant.figures["latency"], found.choice
    state: State = "dominated"
    if variant.name == choice.recommended:
        state = "recommended"
    elif variant.name in choice.front:
        state = "front"
    return Point(
        variant.name,
        loss.value,
        1 / latency.value,
        variant.artifact_bytes or 0,
        state,
        quality_interval=Interval(low=loss.low, high=loss.high),
        speedup_interval=Interval(low=1 / latency.high, high=1 / latency.low),
        tied=variant.name in choice.tied,
        reason=clean(choice.reasons.get(variant.name, "")),
    )


def _least_speedup(found: Sweep) -> float | None:
    share, seconds = (found.limits.read.get(key) for key in ("latency_share", "latency_s"))
    if share is None and seconds is not None and found.baseline_s:
        share = seconds / found.baseline_s
    return 1 / share if share else None


def _variant_row(found: Sweep, variant: Variant) -> Row:
    if variant.state == "failed":
        return (variant.name, "FAILED", *[_NONE] * 6)
    lead = _lead(found, variant)
    size = variant.artifact_bytes or 0
    loss = variant.figures.get("loss")
    return (
        variant.name,
        _standing(found, variant),
        fmt.size(size),
        fmt.times_smaller(found.source_bytes, size) or _NONE,
        NOT_MEASURED if loss is None else _figure(loss),
        NOT_MEASURED if lead is None else fmt.significant(1000 * lead.variant_s),
        NOT_MEASURED if lead is None else speedup_text(lead),
        _NONE if lead is None else lead.verdict,
    )


def _standing(found: Sweep, variant: Variant) -> str:
    choice = found.choice
    if variant.name == choice.recommended:
        return "recommended"
    words = ["on the front"] if variant.name in choice.front else []
    words += ["a tie"] if variant.name in choice.tied else []
    words += [] if variant.name in choice.allowed else ["not allowed"]
    return ", ".join(words) or "dominated"


def _lead(found: Sweep, variant: Variant) -> Timing | None:
    return next((timing for timing in variant.timings if timing.name == found.setting), None)


def _figure(figure: Figure) -> str:
    interval = Interval(low=figure.low, high=figure.high)
    if figure.low == figure.high:
        return fmt.significant(figure.value)
    return fmt.with_interval(fmt.estimate(figure.value, interval), interval)


def _loss_name(found: Sweep) -> str:
    return metric_name(found.loss_metric.partition(", ")[0]) or "loss"


def _loss_header(found: Sweep) -> str:
    unit = found.loss_metric.partition(", ")[2]
    return f"{_loss_name(found)} ({unit})" if unit and unit != "1" else _loss_name(found)


def _limit_notes(found: Sweep) -> tuple[str, ...]:
    limits = found.limits
    given = [f"--max-loss {limits.loss:g}"] if limits.loss is not None else []
    given += [f"--max-latency {limits.latency}"] if limits.latency else []
    given += [f"--max-size {limits.size}"] if limits.size else []
    given += [f"--prefer {','.join(limits.prefer)}"] if limits.prefer else []
    if not given:
        return ("No limit was given. --max-loss, --max-latency and --max-size set them, --prefer says what decides.",)
    return (clean(f"Asked for: {', '.join(given)}. A limit is held against the worse end of the interval."),)


def _timing_warnings(found: Sweep) -> list[str]:
    """Of the setting that leads, each text once, with those it is of."""
    of: dict[str, list[str]] = {}
    for each in found.done:
        lead = _lead(found, each)
        for text in lead.warnings if lead else ():
            of.setdefault(text, []).append(each.name)
    every = len(found.done)
    return [f"{'all variants' if len(names) == every else ', '.join(names)}: {text}" for text, names in of.items()]


def _tiles(found: Sweep) -> tuple[Tile, ...]:
    """The recommended variant in figures; nothing where none is."""
    picked = next((each for each in found.variants if each.name == found.choice.recommended), None)
    if picked is None:
        return ()
    of = f"of {fmt.count(len(found.variants), 'recipe')}"
    tiles = [Tile("Recommended", clean(picked.name), f"a tie, {of}" if found.choice.tied else of, "good")]
    lead = _lead(found, picked)
    if lead is not None:
        value, bounds = fmt.speedup(lead.speedup, lead.interval)
        tiles.append(Tile(f"Speed-up, {found.setting}", value, f"{bounds}, {lead.verdict}", TONES[lead.verdict]))
    if picked.artifact_bytes:
        change = fmt.times_smaller(found.source_bytes, picked.artifact_bytes)
        tiles.append(Tile("Size", fmt.size(picked.artifact_bytes), f"{change}, from {fmt.size(found.source_bytes)}"))
    loss = picked.figures.get("loss")
    if loss is not None:
        value, bounds = fmt.estimate(loss.value, Interval(low=loss.low, high=loss.high))
        tiles.append(Tile(_loss_header(found), value, bounds))
    return tuple(tiles)


def _counted(found: Sweep) -> str:
    done, failed = len(found.done), len(found.variants) - len(found.done)
    return f"{fmt.count(done, 'variant')} done" + (f", {failed} failed" if failed else "")
