"""Caches of an engine or of its graph: inputs whose next values come out. They grow by the tokens that are read, or are
slots (compress/export/onnx/slots.py), which take so many tokens at once at most."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from compress.export.onnx.slot_session import AFTER, POSITION, STATE, positions_of
from compress.export.onnx.slots import reason
from compress.export.tensorrt.flavours import RTX
from compress.hwprofiles import Profile
from compress.kv.spec import KvSpec
from compress.target import Refusal

PAST, PRESENT = "past_key_values.", "present."
MOST_CHUNK = 3840
"""What TensorRT's TopK chooses at most, of the slots and of the new tokens: 1.7.1 does not build one of 3841, and does
not look where the number follows from a shape."""
ROWS = 4
"""Of tokens, of which slots are compared."""

Ids = NDArray[np.int64]


class Slots(NamedTuple):
    """What the ranges of a folder's inputs tell of its slots. chunk: tokens that are read at once; room: tokens before
    one is dropped; rounds: whether any are stored as codes."""

    chunk: int
    room: int
    rounds: bool


class Computes(Protocol):
    """What an engine and its graph in ONNX Runtime have in common. Values stay where they are computed."""

    main: str

    @property
    def slots(self) -> Slots | None:
        """Of its cache, None where it grows."""
        ...

    def tokens(self, ids: Ids, mask: Ids) -> dict[str, Any]:
        """Inputs but for the cache: ids (batch, length), mask (batch, past + length)."""
        ...

    def empty_cache(self, rows: int) -> dict[str, Any]:
        """Of no tokens."""
        ...

    def run(self, feeds: Mapping[str, Any]) -> Mapping[str, Any]:
        """Inputs → outputs by name."""
        ...

    def host(self, values: Any) -> NDArray[np.float32]:
        """A copy in this machine's memory."""
        ...


def refusal(specs: Sequence[KvSpec], profile: Profile) -> Refusal | None:
    """Why caches cannot be slots of an engine; None where they can."""
    sm = profile.gpu.sm if profile.gpu is not None else 0
    if RTX.runtime not in profile.runtimes or sm not in RTX.ahead:
        offered = ", ".join(map(str, RTX.ahead))
        why = f"slots were built by TensorRT-RTX only, which builds for SM {offered}, not for SM {sm} of {profile.id}"
        return Refusal(why, usage=False)
    found = dict.fromkeys(told for spec in specs if (told := reason(spec) or _chunk(spec)))
    return Refusal("; ".join(found)) if found else None


def _chunk(spec: KvSpec) -> str:
    if min(spec.chunk, spec.budget) <= MOST_CHUNK:
        return ""
    return f"chunk={spec.chunk} is more than TensorRT chooses among at once (TopK); give {MOST_CHUNK} or less"


def slots_of(ranges: Mapping[str, Any]) -> Slots | None:
    """By optimization profile: input → smallest, usual and largest shape; None for a cache that grows."""
    highest = [{name: spans[2] for name, spans in inputs.items()} for inputs in ranges.values()]
    held = {name: shape for name, shape in highest[0].items() if name.startswith(STATE)} if highest else {}
    if not held:
        return None
    room = min(shape[-1] for name, shape in held.items() if name.endswith(POSITION)) - 1
    chunk = max(inputs["input_ids"][1] for inputs in highest)
    return Slots(int(chunk), int(room), any(name.endswith("_scale") for name in held))


def inputs_of(ids: Ids, mask: Ids, slots: Slots | None) -> dict[str, Ids]:
    """Of a call, but for the cache: ids (batch, length), mask (batch, past + length). Slots take true positions, −1 for
    padding."""
    if slots is None:
        return {"input_ids": ids, "attention_mask": mask}
    return {"input_ids": ids, "position_ids": positions_of(ids, mask)}


def present(found: Mapping[str, Any], cache: Iterable[str]) -> dict[str, Any]:
    """What a call put out for the cache, as the next call's inputs."""
    return {name: found[name.replace(PAST, PRESENT).replace(STATE, AFTER)] for name in cache}


def is_after(name: str) -> bool:
    """Whether an output is the next value of a cache's input."""
    return name.startswith((PRESENT, AFTER))


def read(session: Computes, ids: Ids, mask: Ids, cache: dict[str, Any]) -> Iterator[Any]:
    """The logits of each call that ids (batch, length) take; mask (batch, seen + length); cache: the inputs that hold
    what was seen, changed in place."""
    count, seen = ids.shape[1], mask.shape[1] - ids.shape[1]
    most = session.slots.chunk if session.slots is not None else count
    for start in range(0, count, most):
        stop = min(start + most, count)
        found = session.run({**session.tokens(ids[:, start:stop], mask[:, : seen + stop]), **cache})
        cache.update(present(found, cache))
        yield found[session.main]


def one_by_one(session: Computes, ids: NDArray[Any]) -> NDArray[np.float32]:
    """Logits (batch, length, vocabulary) of tokens as they come in generating, so that what slots drop and round is in
    them."""
    cache, ones = session.empty_cache(len(ids)), np.ones(ids.shape, np.int64)
    steps = (read(session, ids[:, at : at + 1], ones[:, : at + 1], cache) for at in range(ids.shape[1]))
    return np.concatenate([session.host(found) for step in steps for found in step], axis=1)


def agree(session: Computes, exact: Any, ids: Ids, limit: float) -> tuple[bool, tuple[str, ...]]:
    """Whether slots compute what a row read at once gives, before anything is dropped or rounded, and a note.

    Args: exact: a session whose `logits` read whole rows; limit: largest difference as a share of the largest logit.
    """
    slots = session.slots
    assert slots is not None
    rows = ids[:ROWS, : min(slots.chunk, slots.room) if slots.rounds else slots.room]
    half = rows.shape[1] if slots.rounds else -(-rows.shape[1] // 2)
    cache, ones, found = session.empty_cache(len(rows)), np.ones(rows.shape, np.int64), []
    for start, stop in ((0, half), *((at, at + 1) for at in range(half, rows.shape[1]))):
        found += [session.host(each) for each in read(session, rows[:, start:stop], ones[:, :stop], cache)]
    expected = exact.logits(rows)
    apart = float(np.abs(np.concatenate(found, 1) - expected).max() / (np.abs(expected).max() or 1.0))
    told = f"slots against whole rows, before anything is dropped: largest relative difference {apart:.2g}"
    return apart <= limit, (f"{told} on {rows.size} positions (bound {limit:g})",)
