"""Passes and hardware profiles as text. Everything is read off their fields, so nothing here lists a setting."""

from __future__ import annotations

import inspect
import io
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel
from pydantic.json_schema import GenerateJsonSchema

from compress.errors import UsageError
from compress.hwprofiles import Figure, Profile
from compress.hwprofiles.schema import FormatSupport
from compress.report.format import clean
from compress.report.table import Table
from compress.spec import print_value

if TYPE_CHECKING:
    from compress.engine.layerpass import Pass

_BOUNDS = {
    "minimum": "at least", "exclusiveMinimum": "more than", "maximum": "at most", "exclusiveMaximum": "less than",
    "minLength": "characters at least", "maxLength": "characters at most", "minItems": "items at least",
    "maxItems": "items at most", "multipleOf": "a multiple of",
}  # fmt: skip
_CHOICES = re.compile(r"\^\(([\w|.-]+)\)\$")  # a pattern that only lists words
_UNSET = "-"


def pass_settings(cls: type[Pass]) -> dict[str, dict[str, Any]]:
    """Per setting its `type` in words, its `default`, what is `allowed` where that is limited, `help` if there is any.

    A setting without `default` must be given. The pass's own settings come before those that all passes have.
    """
    schema = cls.model_json_schema(schema_generator=_Schema)
    shared = _shared_settings()
    fields: dict[str, dict[str, Any]] = schema.get("properties", {})
    ordered = sorted(fields, key=lambda name: name in shared)
    for name, field in cls.model_fields.items():
        if field.default_factory is not None:  # of which a schema says nothing
            fields[name] = {**fields[name], "default": field.get_default(call_default_factory=True)}
    return {name: _setting(fields[name], schema.get("$defs", {})) for name in ordered}


def describe_pass(cls: type[Pass]) -> str:
    """One pass for people: what it does, what it needs and treats, its settings, and a line to copy."""
    facts = [f"needs:    {_needs(cls)}"]
    if not cls.chooses():
        facts.append(f"treats:   {'the shape of the model' if cls.reshapes else 'the cache of keys and values'}")
    else:
        filled = " and ".join(sorted(filter(None, cls.also | {cls.part})))
        facts += [
            f"treats:   {', '.join(sorted(cls.kinds))} layers",
            f"fills:    {filled or 'nothing'}, once per layer",
        ]
    example = example_of(cls)
    facts += [f"example:  {example}"] if example else []
    settings = pass_settings(cls)
    shared = _shared_settings()
    own = {name: found for name, found in settings.items() if name not in shared}
    general = {name: found for name, found in settings.items() if name in shared}
    tables = _settings_table("Settings", own), _settings_table("Settings of every pass", general)
    return "\n\n".join([cls.name, *_documentations(cls), "\n".join(facts), _printed(tables), _shared_help()])


def _needs(cls: type[Pass]) -> str:
    """The statistics that a pass always asks for, else with which switch it asks for data."""
    from compress.engine.layer_stats import Stat  # which loads torch, as a pass has already

    if cls.needs - {Stat.SHARING}:
        return f"{', '.join(sorted(cls.needs))}, so calibration data"
    if any(field.is_required() for field in cls.model_fields.values()):
        return "no data"
    usual = cls.build({})
    if usual.needs_data:
        return f"{', '.join(sorted(usual.wants - {Stat.SHARING}))}, so calibration data"
    fields = {name: field.default for name, field in cls.model_fields.items() if isinstance(field.default, bool)}
    switched = {name: _built(cls, {name: not default}) for name, default in fields.items()}
    more = [f"{name}={str(not fields[name]).lower()}" for name, item in switched.items() if item and item.needs_data]
    return f"no data, with {' or '.join(more)} calibration data" if more else "no data"


def _built(cls: type[Pass], settings: Mapping[str, Any]) -> Pass | None:
    """The pass with some settings; None where these cannot be without others."""
    try:
        return cls.build(settings)
    except UsageError:
        return None


