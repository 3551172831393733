"""One choice of tokens for all heads of a layer, by their vote."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from compress.kv import selection
from compress.kv.attention import attended
from compress.kv.select import SelectLayer


class TokenSelectLayer(SelectLayer):
    """TokenSelect (Wu et al. 2024, arXiv 2411.02886): one choice for all heads of a layer, by their soft vote; of
    several new tokens by their mean query. While a query is as the one that chose last, its choice holds, with what has
    left the newest since; after `recent` steps a new one is made all the same.

    asker (batch, heads · size): the query that chose last; choice (batch, slots then) bool; at (batch,): the position
    from which on tokens were new then.
    """

    def reset(self) -> None:
        super().reset()
        self.asker: Tensor | None = None
        self.choice: Tensor
        self.at: Tensor
        self.choices, self.reused = 0, 0

    def _selectively(
        self, query: Tensor, key: Tensor, value: Tensor, asked: Tensor, candidates: Tensor, scaling: float
    ) -> Tensor:
        mean = (query * asked[:, None, :, None]).sum(2) / asked.sum(1).clamp(min=1)[:, None, None].to(query.dtype)
        chosen = self._chosen(mean, candidates, scaling)
        self._recalled(mean, chosen[:, None], candidates, scaling)
        index, counts = selection.places((self.valid & ~candidates) | chosen)
        keys, values = self._with_new(index, key, value)
        return attended(query, keys, values, self._seen(counts, asked), scaling)[0]

    def _chosen(self, query: Tensor, candidates: Tensor, scaling: float) -> Tensor:
        """(batch, slots) bool."""
        asker, old = query.flatten(1).float(), self._earlier(query, candidates)
        self.choices += len(query)
        if old is not None and bool(old[1].all()):
            self.reused += len(query)
            return old[0]
        product = selection.products(query, self._keys(), scaling)
        vote = selection.votes(product, candidates)
        chosen = selection.elected(vote, candidates, self.position, self.spec.select, self.spec.page)
        at = self.count + 1 - self.spec.recent
        if old is not None and self.asker is not None:
            again = old[1][:, None]
            self.reused += int(again.sum())
            chosen, asker = torch.where(again, old[0], chosen), torch.where(again, self.asker, asker)
            at = torch.where(old[1], self.at, at)
        self.asker, self.choice, self.at = asker, chosen, at
        return chosen

    def _earlier(self, query: Tensor, candidates: Tensor) -> tuple[Tensor, Tensor] | None:
        """The choice that was made last (batch, slots) bool, and which rows may take it again (batch,)."""
        if not self.spec.reuse or self.asker is None:
            return None
        more = candidates.shape[1] - self.choice.shape[1]
        choice = functional.pad(self.choice, (0, more)) | (self.position >= self.at[:, None])
        alike = functional.cosine_similarity(query.flatten(1).float(), self.asker) >= self.spec.reuse
        recent = self.count + 1 - self.spec.recent - self.at < self.spec.recent
        return choice & candidates, alike & recent

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        if self.asker is not None:
            self.asker, self.choice = self.asker.index_select(0, indices), self.choice.index_select(0, indices)
            self.at = self.at.index_select(0, indices)

    def _beside(self) -> list[Tensor]:
        return [] if self.asker is None or not self.spec.reuse else [self.asker, self.choice, self.at]
