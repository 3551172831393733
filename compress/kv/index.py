"""An index over the keys of one head in host memory, searched for those with the largest products with a query.

By HNSW of faiss (extra `retrieval`) on inner products. Keys of a plain one are linked by what they are to each other;
queries are drawn otherwise than keys, so a search among keys goes astray. RetrievalAttention (Liu et al. 2024, arXiv
2409.10516, §3.2) links keys through queries instead: those that are nearest to the same query. faiss builds no such
graph, but lets links be written: half of the places in the lowest layer of its HNSW are filled so, the others keep what
it found among keys, and a key that none links gets one, so that keys which no query named stay within reach.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from compress import extras

Floats = NDArray[np.float32]
Ids = NDArray[np.int64]

_BLOCK = 256
"""Queries whose products with all keys are held at once."""


def library() -> Any:
    """faiss. Raises: UnsupportedError naming the extra."""
    return extras.load("faiss", "faiss, which searches keys,", "retrieval")


class KeyIndex:
    """Keys that stay as they are.

    Args: keys (count, size) float32; queries (queries, size) float32, by which they are linked, None for plain HNSW;
    links of a key, twice as many in the lowest layer; effort: keys that a search keeps in view.
    """

    def __init__(self, keys: Tensor, queries: Tensor | None, links: int, effort: int) -> None:
        self._faiss = library()
        self.count, size = keys.shape
        self.effort = effort
        self._graph = self._faiss.IndexHNSWFlat(size, links, self._faiss.METRIC_INNER_PRODUCT)
        self._graph.add(_array(keys))
        if queries is not None and len(queries):
            self._relink(linked(nearest(queries, keys, min(links, self.count)), self.count, links))

    def search(self, queries: Tensor, count: int) -> Tensor:
        """Of each query (queries, size) the keys found, (queries, count) int64; -1 where there are fewer."""
        params = self._faiss.SearchParametersHNSW(efSearch=max(self.effort, count))
        return torch.from_numpy(self._graph.search(_array(queries), count, params=params)[1])

    def _relink(self, fresh: Ids) -> None:
        """Put links before those of the lowest layer. fresh (count, links), -1 where there are fewer."""
        hnsw = self._graph.hnsw
        offsets = self._faiss.vector_to_array(hnsw.offsets).astype(np.int64)
        links = self._faiss.vector_to_array(hnsw.neighbors)
        where = offsets[:-1, None] + np.arange(hnsw.nb_neighbors(0))
        links[where] = reached(joined(fresh, links[where].astype(np.int64)))
        self._faiss.copy_array_to_vector(links, hnsw.neighbors)

    @property
    def nbytes(self) -> int:
        """Of its copy of the keys and of its links."""
        hnsw = self._graph.hnsw
        return self.count * (int(self._graph.d) * 4 + 8) + int(hnsw.neighbors.size()) * 4


def _array(states: Tensor) -> Floats:
    found: Floats = np.ascontiguousarray(states.float().cpu().numpy())
    return found


def nearest(queries: Tensor, keys: Tensor, count: int) -> Ids:
    """Exactly: of each query (queries, size) the keys (keys, size) with the largest products, the largest first,
    (queries, count)."""
    blocks = torch.split(queries, _BLOCK)
    best = [(block @ keys.T).topk(count, -1).indices for block in blocks]
    found: Ids = torch.cat(best).cpu().numpy()
    return found


def linked(lists: Ids, count: int, links: int) -> Ids:
    """Links of `count` keys through queries: the first key of each list with each other of it, both ways, those that
    most lists name first, (count, links) int64, -1 where there are fewer.

    As the projection of queries onto keys by RoarGraph (Chen et al. 2024, arXiv 2408.08933), without its pruning.
    lists (queries, keys) int64: of each query its nearest keys, the nearest first.
    """
    first = np.repeat(lists[:, 0], lists.shape[1] - 1)
    others = lists[:, 1:].reshape(-1)
    pairs, times = np.unique(np.concatenate([first * count + others, others * count + first]), return_counts=True)
    source, target = pairs // count, pairs % count
    order = np.lexsort((target, -times, source))
    source, target = source[order], target[order]
    starts = np.searchsorted(source, np.arange(count))
    rank = np.arange(len(source)) - starts[source]
    found = np.full((count, links), -1, np.int64)
    kept = rank < links
    found[source[kept], rank[kept]] = target[kept]
    return found


def joined(fresh: Ids, before: Ids) -> Ids:
    """Links (keys, wide) with some put before them (keys, narrow), each named once, as wide as before."""
    both = np.concatenate([fresh, before], 1)
    again = np.zeros(both.shape, bool)
    for place in range(1, both.shape[1]):
        again[:, place] = (both[:, :place] == both[:, place : place + 1]).any(1)
    both[again] = -1
    order = np.argsort(both < 0, axis=1, kind="stable")
    found: Ids = np.take_along_axis(both, order, 1)[:, : before.shape[1]]
    return found


def reached(links: Ids) -> Ids:
    """Links (keys, wide) with one more to each key that none links, from one that it links itself: in a free place, or
    the last that was not given away so."""
    found, wide = links.copy(), links.shape[1]
    degrees, given = (found >= 0).sum(1), np.zeros(len(found), np.int64)
    for key in np.flatnonzero(np.bincount(found[found >= 0], minlength=len(found)) == 0):
        near = links[key, links[key] >= 0]
        if not len(near):
            continue
        source = near[(degrees + given)[near].argmin()]
        is_full = degrees[source] == wide
        given[source] += is_full
        found[source, -given[source] if is_full else degrees[source]] = key
        degrees[source] += not is_full
    return found
