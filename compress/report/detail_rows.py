"""The evidence under the headline tables: layers, passes, verification, environment."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import replace

from compress.records import REMOVED, LayerResult, PassResult, Quality, Report, Verification
from compress.report import format as fmt
from compress.report.format import clean
from compress.report.table import Table, capped

_NONE = "-"
INDEX = re.compile(r"(?<![^.])\d+(?![^.])")  # a whole part of a dotted path: model.layers.12.mlp
_LEVELS = {
    "ran": "ran: the runtime loaded the file and ran it",
    "built": "built: the builder accepted it, the same graph ran elsewhere",
    "checked": "checked: the runtime's rules only, nothing ran",
}


def layer_tables(report: Report) -> tuple[Table, ...]:
    """What happened to the layers, and what runs them."""
    passes = report.passes
    made = (operator_table(report), _pass_table(passes), _layer_table(passes), skipped_table(passes))
    return tuple(replace(table, group="Layers") for table in made)


def run_tables(report: Report) -> tuple[Table, ...]:
    """How the artifact was checked, and where all of this was done."""
    return _verification_table(report.verification), _environment_table(report)


def operator_table(report: Report) -> Table:
    """Which operators run the compressible layers; below it which layers stayed in float, by name."""
    counts = sorted(report.operators.items())
    kept, notes = capped(((clean(name), str(count)) for name, count in counts), float_note(report))
    return Table("operators", "Operators used", ("operator", "layers"), "lr", kept, notes=notes)


def float_note(report: Report) -> tuple[str, ...]:
    """Which layers stayed in float: a sentence, or none."""
    plain = report.float_layers
    names = fmt.listing(patterns(plain), limit=12)
    return (f"{fmt.count(len(plain), 'layer')} left in float: {names}.",) if plain else ()


def skipped_table(passes: Sequence[PassResult]) -> Table:
    """Layers that a pass left alone, grouped by reason."""
    groups: dict[tuple[str, str], list[str]] = {}
    for layer in _layers(passes, changed=False):
        groups.setdefault((layer.pass_text, layer.reason), []).append(layer.layer)
    rows = [
        (clean(text), clean(reason) or "no reason recorded", str(len(names)), fmt.listing(patterns(names)))
        for (text, reason), names in groups.items()
    ]
    kept, notes = capped(rows)
    columns = ("pass", "reason", "layers", "names")
    empty = "no layer was skipped" if passes else "no pass ran"
    return Table("skipped", "Skipped layers", columns, "llrl", kept, notes=notes, empty=empty)


def _verification_table(found: Verification | None) -> Table:
    if found is None:
        return Table("verification", "Verification", (), "", ())
    largest, bound = fmt.told_apart(found.max_relative_difference, found.bound)
    rows = [
        ("level", _LEVELS[found.level]),
        ("runtime", clean(found.runtime)),
        ("agrees", "yes" if found.agrees else "NO"),
        ("largest relative difference", f"{largest} (bound {bound})"),
        *_exact_row(found),
        ("same top token", f"{fmt.percent(found.top1_agreement)} of {found.positions} positions"),
        ("same, where decided", f"{fmt.percent(found.decided_agreement)} of {found.decided_positions} positions"),
    ]
    if found.greedy_tokens:
        rows.append(("greedy tokens", fmt.listing([str(token) for token in found.greedy_tokens], limit=16)))
    rows += [("note", clean(note, limit=600)) for note in found.notes]
    return _facts_table("verification", "Verification", rows)


def _exact_row(found: Verification) -> list[tuple[str, str]]:
    if found.exact_relative_difference is None:
        return []
    largest, bound = fmt.told_apart(found.exact_relative_difference, found.exact_bound)
    return [("the same without the kernels' rounding", f"{largest} (bound {bound})")]


def _pass_table(passes: Sequence[PassResult]) -> Table:
    rows = [
        (
            clean(result.pass_text),
            str(sum(layer.changed for layer in result.layers)),
            str(sum(not layer.changed for layer in result.layers)),
            fmt.duration(result.seconds),
            fmt.listing([f"{pattern}: {count}" for pattern, count in sorted(result.matches.items())]) or _NONE,
        )
        for result in passes
    ]
    kept, notes = capped(rows)
    columns = ("pass", "changed", "skipped", "time", "layers matched per pattern")
    return Table("passes", "Passes", columns, "lrrrl", kept, notes=notes, empty="no pass ran")


def _layer_table(passes: Sequence[PassResult]) -> Table:
    groups: dict[tuple[str, str, str], list[LayerResult]] = {}
    for layer in _layers(passes, changed=True):
        name = layer.layer if layer.format == REMOVED else pattern(layer.layer)
        groups.setdefault((layer.pass_text, name, layer.format), []).append(layer)
    rows, notes = capped(
        (_layer_row(group) for group in groups.values()),
        (
            "Layers of one kind share a row (* stands for their numbers), with the smallest and the largest figure.",
            "Errors are relative squared errors of the weight before and after the pass; the output error is that of "
            f"what the layer puts out on the calibration data, {_against(passes)}.",
        ),
    )
    columns = (
        "pass", "layer", "count", "format", "bits per weight", "error before", "error after", "output error",
        "worst layer", "notes",
    )  # fmt: skip
    if not rows:
        return Table("layers", "Layers", columns, "llrlrrrrll", (), empty="no layer was changed")
    return Table("layers", "Layers", columns, "llrlrrrrll", rows, keys=2, notes=notes)


def _against(passes: Sequence[PassResult]) -> str:
    """What output errors are taken against, in words; different passes may go by different references."""
    words = {
        "same inputs": "against the source weight on the same inputs",
        "reference stream": "against what the uncompressed model puts out there, whose inputs have no errors in them",
    }
    used = {layer.output_reference for layer in _layers(passes, changed=True)}
    found = [text for name, text in words.items() if name in used]
    return ", or, where a pass carried that along, ".join(found) or words["same inputs"]


def _layer_row(group: Sequence[LayerResult]) -> tuple[str, ...]:
    first = group[0]
    notes = dict.fromkeys(note for layer in group for note in layer.notes)
    others = [(layer.layer, [user for user in layer.users if user != layer.layer]) for layer in group]
    tied = [f"{name} also serves {', '.join(users)}" for name, users in others if users]
    return (
        clean(first.pass_text),
        clean(first.layer) if len(group) == 1 else clean(pattern(first.layer)),
        str(len(group)),
        clean(first.format) or _NONE,
        fmt.value_range([layer.bits_per_weight for layer in group]),
        fmt.value_range([layer.error_before for layer in group]),
        fmt.value_range([layer.error_after for layer in group]),
        fmt.value_range([layer.output_error for layer in group]),
        _worst(group) if len(group) > 1 else _NONE,
        fmt.listing([*notes, *tied], limit=3) or _NONE,
    )


def _worst(group: Sequence[LayerResult]) -> str:
    def error(layer: LayerResult) -> float:
        found = layer.error_after if layer.output_error is None else layer.output_error
        return -1.0 if found is None else found

    worst = max(group, key=error)
    return clean(worst.layer) if error(worst) >= 0 else _NONE


def _environment_table(report: Report) -> Table:
    rows = [
        ("compressed from", report.source),
        ("source digest", report.source_digest),
        ("profile and target", f"{report.profile}, {report.target}"),
        ("created", report.created),
        ("seed", str(report.seed)),
        ("calibration", _pairs(report.calibration.items())),
        ("versions", _pairs(report.versions.items())),
    ]
    if report.speed:
        rows.append(("timed in", f"{report.speed.runtime}, threads: {report.speed.threads}"))
        rows += [(f"machine: {name}", value) for name, value in sorted(report.speed.machine.items())]
    rows += _digest_rows([report.baseline_quality, report.artifact_quality, report.memory_quality])
    rows.append(("report schema", str(report.schema_version)))
    return _facts_table("environment", "Environment", [(name, clean(value, limit=600)) for name, value in rows])


def _digest_rows(qualities: Sequence[Quality | None]) -> list[tuple[str, str]]:
    known = [quality for quality in qualities if quality]
    if len({quality.data_digest for quality in known}) == 1:
        return [("quality data digest", known[0].data_digest)]
    return [(f"data digest, {quality.subject} in {quality.where}", quality.data_digest) for quality in known]


def _facts_table(key: str, title: str, rows: Iterable[tuple[str, str]]) -> Table:
    kept, notes = capped((clean(name), value or _NONE) for name, value in rows)
    return Table(key, title, ("what", "found"), "ll", kept, notes=notes)


def _layers(passes: Sequence[PassResult], *, changed: bool) -> Iterable[LayerResult]:
    return (layer for result in passes for layer in result.layers if layer.changed is changed)


def pattern(name: str) -> str:
    """A dotted path with its numbers starred: `model.layers.*.mlp`."""
    return INDEX.sub("*", name)


def patterns(names: Sequence[str]) -> list[str]:
    """Names with their numbers starred and counted; a name that is alone in its pattern stays whole."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(pattern(name), []).append(name)
    return [group[0] if len(group) == 1 else f"{kind} ({len(group)})" for kind, group in groups.items()]


def _pairs(items: Iterable[tuple[str, object]]) -> str:
    return ", ".join(f"{name} {value}" for name, value in sorted(items, key=lambda item: item[0]))
