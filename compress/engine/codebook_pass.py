"""What passes that put layers in learned codebooks have in common: a budget of bits, sharing, the layers' systems."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from compress.engine import backward
from compress.engine.blockpass import Block, BlockQuantPass, Changed
from compress.engine.codebook_pieces import bias_of, set_apart, stored_weight
from compress.engine.codebook_tasks import Task, held, notes_of, shared_notes, tasks_of
from compress.engine.in_turn import check_guided, check_mismatch, crossed, refuse_fixed
from compress.engine.layer_stats import Stat
from compress.engine.layerpass import Pass
from compress.engine.quantizing import FormatField
from compress.errors import UsageError
from compress.formats.base import Format
from compress.formats.codebook import Codebook
from compress.formats.codebook_choice import choose
from compress.layer import Layer, LayerKind, LayerSpec
from compress.maths.hessian import damped
from compress.models.model import Model
from compress.solve_vq import Coded


class CodebookPass(BlockQuantPass, ABC):
    """A pass that learns the codebooks of layers and their codes from second moments of their inputs.

    Settings: `format` a codebook, or `bits`: counted bits per weight, codes, codebooks and scales together, for which
    vector length, entries and stages are chosen by the shapes of the layers; `share`: `none`, or `block` where the
    layers of a block hold one codebook in common; `damp` of the second moments, as a share of their mean diagonal;
    `sequential`, `mismatch` and `guided` as in gptq (where layers are taken in turn, a shared codebook is learned from
    all of them before the first one's turn, with the inputs that they have in the block as it then is; in its turn each
    gets codes and scales); `beam` codes of all stages are chosen together, from so many candidates (1: one stage after
    the other).
    """

    needs: ClassVar[frozenset[Stat]] = frozenset({Stat.HESSIAN})
    kinds: ClassVar[frozenset[LayerKind]] = frozenset({LayerKind.LINEAR, LayerKind.EXPERT})
    any_dtype: ClassVar[bool] = True
    opaque: ClassVar[bool] = True
    shares: ClassVar[bool] = True
    fixed: ClassVar[frozenset[str]] = frozenset({"sequential", "share", "mismatch"})
    """Settings that no override may change, for they decide how data are collected; `fixed_shared`: nor these where a
    block shares its codebook."""
    fixed_shared: ClassVar[frozenset[str]] = frozenset({"beam"})

    format: FormatField = Codebook()
    bits: float | None = Field(default=None, gt=0, le=8)  # type: ignore[assignment]
    share: str = Field(default="none", pattern="^(none|block)$")
    damp: float = Field(default=0.05, gt=0, le=1)
    sequential: bool = True
    mismatch: float = Field(default=0.8, ge=0, le=1)
    guided: int = Field(default=0, ge=0)
    beam: int = Field(default=8, ge=1, le=256)

    @model_validator(mode="after")
    def _check_format(self) -> Self:
        if not isinstance(self.format, Codebook):
            raise UsageError(
                f"{self.name}: format={self.format} is no codebook. Give codebook(vector=8, entries=256, stages=2) or "
                "another, or use another pass: trellis for trellises, gptq for grids."
            )
        if self.format.axis == "out" and self.format.scale == "row":
            raise UsageError(
                f"{self.name}: in {self.format} the weights of a vector have scales of their own, by which codes are "
                "not chosen here. Give scale=column or scale=none."
            )
        if self.guided and (self.format.axis == "out" or self.format.scale == "column"):
            raise UsageError(
                f"{self.name}: guided={self.guided} decides groups of output rows apart, which {self.format} cannot, "
                "since its vectors or scales cross rows. Use a codebook along the inputs with scale=row or none, or "
                "set guided=0."
            )
        if self.guided and self.codebook.bias == "column":
            raise UsageError(
                f"{self.name}: guided={self.guided} decides groups of output rows apart, and a bias of columns is one "
                "for all rows. Use bias=row or none, or set guided=0."
            )
        if self.bits is not None and "format" in self.model_fields_set:
            raise UsageError(
                f"{self.name}: format={self.format} and bits={self.bits:g} contradict each other: bits chooses the "
                "codebook. Keep one of them."
            )
        if self.group_size is not None:
            raise UsageError(
                f"{self.name}: group_size is for integer formats. Write groups in the format, or give bits alone."
            )
        return self

    @model_validator(mode="after")
    def _check_order_of_work(self) -> Self:
        check_mismatch(self)
        for pattern, settings in self.overrides.items():
            check_guided(self.name, pattern, settings, self.guided)
            whole = self.fixed | (self.fixed_shared if self.share == "block" else frozenset())
            refuse_fixed(self.name, pattern, settings, whole)
        return self

    def _shortened(self, form: Format, short: Mapping[str, Any]) -> Format:
        return form

    def _inherited(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        given = super()._inherited(settings)
        dropped = {"bits": "format", "format": "bits"}
        return {name: value for name, value in given.items() if dropped.get(name) not in settings}

    @property
    def wants(self) -> frozenset[Stat]:
        return super().wants | crossed(self) | ({Stat.GUIDED} if self.guided else set())

    @property
    def row_groups(self) -> int:
        return self.guided

    def check(self, model: Model) -> None:
        if self.guided:
            backward.check(model)

    @property
    def in_turn(self) -> bool:
        return self.sequential

    @property
    def surveys(self) -> bool:
        return self.share == "block"

    @property
    def codebook(self) -> Codebook:
        """The format, as what it always is."""
        assert isinstance(self.format, Codebook)
        return self.format

    def settle(self, chosen: Mapping[str, tuple[Pass, LayerSpec]]) -> Mapping[str, Pass]:
        """The codebook that `bits` buys, and how many layers hold it: outside the blocks each has its own."""
        groups: dict[object, list[tuple[CodebookPass, LayerSpec]]] = {}
        for name, (item, spec) in chosen.items():
            assert isinstance(item, CodebookPass)
            alone = item.share == "none" or spec.segment < 0
            groups.setdefault(name if alone else (item.codebook, item.bits), []).append((item, spec))
        settled: dict[str, Pass] = {}
        for pairs in groups.values():
            first = pairs[0][0]
            form = first._choice([spec for _, spec in pairs])
            form = replace(form, share=len(pairs))
            settled |= {spec.name: item.model_copy(update={"format": form}) for item, spec in pairs}
        return settled

    def _choice(self, specs: Sequence[LayerSpec]) -> Codebook:
        """The codebook of layers that hold it in common. Raises: UsageError naming them where none is small enough."""
        if self.bits is None:
            return self.codebook
        try:
            return choose([spec.shape for spec in specs], self.bits, self.codebook)
        except UsageError as error:
            more = f" and {len(specs) - 1} more" if len(specs) > 1 else ""
            raise UsageError(f"{self.name}: {specs[0].name}{more}: {error}") from error

    @property
    def column_order(self) -> str:
        """See `solve.column_order`."""
        return "given"

    def counts(self, task: Task, start: Coded) -> Tensor:
        """What the squared error of each scaled weight counts where entries are learned, (out, in)."""
        return (start.hessian.diagonal() * start.scale.square()).expand_as(start.target)

    @abstractmethod
    def first_codes(self, task: Task, start: Coded, book: Tensor) -> Coded:
        """The layer with codes of the entries (groups, stages, entries, vector)."""

    @abstractmethod
    def improved(self, coded: Sequence[Coded], book: Tensor, fixed: bool) -> tuple[list[Coded], Tensor]:
        """Layers with codes, and entries, of less error. fixed: the entries stay."""

    def block(self, block: Block) -> Changed:
        groups: dict[str | Codebook, list[Task]] = {}
        for task in set_apart(tasks_of(block, _ours(block.chosen)), _solve):
            form = task.item.codebook
            groups.setdefault(task.layer.name if form.share == 1 else form, []).append(task)
        known = held(block)
        found: dict[str, Layer] = {}
        for key, tasks in groups.items():
            book = known.get(key)
            partners = {name: item for name, item in block.ahead.items() if getattr(item, "format", None) == key}
            if book is None and partners:
                book = _solve([*tasks, *set_apart(tasks_of(block, _ours(partners)), _solve)])[1].half()
            found |= {layer.name: layer for layer in _solved(tasks, book)}
        return Changed(found)


def _ours(chosen: Mapping[str, Pass]) -> dict[str, CodebookPass]:
    return {name: item for name, item in chosen.items() if isinstance(item, CodebookPass)}


def _solve(tasks: Sequence[Task], book: Tensor | None = None) -> tuple[list[Coded], Tensor]:
    """Layers with one codebook in common: learned from all where it is not given, codes layer by layer, then descent
    over all."""
    first = tasks[0].item
    starts = [_start(task) for task in tasks]
    chosen = _learned(tasks, starts) if book is None else book
    coded = [task.item.first_codes(task, start, chosen) for task, start in zip(tasks, starts, strict=True)]
    return first.improved(coded, chosen, fixed=book is not None)


def _solved(tasks: Sequence[Task], given: Tensor | None) -> list[Layer]:
    """The layers with codes, and the codebook that was learned before, if there is one."""
    coded, book = _solve(tasks, None if given is None else given.float())
    stored = book.half() if given is None else given
    notes = shared_notes(tasks)
    parts: dict[str, list[tuple[Task, Coded]]] = {}
    for task, each in zip(tasks, coded, strict=True):
        parts.setdefault(task.layer.name, []).append((task, each))
    found = []
    for pairs in parts.values():
        # `stored` is the one tensor that all holders of the codebook refer to
        task, packed = pairs[0][0], stored_weight(pairs, stored)
        own = notes_of(max((task for task, _ in pairs), key=lambda task: task.system.doubled))
        found.append(replace(task.layer, weight=packed, notes=(*own, *notes)))
    return found


def _start(task: Task) -> Coded:
    """The weight to come close to, and its first scales."""
    system, form, none = task.system, task.form, torch.empty(0, dtype=torch.int64)
    bias = bias_of(task)
    target = task.weight if bias is None else task.weight - bias
    return Coded(form, target, damped(system.hessian, system.damp), form.fit_scale(target), none, bias)


def _learned(tasks: Sequence[Task], starts: Sequence[Coded]) -> Tensor:
    """Codebooks (groups, stages, entries, vector) by k-means of the scaled weights of all layers."""
    pairs = zip(tasks, starts, strict=True)
    return starts[0].form.learn([(start.target / start.scale, task.item.counts(task, start)) for task, start in pairs])