def example_of(cls: type[Pass]) -> str:
    """The pass with its own settings spelled out, as `--passes` takes it; empty where one has no value to show. A
    default that may not be given beside the others is left out: `rank` of heal, say, which is of another mode."""
    shared = _shared_settings()
    values = {}
    for name, field in cls.model_fields.items():
        if name in shared:
            continue
        if field.is_required() and not field.examples:
            return ""
        values[name] = field.examples[0] if field.examples else field.get_default(call_default_factory=True)
    given = {name: value for name, value in values.items() if value is not None}
    if (whole := _built(cls, given)) is not None:
        return str(whole)
    shown: dict[str, Any] = {}
    for name, value in given.items():  # some settings go with a value of another only
        shown |= {name: value} if _built(cls, {**shown, name: value}) else {}
    return str(cls.build(shown))


def describe_profile(profile: Profile) -> str:
    """One profile for people: identity, figures with where they come from, and formats with their kernels."""
    facts: list[tuple[str, str]] = []
    figures: list[tuple[str, ...]] = []
    formats: dict[str, Sequence[FormatSupport]] = {}
    _walk("", profile, facts, figures, formats)
    tables = [
        Table("profile", profile.name, ("what", "found"), "ll", tuple(facts)),
        Table("figures", "Figures", ("figure", "value", "state", "source"), "lrll", tuple(figures)),
    ]
    tables += [_format_table(name, entries) for name, entries in formats.items()]
    return _printed(tables)


class _Schema(GenerateJsonSchema):
    """JSON Schema, which knows every kind of field, with formats as the text that a user types."""

    def is_instance_schema(self, schema: Any) -> dict[str, Any]:
        from compress.formats import NAMES
        from compress.formats.base import Format

        if not issubclass(schema["cls"], Format):
            return {"type": schema["cls"].__name__}
        return {"type": "format", "enum": list(NAMES)}

    def encode_default(self, dft: Any) -> Any:
        from compress.formats.base import Format

        return str(dft) if isinstance(dft, Format) else super().encode_default(dft)


def _setting(schema: Mapping[str, Any], definitions: Mapping[str, Any]) -> dict[str, Any]:
    kinds = _alternatives(schema, definitions)
    limits = [text for kind in kinds for text in _limits(kind)]
    found: dict[str, Any] = {"type": " or ".join(dict.fromkeys(_type_name(kind, definitions) for kind in kinds))}
    if "default" in schema:
        found["default"] = schema["default"]
    if limits:
        found["allowed"] = ", ".join(limits)
    if "description" in schema:
        found["help"] = schema["description"]
    return found


