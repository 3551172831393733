"""Layers that are to get codebooks, with the systems that they are solved with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from compress.engine.blockpass import Block
from compress.engine.in_turn import Systems
from compress.engine.layer_stats import LayerStats
from compress.formats.base import QuantTensor, alike
from compress.formats.codebook import Codebook
from compress.formats.codebook_choice import counted
from compress.layer import Layer
from compress.solve import NOT_GUIDED, System

if TYPE_CHECKING:
    from compress.engine.codebook_pass import CodebookPass
    from compress.engine.codebook_pieces import Apart

# share of an input's usual second moment that one of a layer without tokens counts
UNREACHED = 1e-3


@dataclass(frozen=True)
class Task:
    """A layer, or a run of its output rows, and what it is solved with.

    weight (rows, in) float32, what it is to come close to; apart: what was decided of its outlier columns, or of their
    order (codebook_pieces.py), with `system` and `weight` of the columns that are left; form: the codebook of these
    columns, by itself.
    """

    item: CodebookPass
    layer: Layer
    stats: LayerStats
    system: System
    weight: Tensor
    form: Codebook
    apart: Apart | None = None


def held(block: Block) -> dict[str | Codebook, Tensor]:
    """Codebooks of layers whose turn is over, float16, that more layers are to hold."""
    holders: list[tuple[Tensor, list[QuantTensor]]] = []
    for layer in block.layers.values():
        weight = layer.weight
        if isinstance(weight, QuantTensor) and isinstance(weight.format, Codebook):
            book = weight.tensors["codebook"]
            known = alike(book, holders)
            if known is None:
                holders.append((book, [weight]))
            else:
                known.append(weight)
    found: dict[str | Codebook, Tensor] = {}
    for _, (first, *others) in holders:
        assert isinstance(first.format, Codebook)
        if len(others) + 1 < first.format.share:
            found[first.format] = first.tensors["codebook"]
    return found


def tasks_of(block: Block, chosen: Mapping[str, CodebookPass]) -> list[Task]:
    """Layers that are fed the same share a system; a guided layer has one for each group of its rows."""
    tasks, systems = [], Systems(_unknown(block))
    for name, item in chosen.items():
        layer, stats = block.layers[name], block.stats.get(name, LayerStats())
        how = item.damp, item.codebook.step, item.column_order
        system = systems.of(layer, stats, *how)
        target = system.target(layer.float_weight(), stats.cross, item.mismatch)
        form = item.codebook.main
        if item.guided and stats.guided is not None:
            share, parts = _balance(stats), target.tensor_split(len(stats.guided))
            pairs = zip(stats.guided, parts, strict=True)
            tasks += [Task(item, layer, stats, System.of(share * hessian, *how), rows, form) for hessian, rows in pairs]
        else:
            tasks.append(Task(item, layer, stats, system, target, form))
    return tasks


def _unknown(block: Block) -> float:
    """What an input counts of a layer that no token reached, beside layers that some did: little, since entries that
    they hold in common are learned from both."""
    known = [float(stats.hessian.diagonal().mean()) for stats in block.stats.values() if stats.hessian is not None]
    return UNREACHED * sum(known) / len(known) if known and sum(known) > 0 else 1.0


def _balance(stats: LayerStats) -> float:
    """What the guided Hessians of a layer are multiplied by, so that together they count what its plain one does:
    layers that hold a codebook in common are weighed against each other as without them."""
    assert stats.guided is not None and stats.hessian is not None
    whole = float(stats.guided.diagonal(dim1=1, dim2=2).sum(1).mean())
    return float(stats.hessian.trace()) / whole if whole > 0 else 1.0


def notes_of(task: Task) -> list[str]:
    """What a reader of the report should know about the solve of one layer."""
    stats, system = task.stats, task.system
    if stats.hessian is None:
        return ["no calibration token reached it: solved as if its inputs were alike (identity Hessian)"]
    notes = system.notes(stats.tokens, task.layer.shape[1])
    if task.item.guided and stats.guided is None:
        notes.append(NOT_GUIDED)
    form, columns = task.item.codebook, task.layer.shape[1]
    if form.outliers:
        notes.append(f"{columns - form.main_columns(columns)} of {columns} input columns are outliers")
    return notes


def shared_notes(tasks: Sequence[Task]) -> list[str]:
    """What holds for the codebook, and so for all layers that share it."""
    item, form = tasks[0].item, tasks[0].item.codebook
    shapes = {task.layer.name: task.layer.shape for task in tasks}
    together, notes = len(shapes) == form.share, []  # in turn, those still to come hold the codebook too
    if item.bits is not None:
        share = f"is one codebook for {form.share} layers"
        counts = f"counts {counted(form, list(shapes.values())):.3f} bits per weight" if together else share
        notes.append(f"bits={item.bits:g}: {form} {counts}")
    rows_and_units = [form.units((len(task.weight), task.layer.shape[1])) for task in tasks]
    each = sum(rows * units for rows, units in rows_and_units) // form.groups
    if each < form.entries and together:
        notes.append(f"{form.entries} entries for {each} vectors: {form.entries - each} of them stand for nothing")
    return notes
