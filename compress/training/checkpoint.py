"""The state of a training, kept every few minutes and where the user stops it: the run goes on from there, to the same
bytes."""

from __future__ import annotations

import math
import pickle
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress.errors import Interrupted
from compress.files import beside, whole_file

STATE = "training.pt"
"""The file in the folder of a stage."""
MINUTES = 5.0
"""Between two writes; a kill loses at most that, Ctrl-C nothing."""


@dataclass
class Position:
    """How far a training has come.

    kept: copies of what is trained, at the least held-out loss so far; step: steps done; before: the loss at the start;
    best, best_step: the least, and when (0: at the start); misses: looks without a gain since; seconds: of training.
    """

    kept: list[Tensor]
    step: int = 0
    before: float = math.inf
    best: float = math.inf
    best_step: int = 0
    misses: int = 0
    seconds: float = 0.0

    def begin(self, state: Sequence[Tensor], loss: float) -> None:
        """Here is the start: of what came before nothing is kept."""
        self.before, self.best = loss, math.inf
        self.judge(state, loss)

    def judge(self, state: Sequence[Tensor], loss: float) -> None:
        """Keep the state where its held-out loss is the least so far."""
        self.misses = 0 if loss < self.best else self.misses + 1
        if loss < self.best:
            self.best, self.best_step = loss, self.step
            for own, tensor in zip(self.kept, state, strict=True):
                own.copy_(tensor.detach())


class Saved:
    """A file with the state of a training.

    key: what the training depends on; what was kept under another one is not taken up. minutes: between two writes,
    MINUTES by default.
    """

    def __init__(self, path: Path, key: str, minutes: float | None = None) -> None:
        self.path, self.key, self.minutes = path, key, MINUTES if minutes is None else minutes
        self._last = time.monotonic()

    def load(self, state: Sequence[Tensor], at: Position, descent: torch.optim.Optimizer) -> bool:
        """Put what was kept into the tensors, the position and the optimizer, if there is anything; else False."""
        if not self.path.is_file():
            return False
        try:
            # mapped, so that beside what it is copied into it takes no memory
            found: dict[str, Any] = torch.load(self.path, map_location="cpu", weights_only=True, mmap=True)
        except (RuntimeError, EOFError, pickle.UnpicklingError):  # of another version, or a damaged disk: begun anew
            return False
        if found.get("key") != self.key:
            return False
        for name, value in found["position"].items():
            if name != "kept":
                setattr(at, name, value)
        for own, value in zip([*state, *at.kept], [*found["state"], *found["position"]["kept"]], strict=True):
            own.detach().copy_(value)
        descent.load_state_dict(found["descent"])
        return True

    @contextmanager
    def when_stopped(self, state: Sequence[Tensor], at: Position, descent: torch.optim.Optimizer) -> Iterator[None]:
        """Write them where what is within is stopped by the user."""
        try:
            yield
        except Interrupted:
            self._write(state, at, descent)
            raise

    def keep(self, state: Sequence[Tensor], at: Position, descent: torch.optim.Optimizer) -> None:
        """Write them, if it is time. Raises: OSError for a full disk and the like."""
        if time.monotonic() - self._last >= 60 * self.minutes:
            self._write(state, at, descent)

    def _write(self, state: Sequence[Tensor], at: Position, descent: torch.optim.Optimizer) -> None:
        content = {
            "key": self.key,
            "position": vars(at),
            "state": [tensor.detach() for tensor in state],
            "descent": descent.state_dict(),
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(self.path) as place:
            torch.save(content, place)
        self._last = time.monotonic()

    def remove(self) -> None:
        """Once the training has been taken over, with what a kill left of a write."""
        self.path.unlink(missing_ok=True)
        beside(self.path).unlink(missing_ok=True)
