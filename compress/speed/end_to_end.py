"""Whole requests of a baseline and a variant: text to text, text to embedding, image file to classes (design §7).

One request at a time. What a request is made of besides the model is the same code that `compress.load(OUT)` uses.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from compress.errors import UnsupportedError, UsageError
from compress.export import find as find_target
from compress.hwprofiles import Profile
from compress.inputs.array_input import ArrayInput, first_text
from compress.inputs.arrays import Arrays
from compress.inputs.datasets import Samples
from compress.inputs.documents import read_documents
from compress.inputs.images import SUFFIXES
from compress.inputs.pictures import ImageInput, read_pictures
from compress.inputs.prompts import Reader, read_reader
from compress.inputs.windows import Windows
from compress.models.model import Task
from compress.records.speed import END_TO_END, EndToEnd, SpanName, Speed
from compress.speed import disturbance
from compress.speed.measure import thread_count
from compress.speed.spans import AFTER, BEFORE, COMPUTE, Request, Stopwatch, end_to_end_record, time_requests
from compress.speed.timed_requests import encoder_request, image_request, rows_request, text_request
from compress.stats.intervals import MIN_ROUNDS
from compress.target import Runner, Session, Target

PROMPT_TOKENS, OUTPUT_TOKENS = 128, 16
FEWEST_REQUESTS = 3 * MIN_ROUNDS + 4
"""Rounds of baseline, variant and baseline again, after the warm-up."""
MOST_BUDGETS = 4
"""So many times the budget of a setting may be spent where requests are long."""
_OF_TEXT: Mapping[SpanName, str] = {
    BEFORE: "tokenization",
    COMPUTE: "the model: the prompt and each further token",
    AFTER: "choice of tokens, and tokens to text",
}
_OF_ENCODER: Mapping[SpanName, str] = {BEFORE: "tokenization", COMPUTE: "the model", AFTER: "pooling"}
_OF_ROWS: Mapping[SpanName, str] = {
    BEFORE: "tokenization",
    COMPUTE: "the model",
    AFTER: "the outputs apart",
}
_OF_IMAGE: Mapping[SpanName, str] = {
    BEFORE: "reading and decoding the file, and preprocessing",
    COMPUTE: "the model",
    AFTER: "choice of the class",
}


@dataclass(frozen=True)
class Material:
    """What a request begins with: the tokens whose text it is, an image file, or, of an ONNX graph of texts, a text.
    None of these: not known."""

    ids: tuple[int, ...] = ()
    picture: Path | None = None
    text: str = ""


@dataclass(frozen=True)
class _Plan:
    """A request in words, its spans in words, and the request of each arm."""

    what: str
    parts: Mapping[SpanName, str]
    requests: Mapping[str, Request]


def material_of(samples: Samples, source: str | Path | None) -> Material:
    """From the data that a run is judged by; images are files only where it is a folder."""
    if isinstance(samples, Windows):
        return Material(ids=tuple(samples.rows()[0].tolist()))
    if isinstance(samples, Arrays):
        return Material(text=first_text(source)) if source and samples.told else Material()
    return Material(picture=picture_of(source)) if source else Material()


def picture_of(source: str | Path) -> Path | None:
    """An image file, or that of median size in a folder; None where there is none."""
    path = Path(source)
    if path.is_file():
        return path if path.suffix.lower() in SUFFIXES else None
    files = [file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file()]
    files.sort(key=lambda file: (file.stat().st_size, str(file)))
    return files[len(files) // 2] if files else None


def read_material(source: str | Path, folder: Path, task: Task) -> Material:
    """What a user gives: an image file or a folder of them, or a text, of which the exported folder's tokenizer makes
    tokens. Raises: UsageError, InputError."""
    if task in (Task.IMAGE, Task.OUTPUTS):
        picture = picture_of(source)
        if picture is None:
            raise UsageError(f"{source} holds no image file. Allowed: {', '.join(SUFFIXES)}, or a folder of these.")
        return Material(picture=picture)
    if task.takes_rows:
        return Material(text=first_text(source))
    return Material(ids=tuple(read_reader(folder).text(read_documents(source)[0], str(source), truncate=True)))


def with_end_to_end(speed: Speed, measure: Callable[[], EndToEnd]) -> Speed:
    """The speed with what `measure` finds, or with the reason why it does not."""
    try:
        return speed.model_copy(update={"end_to_end": measure()})
    except (UnsupportedError, UsageError) as error:
        return speed.model_copy(update={"unavailable": {**speed.unavailable, END_TO_END: str(error)}})


def measure_end_to_end(
    baseline: Path,
    variant: Path,
    profile: Profile,
    task: Task,
    material: Material,
    *,
    seed: int = 0,
    budget_s: float,
) -> EndToEnd:
    """Paired whole requests of two exported folders.

    Raises: UnsupportedError where the target does not run requests here, where there is nothing to begin them with, or
    where they take too long for the budget; UsageError for a prompt that cannot be read.
    """
    target, threads = find_target(profile.target), thread_count(profile)
    folders = {"baseline": baseline, "variant": variant}
    make = _MAKERS.get(task, _of_text)
    sessions = {name: target.session(folder, threads) for name, folder in folders.items()}
    plan = make(target, sessions, folders, material)
    _require_short(plan.requests, budget_s)
    found = time_requests(plan.requests, seed=seed, budget_s=budget_s, watch=disturbance.watch())
    return end_to_end_record(found, plan.what, plan.parts)


def _of_text(target: Target, sessions: Mapping[str, Session], folders: Mapping[str, Path], material: Material) -> _Plan:
    reader = _tokenizing(folders["variant"])
    count = min(OUTPUT_TOKENS, max(1, reader.longest - 1))
    text = _text(reader, material.ids[: max(1, min(PROMPT_TOKENS, reader.longest - count))])
    tokens = len(reader.prompt(text))
    if tokens + count > reader.longest:  # a tokenizer may read its own text back as more tokens
        raise UnsupportedError(f"the text of the prompt is {tokens} tokens, after which {count} have no room")
    runners = _runners(target, sessions, folders)
    what = f"a text of {tokens} tokens in, {count} tokens as text out, batch 1"
    return _Plan(what, _OF_TEXT, {name: text_request(each, reader, text, count) for name, each in runners.items()})


def _of_encoder(
    target: Target, sessions: Mapping[str, Session], folders: Mapping[str, Path], material: Material
) -> _Plan:
    reader = _tokenizing(folders["variant"])
    text = _text(reader, material.ids[:PROMPT_TOKENS])
    tokens = len(reader.text(text, "The text", truncate=True))
    runners = _runners(target, sessions, folders)
    what = f"a text of {tokens} tokens in, one embedding out, batch 1"
    return _Plan(what, _OF_ENCODER, {name: encoder_request(each, reader, text) for name, each in runners.items()})


def _of_image(
    target: Target, sessions: Mapping[str, Session], folders: Mapping[str, Path], material: Material
) -> _Plan:
    if material.picture is None:
        raise UnsupportedError(
            "there is no image file to begin with: judge by a folder of images, or give one to `compress profile` with "
            "--input"
        )
    images, picture = ImageInput.read(folders["variant"]), material.picture
    images.prepare(read_pictures(picture, images.shape)[1])  # what cannot be read is told before anything is timed
    what = f"an image file of {picture.stat().st_size:,} bytes ({picture.name}) in, its class out, batch 1"
    return _Plan(what, _OF_IMAGE, {name: image_request(each, images, picture) for name, each in sessions.items()})


def _of_rows(target: Target, sessions: Mapping[str, Session], folders: Mapping[str, Path], material: Material) -> _Plan:
    if not material.text:
        raise UnsupportedError("there is no text to begin with: a request begins with one, of a model that takes texts")
    inputs = ArrayInput.read(folders["variant"])
    tokens = inputs.rows(material.text, truncate=True)[1].shape[1] // len(inputs.interface.inputs)
    what = f"a text of {tokens} tokens in, all outputs out, batch 1"
    return _Plan(what, _OF_ROWS, {name: rows_request(each, inputs, material.text) for name, each in sessions.items()})


_MAKERS = {
    **{Task.IMAGE: _of_image, Task.OUTPUTS: _of_image, Task.ENCODER: _of_encoder},
    **{Task.CLASSIFIER: _of_rows, Task.ARRAYS: _of_rows},
}


def _tokenizing(folder: Path) -> Reader:
    reader = read_reader(folder)
    if reader.tokenizer is None:
        raise UnsupportedError("the model has no tokenizer, so a request has no text")
    return reader


def _text(reader: Reader, ids: Sequence[int]) -> str:
    text = reader.decode(ids)
    if not text.strip():
        raise UnsupportedError("there is no text to begin with: give one to `compress profile` with --input")
    return text


def _runners(target: Target, sessions: Mapping[str, Session], folders: Mapping[str, Path]) -> dict[str, Runner]:
    make: Callable[[Session, Path], Runner] | None = getattr(target, "runner", None)
    if make is None:
        raise UnsupportedError(f"{target.RUNTIME} artifacts can be measured here but not used, so there is no request")
    return {name: make(session, folders[name]) for name, session in sessions.items()}


def _require_short(requests: Mapping[str, Request], budget_s: float) -> None:
    """Raises: UnsupportedError where the fewest requests would take several times the budget."""
    watch, longest_s = Stopwatch(time.perf_counter), 0.0
    for request in requests.values():
        request(watch)  # the first one may compile
        begun = time.perf_counter()
        request(watch)
        longest_s = max(longest_s, time.perf_counter() - begun)
    if FEWEST_REQUESTS * longest_s > MOST_BUDGETS * budget_s:
        wanted = math.ceil(FEWEST_REQUESTS * longest_s / MOST_BUDGETS)
        raise UnsupportedError(
            f"one request takes {longest_s:.2g} s, and {FEWEST_REQUESTS} of them are the least that an interval needs; "
            f"time it with compress profile OUT --budget {wanted}"
        )
