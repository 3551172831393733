"""prune_width: narrower feed-forwards, fewer groups of heads, a narrower residual stream, alike in each block."""

from __future__ import annotations

from math import lcm
from typing import ClassVar, Self

import torch
from pydantic import Field, model_validator

from compress.engine.layer_stats import Stat
from compress.engine.modelpass import Stage
from compress.engine.reshape import ReshapePass
from compress.errors import UnsupportedError, UsageError
from compress.maths import channels
from compress.models.edits import Shape
from compress.models.model import Model
from compress.wiring import widths
from compress.wiring.hidden_width import KEY, hidden_family
from compress.wiring.narrowing import WANTS, How, Narrowing, shape_of
from compress.wiring.widths import Family

MULTIPLES = (64, 32, 16, 8, 4, 2)
"""Widths stay multiples of the first of these that goes into them at least eight times."""


class PruneWidth(ReshapePass):
    """Narrower layers, the same in every block, so that a plain config.json says it and every runtime computes less.

    Feed-forward channels leave with their rows of gate and up and their column of down; a head of keys and values
    leaves with all query heads of its group, and heads keep their size; a channel of the residual stream leaves with
    all that reads or writes it, embedding and head included. Which tensors these are is read off the module tree built
    with the smaller number in its config, and every block is run narrowed beside the same block with zeros in place of
    what is cut: an architecture that reads the channels elsewhere too is refused. What a block's layers lose, those
    after them are calibrated with.

    Settings: `ffn` share of the feed-forward channels to remove, or `ffn_size` how many stay; `kv_groups` how many
    groups of heads to remove, or `kv_heads` how many stay (heads of keys and values; without grouped heads, heads);
    `hidden` share of the residual stream to remove, or `hidden_size` how much stays, of decoders with RMSNorms; with
    none of them a quarter of the feed-forward. `by` which channels stay: `obs` those whose loss the rest could least
    make up for, one after the other (Optimal Brain Surgeon for whole columns, Kurtic et al. 2023, arXiv 2302.04089; in
    the stream as `wanda`), `wanda` those that put out most alone, `activation` those of largest mean |input|
    (Muralidharan et al. 2024, arXiv 2407.14679 §2.2), `magnitude` those of largest weights (in the stream as `wanda`);
    `refit` whether the layers that read them are solved for again by least squares (by=magnitude and refit=false need
    no data, but for the stream); `damp` share of the mean diagonal added to the second moments; `multiple` what new
    widths of feed-forward and stream are multiples of (by default the largest power of two up to 64 that goes into the
    old one at least eight times, of the stream one of the heads too).
    """

    name: ClassVar[str] = "prune_width"

    ffn: float | None = Field(default=None, ge=0, lt=1)
    ffn_size: int | None = Field(default=None, ge=1)
    kv_groups: int | None = Field(default=None, ge=0)
    kv_heads: int | None = Field(default=None, ge=1)
    hidden: float | None = Field(default=None, ge=0, lt=1)
    hidden_size: int | None = Field(default=None, ge=1)
    by: channels.Score = "obs"
    refit: bool = True
    damp: float = Field(default=0.01, gt=0, le=1)
    multiple: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _check(self) -> Self:
        for share, size in (("ffn", "ffn_size"), ("kv_groups", "kv_heads"), ("hidden", "hidden_size")):
            if getattr(self, share) is not None and getattr(self, size) is not None:
                raise UsageError(
                    f"{self.name}: {share} says how much goes and {size} how much stays. Keep one of them."
                )
        sizes = {"ffn_size", "kv_groups", "kv_heads", "hidden_size"} & self.model_fields_set
        if self.multiple is not None and self.ffn is None and self.hidden is None and sizes:
            raise UsageError(
                f"{self.name}: multiple={self.multiple} rounds what a share leaves (ffn, hidden), and none is given "
                "here. Leave it out."
            )
        return self

    @property
    def wants(self) -> frozenset[Stat]:
        hidden = self.hidden is not None or self.hidden_size is not None
        return WANTS if self.refit or self.by != "magnitude" or hidden else frozenset()

    def check(self, model: Model) -> None:
        if model.image is not None:
            raise UnsupportedError(
                f"{self.name} narrows transformers, whose config says how wide they are. For convolutions there is "
                "prune_channels."
            )

    def shape(self, model: Model) -> Shape:
        return shape_of(model, self.families(model))

    def families(self, model: Model) -> list[Family]:
        """What becomes narrower, and by how much. Raises: UsageError, UnsupportedError."""
        try:
            found = [one for one in (self._heads(model), self._hidden(model)) if one is not None]
            if not found or self.ffn is not None or self.ffn_size is not None:
                found += self._feed_forwards(model)
            self._refuse_unbuildable(model, found)
            return found
        except (UsageError, UnsupportedError) as error:
            raise type(error)(f"{self.name}: {error}") from error

    def _refuse_unbuildable(self, model: Model, found: list[Family]) -> None:
        shape = shape_of(model, found)
        reason = widths.unbuildable(model, shape)
        if not reason:
            return
        now, groups = widths.heads_of(model), [one for one in found if one.key == widths.HEADS]
        others = [
            str(left)
            for left in range(1, now + 1)
            if groups and not widths.unbuildable(model, shape_of(model, [*found, widths.heads(model, left)]))
        ]
        hint = f"kv_heads that it takes: {', '.join(others)}." if others else "Choose another hidden_size."
        raise UsageError(f"'{model.config.model_type}' cannot be of this shape ({shape.config}): {reason} {hint}")

    def _heads(self, model: Model) -> Family | None:
        if self.kv_groups is None and self.kv_heads is None:
            return None
        units = widths.heads_of(model)
        kept = self.kv_heads if self.kv_heads is not None else units - (self.kv_groups or 0)
        if not 1 <= kept <= units:
            raise UsageError(
                f"{self._text('kv_groups', 'kv_heads')} leaves {kept} of {units} heads of keys and values. Allowed: "
                f"kv_groups from 0 to {units - 1}, kv_heads from 1 to {units}."
            )
        return widths.heads(model, kept)

    def _feed_forwards(self, model: Model) -> list[Family]:
        found = widths.feed_forwards(model)
        if not found:
            raise UnsupportedError(
                f"no number in the config of '{model.config.model_type}' is the width of its feed-forwards alone "
                f"(looked for: {', '.join(widths.FEED_FORWARD)})."
            )
        if self.ffn_size is not None and len(found) > 1:
            raise UsageError(f"ffn_size is one of {', '.join(one.key for one in found)}. Give a share instead (ffn).")
        return [widths.kept_of(one, self._left(one)) for one in found]

    def _hidden(self, model: Model) -> Family | None:
        if self.hidden is None and self.hidden_size is None:
            return None
        size = int(model.config.get_text_config().hidden_size)
        heads = widths.query_heads_of(model)  # of which configs want a multiple
        return hidden_family(model, self.hidden_size or self._rounded("hidden", KEY, size, self.hidden or 0.0, heads))

    def _left(self, family: Family) -> int:
        if self.ffn_size is not None:
            return self.ffn_size
        return self._rounded("ffn", family.key, family.units, 0.25 if self.ffn is None else self.ffn)

    def _rounded(self, name: str, key: str, size: int, share: float, factor: int = 1) -> int:
        """How much stays of a width. Raises: UsageError where that is all or nothing of it."""
        steps = [lcm(step, factor) for step in MULTIPLES]
        multiple = self.multiple or next((step for step in steps if size % step == 0 and size >= 8 * step), factor)
        kept = round(size * (1 - share) / multiple) * multiple
        if share and not 0 < kept < size:
            raise UsageError(
                f"{name}={share:g} of {key}={size} rounds to {'all' if kept <= 0 else 'none'} of it, what stays "
                f"being a multiple of {multiple}. Choose another share, or multiple=."
            )
        return kept if share else size

    def _text(self, *names: str) -> str:
        return next(f"{name}={getattr(self, name)}" for name in names if getattr(self, name) is not None)

    def apply(self, stage: Stage) -> None:
        with torch.no_grad():
            how = How(self.name, str(self), self.by, self.refit, self.damp)
            Narrowing(how, stage, self.families(stage.model)).run()
