"""Read profiles: those shipped in this folder by id, a user's own by path."""

from __future__ import annotations

import hashlib
import json
import reprlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from compress.hwprofiles.schema import Profile, ProfileError, nearest
from compress.hwprofiles.strict_yaml import parse_yaml

FOLDER = Path(__file__).resolve().parent
PARTS = FOLDER / "parts"
# what `like` takes over beside runtimes, where the file has no such key itself
INHERITED = ("isa", "target", "grid")
MAX_BYTES = 1 << 20
SHOWN_ERRORS = 5

_short = reprlib.Repr()
_short.maxlevel = 2


def names() -> tuple[str, ...]:
    """Ids of the shipped profiles."""
    return tuple(sorted(path.stem for path in FOLDER.glob("*.yaml")))


def load(path_or_id: str | Path) -> Profile:
    """A shipped profile by its id, or the profile in a `.yaml` file."""
    text = str(path_or_id)
    if text in names():
        return _read(FOLDER / f"{text}.yaml", _shipped)
    path = Path(path_or_id)
    if path.suffix not in {".yaml", ".yml"} and len(path.parts) <= 1 and not path.is_file():
        raise ProfileError(
            f"Unknown hardware profile '{text}'.{nearest(text, names())} Or give the path of a .yaml file of your own."
        )
    return _read(path, contents)


def digest(profile: Profile) -> str:
    """SHA-256 of everything the profile says, whichever file it came from."""
    text = json.dumps(profile.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _read(path: Path, look: Callable[[Path], dict[Any, Any]]) -> Profile:
    found = look(path)
    try:
        return Profile.model_validate(found)
    except ValidationError as error:
        problems = sorted(error.errors(include_url=False), key=lambda each: each["type"] != "extra_forbidden")
        more = f"; and {len(problems) - SHOWN_ERRORS} more" if len(problems) > SHOWN_ERRORS else ""
        told = "; ".join(_sentence(each) for each in problems[:SHOWN_ERRORS])
        raise ProfileError(f"Hardware profile {path}: {told}{more}") from None


def contents(path: Path) -> dict[Any, Any]:
    """What a file says, with what it leaves to the profiles and parts that its key `like` names."""
    found = _mapping(path)
    given = found.pop("like", [])
    runtimes: dict[Any, Any] = {}
    for name in given if isinstance(given, list) else [given]:
        source = _source(path, name)
        runtimes |= source.get("runtimes", {})
        found = {**{key: source[key] for key in INHERITED if key in source}, **found}
    own = found.get("runtimes", {})
    if not runtimes or not isinstance(own, dict):
        return found
    return {**found, "runtimes": {**own, **{name: runtimes[name] for name in runtimes if name not in own}}}


def _source(path: Path, name: object) -> dict[Any, Any]:
    """A shipped profile or part by its id. Those of a part are runtimes alone."""
    parts = tuple(sorted(part.stem for part in PARTS.glob("*.yaml")))
    if name not in (*names(), *parts):
        raise ProfileError(
            f"Hardware profile {path}: like: found {_short.repr(name)}.{nearest(str(name), (*names(), *parts))}"
        )
    return _shipped((PARTS if name in parts else FOLDER) / f"{name}.yaml")


@cache
def _shipped(path: Path) -> dict[Any, Any]:
    """The same of a file of ours, read once: many profiles are like another. Nobody changes what it holds."""
    return contents(path)


def _mapping(path: Path) -> dict[Any, Any]:
    found = _parse(path)
    if not isinstance(found, dict):
        raise ProfileError(f"Hardware profile {path}: a mapping of keys is expected, found {_short.repr(found)}")
    return found


def _parse(path: Path) -> object:
    try:
        if path.exists() and not (path.is_file() or path.is_dir()):
            raise ProfileError(f"Hardware profile {path}: it is no regular file")
        if path.is_file() and path.stat().st_size > MAX_BYTES:
            raise ProfileError(f"Hardware profile {path}: {path.stat().st_size} bytes, at most {MAX_BYTES} are read")
        return parse_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ProfileError(f"Hardware profile {path}: {error.strerror or error}") from error
    except (yaml.YAMLError, ValueError) as error:
        if isinstance(error, ProfileError):
            raise
        raise ProfileError(f"Hardware profile {path} is not YAML: {' '.join(str(error).split())}") from error


def _sentence(problem: ErrorDetails) -> str:
    """`memory.bandwith_gb_s: unknown key. Did you mean …` or `kind: found 'tpu': Input should be 'cpu', …`."""
    where = ".".join(map(str, problem["loc"])) or "the file"
    if problem["type"] == "extra_forbidden":
        allowed = tuple(_model_at(problem["loc"]).model_fields)
        return f"{where}: unknown key.{nearest(str(problem['loc'][-1]), allowed)}".removesuffix(".")
    if problem["type"] == "missing":
        return f"{where}: this key is missing"
    rule = problem["msg"].removeprefix("Value error, ").replace("valid tuple", "list")
    return f"{where}: found {_short.repr(problem['input'])}: {rule}"


def _model_at(loc: tuple[int | str, ...]) -> type[BaseModel]:
    """The record that holds the last key of `loc`; list positions and the keys of dictionaries are passed over."""
    model: type[BaseModel] = Profile
    for part in loc[:-1]:
        field = model.model_fields.get(str(part))
        model = (field and _model_in(field.annotation)) or model
    return model


def _model_in(annotation: object) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for arg in get_args(annotation) if (found := _model_in(arg))), None)
