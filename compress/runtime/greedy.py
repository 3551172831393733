"""The likeliest continuation of one prompt, whatever computes the logits.

Imports numpy only: what measures the memory of an exported folder reads it too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]
Step = Callable[[Ids, Ids], Any]
"""New tokens (1, new), mask of all so far (1, seen) → logits (vocabulary,) after the last, an array or a tensor."""


def greedy(step: Step, prompt: Sequence[int], count: int, stop: Sequence[int] = ()) -> list[int]:
    """At most `count` tokens after a prompt, the most likely one each time; ends after one of `stop`. step: keeps what
    it has seen; it is called with the whole prompt first, then with one token at a time."""
    ids, tokens = np.asarray([list(prompt)], np.int64), list[int]()
    while len(tokens) < count:
        tokens.append(int(step(ids, np.ones((1, len(prompt) + len(tokens)), np.int64)).argmax()))
        if tokens[-1] in stop:
            break
        ids = np.asarray([tokens[-1:]], np.int64)
    return tokens
