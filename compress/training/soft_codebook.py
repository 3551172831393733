"""Weights in codebooks as functions of entries and scales that take gradients, and of codes to be chosen again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from compress.formats import codebook_columns
from compress.formats.base import QuantTensor, alike
from compress.formats.codebook import Codebook, Parts
from compress.layer import Layer
from compress.maths import codebooks
from compress.training.trainable import straight_through


class SoftCodebook:
    """One layer's weight as a function of its codebook's entries and a factor per scale; codes stay until `reencode`.

    book (groups, stages, entries, vector) float32, one tensor for all layers that hold it in common; factor, of the
    scales' shape. With factor 1 `weight` gives the layer's own values. Outlier columns, a bias and the order of columns
    stay as they are: `form`, `held` and `scale` are of the other columns.
    """

    def __init__(self, layer: Layer, book: Tensor) -> None:
        assert isinstance(layer.weight, QuantTensor) and isinstance(layer.weight.format, Codebook)
        self.layer, self.book = layer, book
        self.whole = layer.weight.format
        self.pieces = self.whole.pieces(layer.weight.tensors, layer.shape)
        main = self.pieces[-1]
        self.form = main.form
        self.held, _, self.scale = main.form.unpack(main.tensors, main.shape)
        self.fixed = [each.decode() for each in self.pieces[:-1]]
        self.factor = torch.ones_like(self.scale)

    def _parts(self) -> Parts:
        """As float16 will hold them, with the gradients of what was rounded."""
        scale = self.scale * self.factor
        book = straight_through(self.book.half().float(), self.book)
        return Parts(self.held, book, straight_through(scale.half().float(), scale))

    def weight(self) -> Tensor:
        """(out, in) float32."""
        main = self.pieces[-1]
        found = self.form.decode(self._parts(), main.shape)
        if not self.whole.extras:
            return found
        found = found if main.bias is None else found + main.bias
        return codebook_columns.assembled(self.pieces, [*self.fixed, found])

    def reencode(self, wish: Tensor, share: float, beam: int) -> None:
        """Choose the codes of the vectors that are furthest from `wish` (out, in) again, at most a `share` of them."""
        with torch.no_grad():
            parts, main = self._parts(), self.pieces[-1]
            _, books, scale = parts
            if self.whole.extras:
                wish = wish[:, main.columns] if main.bias is None else wish[:, main.columns] - main.bias
            far = (self.form.vectors(wish - self.form.decode(parts, main.shape)).square().sum(-1)).flatten()
            chosen = far.topk(max(1, int(share * len(far)))).indices
            chosen = chosen[far[chosen] > 0].sort().values
            units = self.held.shape[1]
            vectors = self.form.vectors(wish / scale).flatten(0, 1)[chosen]
            groups = chosen % units // (units // self.form.groups)
            flat = self.held.view(-1, self.form.stages)
            for place, book in enumerate(books):
                own = groups == place
                old, new = flat[chosen[own]], codebooks.assign(vectors[own], book, beam)
                misses = [(vectors[own] - codebooks.decode(each, book)).square().sum(1) for each in (old, new)]
                flat[chosen[own]] = torch.where((misses[1] < misses[0])[:, None], new, old)

    def rounded(self) -> Layer:
        """The layer with the entries and scales as they now are."""
        with torch.no_grad():
            _, book, scale = self._parts()
        main = self.pieces[-1]
        packed = self.form.pack(self.held.flatten(1), {"codebook": book, "scale": scale}, main.shape)
        if self.whole.extras:
            parts = [*self.pieces[:-1], main._replace(tensors=packed.tensors)]
            packed = QuantTensor(self.whole, codebook_columns.joined(self.whole, parts), self.layer.shape)
        return self.layer.with_weight(packed)


def soft_codebooks(layers: Iterable[Layer]) -> dict[str, SoftCodebook]:
    """Those layers that are in codebooks, by name; layers with the same stored entries train one tensor together."""
    books: list[tuple[Tensor, Tensor]] = []
    found = {}
    for layer in layers:
        weight = layer.weight
        if not isinstance(weight, QuantTensor) or not isinstance(weight.format, Codebook):
            continue
        stored, shared = weight.tensors["codebook"], weight.format.share > 1
        book = alike(stored, books) if shared else None
        if book is None:
            book = stored.float().clone()
            books += [(stored, book)] if shared else []
        found[layer.name] = SoftCodebook(layer, book)
    return found


def parted(soft: Mapping[str, SoftCodebook]) -> frozenset[str]:
    """Those whose entries other layers hold too: trained for some alone, they would be stored and counted anew."""
    holders = Counter(id(each.book) for each in soft.values())
    return frozenset(name for name, each in soft.items() if holders[id(each.book)] % each.form.share)
