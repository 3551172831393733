"""Whether a graph whose cache is in codes computes what the portable graph computes on the values of these codes.

Token by token, the portable graph gets as its past what the codes stand for. Where the graph attends to the token at
hand as it is stored (GroupQueryAttention), that token's value is in this past too, and its own key is hidden by the
mask. So the logits must be the same but for the arithmetic; and the keys and values that the portable graph computes
are what the codes were made of.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper
from torch import Tensor, from_numpy

from compress.export.onnx import cache_codes
from compress.export.onnx.cache import Concatenated, Shared
from compress.export.onnx.cache_codes import NAME, Codes
from compress.export.onnx.growing_session import GrowingSession
from compress.export.onnx.runtime import FACTS, PAST, PORTABLE, PRESENT, ROUNDED, SHARED, Session
from compress.kv.spec import KvSpec

Floats = NDArray[np.float32]
ROWS, TOKENS = 4, 48
CODES_APART = 1e-2
"""Of codes, the share that may be others than the nearest: values between two codes become either."""


class Apart(NamedTuple):
    """Largest difference of logits as a share of the largest logit; share of codes that are not the nearest ones, and
    the largest distance of one, in codes."""

    logits: float
    codes: float
    steps: float


def compare_rounded(folder: Path, plain: Session, ids: NDArray[np.int64], limit: float) -> tuple[bool, tuple[str, ...]]:
    """Whether the folder's graphs with codes agree with its portable one, and notes that tell by how much.

    Args: plain: of the portable graph; ids (rows, length); limit: largest relative difference of logits.
    """
    agrees, notes = True, []
    for name in (SHARED, ROUNDED):
        if not (folder / name).is_file():
            continue
        session = GrowingSession(folder, plain.threads, exact=True, graph=name)
        apart = _apart(session, plain, ids[:ROWS, :TOKENS])
        # a code that is off by one changes the values that are compared next, not whether they are read rightly
        agrees &= apart.logits <= limit and apart.steps <= 1 and apart.codes <= CODES_APART
        notes.append(
            f"{name} and {PORTABLE} on the values of its codes: largest relative difference {apart.logits:.2g} on "
            f"{ids[:ROWS, :TOKENS].size} positions (bound {limit:g}); {apart.codes:.2g} of the codes are not the "
            f"nearest, by up to {apart.steps:.0f}"
        )
    return agrees, tuple(notes)


def _apart(session: GrowingSession, plain: Session, ids: NDArray[np.int64]) -> Apart:
    rows, length = ids.shape
    cache, codes = session.cache(rows, length), stored(session)
    assert isinstance(cache, Concatenated | Shared)
    widest = scale = steps = 0.0
    others = count = 0
    before = {name: np.zeros((rows, *_empty(plain, name)), np.float32) for name in plain.cache_names}
    for at in range(length):
        logits = cache.run(ids[:, at : at + 1], np.ones((rows, at + 1), np.int64))
        after = {name: _decoded(name, cache, codes, at + 1) for name in plain.cache_names}
        past, mask = (after, [1] * (at + 1) + [0]) if session.shares_cache else (before, [1] * (at + 1))
        feeds = {
            "input_ids": ids[:, at : at + 1],
            "attention_mask": np.tile(np.array(mask, np.int64), (rows, 1)),
            **past,
        }
        found = dict(zip(plain.outputs, plain.session.run(None, feeds), strict=True))
        widest = max(widest, _largest(logits - found["logits"]))
        scale = max(scale, _largest(found["logits"]))
        for each, distance in _distances(cache, codes, found, at):
            others, count = others + int((each > 0).sum()), count + each.size
            steps = max(steps, distance)
        before = after
    return Apart(widest / (scale or 1.0), others / (count or 1), steps)


def _empty(plain: Session, name: str) -> tuple[int, int, int]:
    heads, size = plain.cache_shapes[name]
    return heads, 0, size


def _largest(values: Floats) -> float:
    """Infinite where one is no number, which a plain max would drop."""
    found = float(np.abs(values).max())
    return found if np.isfinite(found) else np.inf


def _decoded(name: str, cache: Concatenated | Shared, codes: dict[str, Codes], count: int) -> Floats:
    """What the first tokens of an input of the portable graph's cache are in the graph with codes."""
    held = cache.held(name)[:, :, :count]
    if name not in codes:
        return np.asarray(held, np.float32)
    own = cache.held(f"{name}_scale")[:, :, :count] if codes[name].fixed is None else None
    return codes[name].decoded(held, own)


def _distances(
    cache: Concatenated | Shared, codes: dict[str, Codes], found: dict[str, Floats], at: int
) -> Iterator[tuple[NDArray[np.float32], float]]:
    """By how many codes the token at hand is stored away from the nearest, and the largest of these."""
    for name, each in codes.items():
        states = found[name.replace(PAST, PRESENT)][:, :, -1:]
        own = cache.held(f"{name}_scale")[:, :, at : at + 1] if each.fixed is None else None
        held = each.steps(cache.held(name)[:, :, at : at + 1])
        half = 2 ** (each.bits - 1)
        nearest = np.clip(np.rint(states / each.spread(own)), -half, half - 1)
        distance = np.abs(held - nearest)
        yield distance, _largest(distance)


def stored(session: Session) -> dict[str, Codes]:
    """By input of the cache, what a graph holds in codes: from its metadata and its own scales."""
    document = onnx.load(str(session.folder / session.graph), load_external_data=False)
    facts = session.session.get_modelmeta().custom_metadata_map[FACTS]
    held = {each.name: each for each in document.graph.initializer}
    found: dict[str, Codes] = {}
    for layer, data in enumerate(json.loads(facts)):
        spec = KvSpec.from_data(data)
        tensors = {name: _flat(numpy_helper.to_array(held[f"{NAME}{layer}.{name}"])) for name in spec.wants}
        size = session.cache_shapes[f"{PAST}{layer}.key"][1]
        size *= 2 if session.cache_types[f"{PAST}{layer}.key"] is np.uint8 else 1
        codes = cache_codes.of_layer(spec, tensors, size, layer)
        found |= {f"{PAST}{layer}.{part}": each for part, each in codes.items()}
    return found


def _flat(scales: Floats) -> Tensor:
    """As a cache keeps them, (kv heads or 1, size or 1), of what a graph has."""
    return from_numpy((scales.reshape(1, 1) if scales.size == 1 else scales[0, :, 0]).copy())
