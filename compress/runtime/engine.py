"""An artifact in its runtime: generate text, classify images, encode texts. `compress.load(OUT)` makes one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from compress.errors import UsageError
from compress.inputs.array_input import ArrayInput
from compress.inputs.pictures import ImageInput, read_pictures
from compress.inputs.prompts import Message, Reader
from compress.models.embedding import Pool, pool_hidden
from compress.models.model import Task
from compress.runtime.generation import Continuation, Listener, Pace, continue_prompts, padded
from compress.runtime.sampling import Sampling
from compress.target import Placement, Runner, Session

Prompt = str | Sequence[int] | Sequence[Message]


@dataclass(frozen=True)
class Generated:
    """Continuations in the order of the prompts, how fast they came, and where they were made."""

    rows: tuple[Continuation, ...]
    pace: Pace
    placement: Placement

    @property
    def text(self) -> str:
        """What followed the first prompt."""
        return self.rows[0].text


@dataclass(frozen=True)
class Engine:
    """An artifact in its runtime. notes: what a user should know of how it was loaded."""

    folder: Path
    task: Task
    notes: tuple[str, ...]
    _session: Session = field(repr=False)
    _runner: Runner = field(repr=False)
    _reader: Reader | None = field(repr=False)
    _images: ImageInput | None = field(repr=False)
    _arrays: ArrayInput | None = field(default=None, repr=False)

    @property
    def placement(self) -> Placement:
        """Where it runs, read back from the runtime."""
        return self._runner.placement

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
        stop: str | Sequence[str] = (),
        stream: Listener | None = None,
    ) -> Generated:
        """Continue prompts: a text, token ids, a chat (a list of messages), or a list of these, which is one batch.

        Temperature 0 takes the likeliest token each time; else tokens are drawn, the same ones for the same seed and
        batch. stop: texts that end a row and are left out; stream: called with (row, piece of text) as text comes.
        Raises: UsageError for an encoder or classifier, settings outside their range, or a prompt that is empty, fills
        all positions or cannot be read.
        """
        if self.task is not Task.CAUSAL_LM or self._reader is None:
            raise UsageError(
                f"{self.folder} is a model of kind {self.task}; `generate` needs a language model. Use `predict`."
            )
        stops = (stop,) if isinstance(stop, str) else tuple(stop)
        if max_new_tokens < 1:
            raise UsageError(f"max_new_tokens={max_new_tokens}: allowed are numbers from 1.")
        if "" in stops:
            raise UsageError("A stop text is empty, which would end every text at once.")
        sampling = Sampling(temperature, top_k, top_p, seed)
        given = _batch(prompts)
        names = ["The prompt"] if len(given) == 1 else [f"Prompt {place}" for place in range(1, len(given) + 1)]
        ids = [self._reader.prompt(prompt, name) for prompt, name in zip(given, names, strict=True)]
        rows, pace = continue_prompts(
            self._runner,
            self._reader,
            ids,
            count=max_new_tokens,
            sampling=sampling,
            stops=stops,
            listener=stream,
        )
        return Generated(tuple(rows), pace, self.placement)

    def predict(
        self,
        inputs: str | Path | NDArray[Any] | Mapping[str, NDArray[Any]] | Sequence[str | Sequence[int]],
        *,
        pool: Pool = "mean",
        batch: int = 1,
        truncate: bool = False,
    ) -> NDArray[np.float32] | list[NDArray[np.float32]] | dict[str, NDArray[Any]]:
        """Logits (n, classes) of images, or what an encoder makes of texts; of an ONNX graph of other inputs than
        images all outputs by name, for texts, a file of them, an .npz, or arrays by name.

        Images: a file, a folder, an .npz, or an array (n, channels, h, w) of uint8 pixels or of floats as the model
        takes them. Texts: one, or a list of texts or token ids; pool "mean" (over the tokens) or "cls" (the first):
        (n, hidden); "none": one array (tokens, hidden) per text. batch: how many go through at once; where inputs are
        rounded per call (8-bit activations with dynamic scales) results depend on it a little.
        Raises: UsageError (a language model; what cannot be read or is too long, unless truncate), InputError.
        """
        if batch < 1:
            raise UsageError(f"batch={batch}: allowed are numbers from 1.")
        if self._images is not None:
            return self._classify(inputs, batch)
        if self._arrays is not None:
            return self.apply(inputs, batch, truncate)[1]
        self.require_encoder()
        assert self._reader is not None
        if isinstance(inputs, Path | np.ndarray | Mapping):
            raise UsageError(f"An encoder takes a text or a list of texts, not {type(inputs).__name__}.")
        texts = [inputs] if isinstance(inputs, str) else list(inputs)
        ids = [self._reader.text(text, f"Text {place}", truncate) for place, text in enumerate(texts, 1)]
        return self._encode(ids, pool, batch)

    @property
    def outputs(self) -> tuple[tuple[str, tuple[int, ...]], ...]:
        """Name and shape of each output for an image, of a model of images whose outputs are no classes."""
        return self._images.outputs if self._images is not None and self.task is Task.OUTPUTS else ()

    @property
    def takes_images(self) -> bool:
        """Whether it is an image classifier."""
        return self._images is not None

    @property
    def takes_arrays(self) -> bool:
        """Whether it is an ONNX graph of texts or arrays."""
        return self._arrays is not None

    def apply(self, inputs: Any, batch: int, truncate: bool = False) -> tuple[list[str], dict[str, NDArray[Any]]]:
        """Names of the inputs, and all outputs of such a graph. Where texts are filled up, outputs are zero."""
        assert self._arrays is not None
        names, rows = self._arrays.rows(inputs, truncate)
        parts = [self._session.logits(rows[start : start + batch]) for start in range(0, len(rows), batch)]
        return names, self._arrays.named(rows, np.concatenate(parts))

    def require_encoder(self) -> None:
        """Raises: UsageError where it does not make embeddings of texts."""
        if self.task is Task.CAUSAL_LM:
            raise UsageError(f"{self.folder} is a language model: it predicts tokens. Use `generate`.")
        if self.task is not Task.ENCODER:
            raise UsageError(f"{self.folder} is a model of kind {self.task}, which takes no texts.")

    def classify_files(self, source: str | Path, batch: int = 1) -> tuple[list[str], NDArray[np.float32]]:
        """Names and logits (n, classes) of the images of a file or folder. Raises: as `predict`."""
        if self._images is None:
            raise UsageError(f"{self.folder} is a model of kind {self.task}, which takes no images.")
        names, pixels = read_pictures(source, self._images.shape)
        return names, self._classify(pixels, batch)

    def _classify(self, inputs: Any, batch: int) -> NDArray[np.float32]:
        assert self._images is not None
        if isinstance(inputs, str | Path):
            _, inputs = read_pictures(inputs, self._images.shape)
        if not isinstance(inputs, np.ndarray) or inputs.shape[1:] != self._images.shape or not len(inputs):
            found = getattr(inputs, "shape", type(inputs).__name__)
            wanted = ", ".join(map(str, self._images.shape))
            raise UsageError(f"Images are {found}; a file, a folder, or an array (n, {wanted}) is taken.")
        values = self._images.prepare(inputs)
        parts = [self._session.logits(values[start : start + batch]) for start in range(0, len(values), batch)]
        return np.concatenate(parts)

    def _encode(self, ids: list[list[int]], pool: Pool, batch: int) -> NDArray[np.float32] | list[NDArray[np.float32]]:
        assert self._reader is not None
        if not ids:
            raise UsageError("No texts were given.")
        rows: list[NDArray[np.float32]] = []
        for start in range(0, len(ids), batch):
            tokens, mask = padded(ids[start : start + batch], self._reader.pad, left=False)
            rows += pool_hidden(self._runner.hidden(tokens, mask), mask, pool)
        return rows if pool == "none" else np.stack(rows)


def _batch(prompts: Any) -> list[Any]:
    """One prompt or several → a list of prompts. Raises: UsageError."""
    if isinstance(prompts, str):
        return [prompts]
    given = list(prompts)
    if not given:
        raise UsageError("No prompt was given.")
    is_one = all(isinstance(part, int | np.integer | Mapping) for part in given)
    batch = [given] if is_one else given
    wrong = next((each for each in batch if not _is_prompt(each)), None)
    if wrong is not None:
        raise UsageError(
            f"A prompt is a text, a list of token ids, or a chat (a list of messages), found {str(wrong)[:60]!r} of "
            f"type {type(wrong).__name__}."
        )
    return batch


def _is_prompt(given: Any) -> bool:
    if isinstance(given, str) or not isinstance(given, Sequence | np.ndarray):
        return isinstance(given, str)
    kinds = (Mapping,) if len(given) and isinstance(given[0], Mapping) else (int, np.integer)
    return all(isinstance(part, kinds) for part in given)
