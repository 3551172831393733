"""Recipes: YAML files of passes, calibration and quality settings; presets ship in `compress/recipes/`."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, ValidationError

from compress import defaults
from compress.errors import UsageError, nearest
from compress.export import TARGETS
from compress.hwprofiles.strict_yaml import parse_yaml
from compress.records import Record
from compress.spec import Call, parse_call, parse_pipeline

MAX_BYTES = 1 << 20
_short = reprlib.Repr()
_short.maxstring = _short.maxother = 80


class CalibrationSettings(Record):
    """`calibration:` of a recipe. dtype: of weights and activations while statistics are collected; bfloat16 takes half
    the memory, is faster on processors with units for it, and is how a bfloat16 checkpoint runs elsewhere."""

    data: str | None = None
    samples: int = Field(default=defaults.SAMPLES, ge=1)
    length: int = Field(default=defaults.LENGTH, ge=2)
    dtype: Literal["float32", "bfloat16"] = "float32"


class QualitySettings(Record):
    """`quality:` of a recipe. gates: metric → bound, judged at the worse end of the interval. generation: prompts
    that are continued by generation_tokens each and compared with the original (0: none)."""

    data: str | None = None
    samples: int | None = Field(default=None, ge=1)
    length: int = Field(default=defaults.LENGTH, ge=2)
    generation: int = Field(default=8, ge=0)
    generation_tokens: int = Field(default=32, ge=1)
    gates: dict[str, float] = Field(default_factory=dict)


class TaskSettings(Record):
    """`tasks:` of a recipe: labelled tasks of lm-evaluation-harness (extra `eval`). folder: of tasks of your own, whose
    code is run; chat: through the model's chat template; max_loss: a gate on every score."""

    names: tuple[str, ...] = Field(min_length=1)
    limit: int | None = Field(default=None, ge=1)
    folder: str | None = None
    chat: bool = False
    max_loss: float | None = Field(default=None, ge=0)


class Recipe(Record):
    """What to do to a model. `passes` is the one-line text; `also`: more passes, of the same text, for some export
    targets by name (a graph stores embeddings in 8 bits, say, where checkpoints keep them in float)."""

    name: str
    passes: str
    also: dict[str, str] = Field(default_factory=dict)
    calibration: CalibrationSettings = CalibrationSettings()
    quality: QualitySettings = QualitySettings()
    tasks: TaskSettings | None = None
    seed: int = Field(default=defaults.SEED, ge=0, lt=1 << 63)
    summary: str = ""

    def for_target(self, target: str) -> Recipe:
        """The recipe with the passes that it has for a target."""
        passes = [self.passes, *([self.also[target]] if target in self.also else [])]
        return self.model_copy(update={"passes": ", ".join(passes), "also": {}})


def presets() -> dict[str, Path]:
    """Shipped recipes by name."""
    folder = Path(str(files("compress") / "recipes"))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def load(name_or_path: str) -> Recipe:
    """A preset by name, or a recipe file.

    Raises: UsageError for an unknown preset, unknown key or wrong value, naming the nearest valid one.
    """
    path = Path(name_or_path)
    if not path.is_file():
        if name_or_path not in presets():
            raise UsageError(
                f"No recipe '{name_or_path}': neither a preset nor a file.{nearest(name_or_path, presets())}"
            )
        path = presets()[name_or_path]
    try:
        if path.stat().st_size > MAX_BYTES:
            raise UsageError(f"{path}: {path.stat().st_size} bytes; a recipe may have {MAX_BYTES} at most.")
        content = parse_yaml(path.read_text(encoding="utf8"))
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}.") from error
    except (yaml.YAMLError, ValueError) as error:
        raise UsageError(f"{path} is not YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(content, Mapping):
        raise UsageError(f"{path}: a recipe is a mapping with 'passes', found {type(content).__name__}.")
    return parse(content, path.stem, str(path))


def of_passes(text: str) -> Recipe:
    """A recipe from the one-line text of `--passes`."""
    calls = parse_pipeline(text)
    return Recipe(name="passes", passes=", ".join(call.text() for call in calls))


def parse(content: Mapping[str, Any], name: str, where: str) -> Recipe:
    """A recipe from parsed YAML. Raises: UsageError."""
    allowed = set(Recipe.model_fields) - {"name"}
    _check_keys(content, allowed, where)
    for section, record in (("calibration", CalibrationSettings), ("quality", QualitySettings)):
        if isinstance(content.get(section), Mapping):
            _check_keys(content[section], set(record.model_fields), f"{where}, {section}")
    if not content.get("passes"):
        raise UsageError(f"{where}: 'passes' is missing or empty. Give a list such as: passes: [gptq(bits=4)].")
    text = ", ".join(call.text() for call in _calls(content["passes"], where))
    also = content.get("also", {})
    if not isinstance(also, Mapping):
        raise UsageError(f"{where}: 'also' maps export targets to passes, found {_short.repr(also)}.")
    _check_keys(also, set(TARGETS), f"{where}, also")
    more = {str(target): ", ".join(call.text() for call in _calls(found, where)) for target, found in also.items()}
    try:
        return Recipe(**{**content, "name": name, "passes": text, "also": more})
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise UsageError(f"{where}: {place}={_short.repr(first['input'])}: {first['msg']}.") from error


def _check_keys(content: Mapping[str, Any], allowed: set[str], where: str) -> None:
    for key in content:
        if key not in allowed:
            raise UsageError(f"{where}: unknown key '{key}'.{nearest(str(key), allowed)}")


def _calls(passes: Any, where: str) -> list[Call]:
    if isinstance(passes, str):
        return list(parse_pipeline(passes))
    if not isinstance(passes, list):
        raise UsageError(f"{where}: 'passes' is a list or the one-line text, found {type(passes).__name__}.")
    return [_call(item, where) for item in passes]


def _call(item: Any, where: str) -> Call:
    """`gptq`, `gptq(bits=4)` or `{gptq: {bits: 4}}`."""
    if isinstance(item, str):
        return parse_call(item)
    if not isinstance(item, Mapping) or len(item) != 1:
        raise UsageError(f"{where}: each pass is a name or one name with its settings, found {_short.repr(item)}.")
    name, settings = next(iter(item.items()))
    if not isinstance(settings, Mapping | None):
        raise UsageError(f"{where}: the settings of {name} are a mapping, found {_short.repr(settings)}.")
    values = dict(settings or {})
    if isinstance(values.get("format"), str):
        values["format"] = parse_call(values["format"])
    return Call(str(name), (), values)