def _alternatives(schema: Mapping[str, Any], definitions: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The schema with references resolved, and a union taken apart."""
    if "$ref" in schema:
        return _alternatives(definitions[schema["$ref"].rpartition("/")[2]], definitions)
    parts = schema.get("anyOf", schema.get("oneOf"))
    return [kind for part in parts for kind in _alternatives(part, definitions)] if parts else [schema]


def _type_name(schema: Mapping[str, Any], definitions: Mapping[str, Any]) -> str:
    name = str(schema.get("type", "word" if "enum" in schema or "const" in schema else "any value"))
    inner = schema.get("items") or schema.get("additionalProperties")
    if not isinstance(inner, Mapping) or name not in ("array", "object"):
        return {"array": "list", "object": "map", "null": "null"}.get(name, name)
    kinds = _alternatives(inner, definitions)
    content = " or ".join(dict.fromkeys(_type_name(kind, definitions) for kind in kinds))
    return f"list of {content}" if name == "array" else f"map to {content}"


def _limits(schema: Mapping[str, Any]) -> Iterable[str]:
    yield from (f"{words} {schema[key]}" for key, words in _BOUNDS.items() if key in schema)
    if "enum" in schema or "const" in schema:
        yield ", ".join(str(value) for value in schema.get("enum", [schema.get("const")]))
    if "pattern" in schema:
        words = _CHOICES.fullmatch(schema["pattern"])
        yield words[1].replace("|", ", ") if words else f"matches {schema['pattern']}"


def _settings_table(title: str, settings: Mapping[str, Mapping[str, Any]]) -> Table:
    rows = [
        (
            name,
            clean(found["type"]),
            _default_text(found),
            clean(found.get("allowed", "")) or _UNSET,
            *([clean(found.get("help", "")) or _UNSET] if _has_help(settings) else []),
        )
        for name, found in settings.items()
    ]
    columns = ("setting", "type", "default", "allowed", *(["help"] if _has_help(settings) else []))
    return Table("settings", title, columns, "l" * len(columns), tuple(rows), empty="none")


def _has_help(settings: Mapping[str, Mapping[str, Any]]) -> bool:
    return any("help" in found for found in settings.values())


def _default_text(found: Mapping[str, Any]) -> str:
    if "default" not in found:
        return "must be given"
    value = found["default"]
    return str(value) if found["type"] == "format" else clean(print_value(value))


def _documentations(cls: type[Pass]) -> list[str]:
    """The pass's own text, then that of the classes between it and the base of all passes which have settings."""
    from compress.engine.layerpass import Pass

    between = [base for base in cls.__mro__[1:] if issubclass(base, Pass) and base is not Pass]
    own = [base for base in between if set(inspect.get_annotations(base)) & set(base.model_fields)]
    return [_documentation(cls), *(_documentation(base) for base in own if base.__doc__)]


def _documentation(cls: type[BaseModel]) -> str:
    # not inspect.getdoc, which hands down the base's text where a class has none
    return inspect.cleandoc(cls.__doc__ or "No description.")


def _shared_settings() -> Mapping[str, Any]:
    from compress.engine.layerpass import Pass

    return Pass.model_fields


def _shared_help() -> str:
    """The paragraph on settings of the base's docstring."""
    from compress.engine.layerpass import Pass

    found = re.search(r"^Settings: .*?(?=^[A-Z][\w ]*: |\Z)", _documentation(Pass), re.MULTILINE | re.DOTALL)
    return found[0].removeprefix("Settings: ").strip() if found else ""


def _walk(
    path: str,
    value: Any,
    facts: list[tuple[str, str]],
    figures: list[tuple[str, ...]],
    formats: dict[str, Sequence[FormatSupport]],
) -> None:
    """Sort a profile's fields, however deep, into facts, figures and lists of formats."""
    if isinstance(value, Figure):
        figures.append((path, f"{value.value:g}", value.state, clean(value.source, limit=600)))
    elif isinstance(value, BaseModel | Mapping):
        for name, item in value.items() if isinstance(value, Mapping) else value:
            _walk(f"{path}.{name}".strip("."), item, facts, figures, formats)
    elif isinstance(value, tuple) and value and isinstance(value[0], FormatSupport):
        formats[path] = value
    else:
        facts.append((path, clean(_plain(value), limit=600)))


def _plain(value: Any) -> str:
    if value is None or value in ("", ()):
        return "not set"
    return ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _widths(bits: Sequence[int]) -> str:
    """`2, 4, 8`, or `1 to 16` where none is left out of more than a few: a row is to stay a row."""
    whole = len(bits) > 4 and list(bits) == list(range(bits[0], bits[-1] + 1))
    return f"{bits[0]} to {bits[-1]}" if whole else ", ".join(map(str, bits))


def _format_table(name: str, entries: Sequence[FormatSupport]) -> Table:
    rows = tuple(
        (
            entry.use,
            _widths(entry.bits),
            entry.kernel or _UNSET,
            f"{entry.state} ({entry.evidence})",
            _plain(entry.blocks) if entry.blocks else _UNSET,
            clean(entry.note, limit=600) or _UNSET,
        )
        for entry in entries
    )
    columns = ("use", "bits", "kernel", "state", "blocks", "note")
    return Table("formats", name, columns, "llllll", rows, keys=2)


def _printed(tables: Iterable[Table]) -> str:
    """The tables as the terminal shows them, as plain text of its width."""
    from rich.console import Console

    from compress.report.terminal import print_table

    width = shutil.get_terminal_size().columns
    console = Console(file=io.StringIO(), width=width, color_system=None, force_terminal=False, legacy_windows=False)
    for table in tables:
        print_table(console, table)
    assert isinstance(console.file, io.StringIO)
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines()).strip("\n")
