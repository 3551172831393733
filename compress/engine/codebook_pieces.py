"""Layers whose codebook takes outlier columns apart, or sorts columns: cut into what plain solvers take, and joined."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from torch import Tensor

from compress.engine.codebook_tasks import Task
from compress.formats import codebook_columns
from compress.formats.base import QuantTensor
from compress.formats.codebook import Codebook
from compress.formats.codebook_columns import Piece
from compress.maths.hessian import damped
from compress.solve import System
from compress.solve_vq import Coded

Solve: TypeAlias = Callable[[Sequence[Task]], tuple[list[Coded], Tensor]]
# What a system is damped by once more that is made of a damped one: what rounding may take from it.
SAFE = 1e-6


@dataclass(frozen=True)
class Apart:
    """Of a layer, or a run of its rows: order (in,) int64 of its columns, and its outlier columns with codes and
    entries (1, 1, entries, vector); None where there are none, which the task of the outliers itself has too."""

    order: Tensor
    coded: Coded | None = None
    book: Tensor | None = None


@dataclass(frozen=True)
class _Split:
    """Of the inputs of a layer: the systems of outlier columns (None without any) and of the others. While outliers
    are decided the others are free to make up for what they lack, by `across` (outliers, others)."""

    whole: System
    order: Tensor
    outliers: System | None
    others: System
    across: Tensor

    @classmethod
    def of(cls, task: Task, order: Tensor) -> _Split:
        """Args: order: see `codebook_columns.ordered`."""
        form, turn = task.item.codebook, task.item.column_order
        hessian = damped(task.system.hessian, task.system.damp)[order][:, order]
        count = codebook_columns.outlier_count(form, len(order))
        rest, cross = hessian[count:, count:], hessian[count:, :count]
        others = System.of(rest.contiguous(), SAFE, form.main.step, turn)
        if not count:
            return cls(task.system, order, None, others, cross.T)
        root = torch.linalg.cholesky(rest.double())
        across = torch.cholesky_solve(cross.double(), root).T
        own = (hessian[:count, :count].double() - across @ cross.double()).float()
        outliers = System.of((own + own.T) / 2, SAFE, codebook_columns.outlier_form(form).step, turn)
        return cls(task.system, order, outliers, others, across.float())


def bias_of(task: Task) -> Tensor | None:
    """The bias that a task starts with, as float16 holds it: that of rows is not one of outlier columns."""
    form = task.item.codebook
    outliers = form.outliers and (task.apart is None or task.apart.book is None)
    return None if form.bias == "row" and outliers else form.fit_bias(task.weight)


def set_apart(tasks: Sequence[Task], solve: Solve) -> list[Task]:
    """The tasks with outlier columns decided, each layer's with entries of their own, by second moments of what the
    other columns cannot make up for; what is left to do of each is the other columns, which are to make up for what
    outliers lack. A layer whose codebook leaves columns as they are is returned as it is."""
    splits: dict[tuple[int, Codebook, bytes], _Split] = {}
    layers: dict[str, list[tuple[Task, _Split]]] = {}
    found: list[Task] = []
    for task in tasks:
        form = task.item.codebook
        if not form.only_learned:
            found.append(task)
            continue
        order = codebook_columns.ordered(form, _importance(task))
        key = id(task.system), replace(form, share=1), order.numpy().tobytes()
        if key not in splits:
            splits[key] = _Split.of(task, order)
        layers.setdefault(task.layer.name, []).append((task, splits[key]))
    for pairs in layers.values():
        found += _others(pairs, solve)
    return found


def _importance(task: Task) -> Tensor:
    """(in,): the second moments of the layer's inputs, whatever the rows."""
    hessian = task.stats.hessian
    return torch.ones(task.layer.shape[1]) if hessian is None else hessian.diagonal()


def _others(pairs: Sequence[tuple[Task, _Split]], solve: Solve) -> list[Task]:
    """What is left to do of a layer once its outliers are decided."""
    if pairs[0][1].outliers is None:
        return [_left(task, split, task.weight[:, split.order], Apart(split.order)) for task, split in pairs]
    own = []
    for task, split in pairs:
        assert split.outliers is not None
        form, count = codebook_columns.outlier_form(task.item.codebook), len(split.across)
        weight = task.weight[:, split.order[:count]]
        own.append(replace(task, system=split.outliers, weight=weight, form=form, apart=Apart(split.order)))
    coded, book = solve(own)
    found = []
    for (task, split), one in zip(pairs, coded, strict=True):
        count = len(split.across)
        lack = one.target - one.unit(book) * one.scale
        weight = task.weight[:, split.order[count:]] + lack @ split.across
        found.append(_left(task, split, weight, Apart(split.order, one, book)))
    return found


def _left(task: Task, split: _Split, weight: Tensor, apart: Apart) -> Task:
    return replace(task, system=split.others, weight=weight, apart=apart)


def stored_weight(pairs: Sequence[tuple[Task, Coded]], book: Tensor) -> QuantTensor:
    """The runs of rows of one layer as its format stores them. book: float16, of the columns that are no outliers."""
    task = pairs[0][0]
    form, rows = task.item.codebook, task.layer.shape[0]
    main = [each for _, each in pairs]
    if not form.extras:
        return QuantTensor(form, _tensors(main, book, rows), task.layer.shape)
    order = torch.arange(task.layer.shape[1]) if task.apart is None else task.apart.order
    count = codebook_columns.outlier_count(form, len(order))
    parts = [_piece(main, book, order[count:], rows)]
    aside = [(each.apart.coded, each.apart.book) for each, _ in pairs if each.apart is not None]
    if count:
        outliers = [one for one, _ in aside if one is not None]
        own = aside[0][1]
        assert own is not None
        parts.insert(0, _piece(outliers, own, order[:count], rows))
    return QuantTensor(form, codebook_columns.joined(form, parts), task.layer.shape)


def _piece(coded: Sequence[Coded], book: Tensor, columns: Tensor, rows: int) -> Piece:
    biases = [each.bias for each in coded if each.bias is not None]
    bias = None if not biases else torch.cat(biases) if len(biases[0]) > 1 or biases[0].shape[1] == 1 else biases[0]
    return Piece(coded[0].form, _tensors(coded, book, rows), (rows, len(columns)), columns, bias)


def _tensors(coded: Sequence[Coded], book: Tensor, rows: int) -> dict[str, Tensor]:
    form, scales = coded[0].form, [each.scale for each in coded]
    codes = torch.cat([each.codes for each in coded])
    params = {"codebook": book, "scale": torch.cat(scales) if form.scale == "row" else scales[0]}
    return form.pack(codes.flatten(1), params, (rows, coded[0].target.shape[1])).tensors
