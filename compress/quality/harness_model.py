"""A model in its runtime as lm-evaluation-harness asks it: likelihoods of texts and continuations, new text.

Nothing here imports the harness; `compress.quality.harness` hands it out as one of the harness's own models.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from compress.errors import InputError, UsageError
from compress.inputs.prompts import Reader
from compress.progress import Progress
from compress.runtime.generation import continue_prompts
from compress.runtime.sampling import Sampling
from compress.target import Runner, Session

NEW_TOKENS = 256
"""Of a continuation whose task does not say; the harness's own default."""
_COUNTS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_KNOWN = frozenset({*_COUNTS, "until", "do_sample", "temperature", "top_k", "top_p"})


class HarnessRequest(Protocol):
    """One request of the harness."""

    args: tuple[Any, ...]


class Answers:
    """Answers of one model, kept in a file, a line of JSON each, so that a run that was stopped goes on where it was.

    The file belongs to one model, runtime, precision, chat template and harness version: a request does not say which
    model it was put to, so a file that two share would give one the other's answers.
    """

    def __init__(self, path: Path | None) -> None:
        self._path, self._known = path, dict[str, Any]()
        if path is not None and path.is_file():
            for line in path.read_text(encoding="utf8").splitlines():
                try:
                    key, answer = json.loads(line)
                except ValueError:  # the line that a stopped run was writing
                    continue
                self._known[key] = answer

    def get(self, kind: str, args: Sequence[Any], make: Callable[[], Any]) -> Any:
        """The answer that is known, or else a new one."""
        text = json.dumps([kind, *args], sort_keys=True, ensure_ascii=True, default=str)
        key = hashlib.sha256(text.encode()).hexdigest()
        if key not in self._known:
            self._known[key] = make()
            if self._path is not None:
                with self._path.open("a", encoding="utf8") as file:
                    file.write(json.dumps([key, self._known[key]]) + "\n")
        return self._known[key]


