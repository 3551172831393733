"""The graphs of a folder against each other: the portable one, and those with GroupQueryAttention, slots or codes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from compress.export.onnx.growing_check import compare_rounded
from compress.export.onnx.growing_session import GrowingSession
from compress.export.onnx.runtime import PORTABLE, SHARED, SLOTS, Session
from compress.export.onnx.slot_session import SlotSession
from compress.target import Session as AnySession

TOKENS, PROMPT = 32, 16
ROWS = 4
"""Of tokens, of which slots are compared."""


def compare_graphs(
    session: AnySession, exact: AnySession, ids: NDArray[np.int64], limit: float, room: int
) -> tuple[bool, tuple[str, ...]]:
    """Whether the graph of `session` computes what the folder's other one does, and notes that tell by how much.

    Logits are compared teacher-forced, and greedy tokens as decoded through the caches, both without the kernels' own
    rounding. Tokens may part only where their margin is within the bound of both graphs.
    Args: session, exact: as verification loaded them; ids (rows, length); limit: largest relative difference of
    logits; room: positions that the model has. Nothing is compared where the folder has one graph.
    """
    assert isinstance(session, Session) and isinstance(exact, Session)
    if isinstance(session, SlotSession):
        return _compare_slots(SlotSession(session.folder, session.threads, exact=True), exact, ids, limit)
    if isinstance(session, GrowingSession):
        return compare_rounded(session.folder, exact, ids[:, :room], limit)
    if not session.is_decoder or not (session.folder / SHARED).is_file():
        return True, ()
    name = PORTABLE if session.shares_cache else SHARED
    other = Session(session.folder, session.threads, exact=True, graph=name)
    apart = _apart(exact, other, ids)
    prompt = ids[0, : max(1, min(PROMPT, room - 1))].tolist()
    count = min(TOKENS, room - len(prompt))
    first, second = exact.greedy(prompt, count), other.greedy(prompt, count)
    where = next((place for place, pair in enumerate(zip(first, second, strict=True)) if pair[0] != pair[1]), None)
    told = f"{session.graph} and {name}: largest relative difference {apart:.2g} on {ids.size} positions (bound "
    if where is None:
        return apart <= limit, (f"{told}{limit:g}), the same {count} greedy tokens",)
    margin = _margin(other, [*prompt, *first[:where]], (first[where], second[where]))
    note = f"greedy tokens part at {where}, margin {margin:.2g} of the largest logit"
    return apart <= limit and margin <= 2 * limit, (f"{told}{limit:g})", note)


def _compare_slots(
    slots: SlotSession, plain: Session, ids: NDArray[np.int64], limit: float
) -> tuple[bool, tuple[str, ...]]:
    """As far as nothing is dropped or rounded: while slots are free, where they hold floats; else the tokens of one
    call, which attend to each other before they are stored."""
    rows = ids[:ROWS, : slots.chunk if slots.rounds else slots.room]
    half = rows.shape[1] if slots.rounds else -(-rows.shape[1] // 2)
    cache, found = slots.cache(len(rows), 0), []
    for start, stop in ((0, half), *((at, at + 1) for at in range(half, rows.shape[1]))):
        found.append(cache.run(rows[:, start:stop], np.ones((len(rows), stop), np.int64)))
    expected = plain.logits(rows)
    apart = float(np.abs(np.concatenate(found, 1) - expected).max() / (np.abs(expected).max() or 1.0))
    told = f"{SLOTS} and {PORTABLE}, before anything is dropped: largest relative difference {apart:.2g}"
    return apart <= limit, (f"{told} on {rows.size} positions (bound {limit:g})",)


def _apart(first: Session, second: Session, ids: NDArray[np.int64]) -> float:
    """Largest difference of logits as a share of the largest logit; infinite where one is no number."""
    widest = scale = 0.0
    for row in ids:
        one, other = first.logits(row[None]), second.logits(row[None])
        difference = float(np.abs(one - other).max())
        widest = max(widest, difference if np.isfinite(difference) else np.inf)
        scale = max(scale, float(np.abs(one).max()))
    return widest / (scale or 1.0)


def _margin(session: Session, ids: Sequence[int], tokens: tuple[int, int]) -> float:
    """By how much two tokens differ after ids, as a share of the largest logit there."""
    last = session.logits(np.asarray([ids], np.int64))[0, -1]
    return float(abs(last[tokens[0]] - last[tokens[1]]) / (np.abs(last).max() or 1.0))