class HarnessModel:
    """The three kinds of request, over a session (logits) and its runner (continuations)."""

    tokenizer_name = "compress"
    batch_size = 1

    def __init__(
        self, session: Session, runner: Runner, reader: Reader, answers: Answers, label: str, progress: Progress
    ) -> None:
        super().__init__()  # the harness's own class, where it is mixed in
        self._session, self._runner, self._reader = session, runner, reader
        self._answers, self._label, self._progress = answers, label, progress

    def loglikelihood(self, requests: Sequence[HarnessRequest], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Per (context, continuation): the continuation's log-probability, and whether it is the likeliest one."""
        return [(float(total), bool(greedy)) for total, greedy in self._answer("loglikelihood", requests, self._pair)]

    def loglikelihood_rolling(self, requests: Sequence[HarnessRequest], disable_tqdm: bool = False) -> list[float]:
        """Per (text,): its log-probability, each token with as much before it as the model reads."""
        return [float(total) for total in self._answer("loglikelihood_rolling", requests, self._rolling)]

    def generate_until(self, requests: Sequence[HarnessRequest], disable_tqdm: bool = False) -> list[str]:
        """Per (context, settings): what follows, up to a stop text."""
        return [str(text) for text in self._answer("generate_until", requests, self._generated)]

    def chat_template(self, chat_template: bool | str = False) -> str:
        """The tokenizer's own; empty where it has none."""
        found = getattr(self._reader.tokenizer, "chat_template", None)
        return found if isinstance(found, str) else ""

    def apply_chat_template(self, chat_history: Sequence[Mapping[str, str]], add_generation_prompt: bool = True) -> str:
        """A chat as the text that the model was trained on. Raises: UsageError without a template."""
        if not self.chat_template():
            raise UsageError(f"{self._reader.where} has no chat template. Leave --chat out.")
        return str(
            self._reader.tokenizer.apply_chat_template(
                [dict(message) for message in chat_history],
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        )

    def _answer(self, kind: str, requests: Sequence[HarnessRequest], make: Callable[..., Any]) -> list[Any]:
        found, name = [], f"{self._label}: {kind}"
        self._progress.tick(name, 0, len(requests))
        for place, request in enumerate(requests, 1):
            args = tuple(request.args)
            found.append(self._answers.get(kind, args, lambda args=args: make(*args)))  # type: ignore[misc]
            self._progress.tick(name, place, len(requests))
        return found

    def _pair(self, context: str, continuation: str) -> tuple[float, bool]:
        before, after = self._cut(context, continuation)
        if not after:
            raise InputError(f"A continuation has no token of its own: {continuation[:60]!r}.")
        ids = (before + after)[-self._reader.longest - 1 :]
        count = min(len(after), len(ids) - 1)
        if count < len(after):
            raise InputError(
                f"A continuation has {len(after)} tokens; the model has positions for {self._reader.longest}."
            )
        return self._scored(ids[:-1], after)

    def _cut(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Both as tokens, cut where the context's own tokens end; spaces between them belong to what follows."""
        if not context:
            first, after = self._first(), self._reader.encode(continuation, marks=False)
            return (after[:1], after[1:]) if after[:1] == [first] else ([first], after)
        bare = context.rstrip()
        continuation = context[len(bare) :] + continuation
        if not bare:
            return [self._first()], self._reader.encode(continuation, marks=False)
        before = self._reader.encode(bare)
        return before, self._reader.encode(bare + continuation)[len(before) :]

    def _rolling(self, text: str) -> float:
        ids, longest = self._reader.encode(text, marks=False), self._reader.longest
        whole, total = [self._first(), *ids], 0.0
        for start in range(0, len(ids), longest):
            end = min(len(ids), start + longest)  # tokens [start, end) of the text are [start + 1, end + 1) of `whole`
            total += self._scored(whole[max(0, end - longest) : end], ids[start:end])[0]
        return total

    def _scored(self, ids: Sequence[int], after: Sequence[int]) -> tuple[float, bool]:
        """Log-probability of tokens at the last places of (length,) ids, and whether each is the likeliest."""
        logits = self._session.logits(np.array([ids], np.int64))[0, -len(after) :].astype(np.float64)
        if not bool(np.isfinite(logits).all()):
            raise InputError(f"{self._label} puts out logits that are not finite, so nothing can be scored.")
        chosen = np.array(after)
        return float(_log_softmax(logits)[np.arange(len(chosen)), chosen].sum()), bool(
            (logits.argmax(-1) == chosen).all()
        )

    def _generated(self, context: str, settings: Mapping[str, Any]) -> str:
        unknown = sorted(set(settings) - _KNOWN)
        if unknown:
            raise UsageError(f"A task asks to generate with {', '.join(unknown)}. Known: {', '.join(sorted(_KNOWN))}.")
        given = settings.get("until") or []
        stops = [given] if isinstance(given, str) else list(given)
        count = next((int(settings[name]) for name in _COUNTS if settings.get(name) is not None), NEW_TOKENS)
        room = self._reader.longest - count
        if room < 1:
            raise UsageError(
                f"A task asks for {count} new tokens; the model has positions for {self._reader.longest} in all."
            )
        warm = float(settings.get("temperature") or 0.0) if settings.get("do_sample") else 0.0
        limits = (
            {"top_k": int(settings.get("top_k") or 0), "top_p": float(settings.get("top_p") or 1.0)} if warm else {}
        )
        ids = self._reader.encode(context)[-room:] or [self._first()]
        rows, _ = continue_prompts(
            self._runner,
            self._reader,
            [ids],
            count=count,
            sampling=Sampling(warm, **limits),  # type: ignore[arg-type]
            stops=[stop for stop in stops if stop],
        )
        return rows[0].text

    def _first(self) -> int:
        """What stands before a text that nothing precedes. Raises: UsageError."""
        begin = getattr(self._reader.tokenizer, "bos_token_id", None)
        marks = [*([] if begin is None else [int(begin)]), *self._reader.ends]
        if not marks:
            raise UsageError(
                f"{self._reader.where} has no token that begins or ends a text, so the first token of one cannot be "
                "scored."
            )
        return marks[0]


def _log_softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    shifted = logits - logits.max(-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(-1, keepdims=True)))
