"""Which axes of which tensors are as wide as a number in config.json: read off two module trees, as the config is and
with that number changed. No names of modules are looked for; whether the rows that make a channel were read right is
seen by running a block narrowed beside the same block with that channel's inputs zero (compress/wiring/twins.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from compress.errors import UnsupportedError, UsageError
from compress.layer import Layer, LayerKind
from compress.maths.channels import columns_of
from compress.models import experts
from compress.models.attention import attentions
from compress.models.edits import Shape, reshaped
from compress.models.model import Model
from compress.models.skeleton import OUTER, segment_of

FEED_FORWARD = (
    "intermediate_size",
    "moe_intermediate_size",
    "shared_expert_intermediate_size",
    "ffn_dim",
    "n_inner",
    "hidden_dim",
    "ffn_hidden_size",
)
"""What config.json calls the width of a feed-forward, of a dense one, an expert, an expert that all tokens reach."""

HEADS = "num_key_value_heads"

Axes = dict[str, tuple[int, ...]]
"""A layer (0 its rows, with the bias, 1 its columns) or plain tensor → the axes that become shorter."""


@dataclass(frozen=True, eq=False)
class Family:
    """Axes that become shorter together, in every block.

    key: the number in config.json; units: how many of what goes together there are, of which `kept` stay; changes: of
    config.json; axes: see Axes; fused: sizes of the parts of an axis in which several of these widths stand in a row.
    """

    key: str
    units: int
    kept: int
    changes: dict[str, Any]
    axes: Axes
    fused: tuple[int, ...] = ()

    def parts(self, size: int, variant: int) -> tuple[int, ...]:
        """How an axis is laid out: parts that follow each other, each with all units in runs of equal length. variant:
        0 as most models, 1 with all that belongs to a unit side by side."""
        if variant == 0 and self.fused and size == sum(self.fused):
            return self.fused
        if variant == 0 and not self.fused:
            return (self.units,) * (size // self.units)
        return (size,)

    def places(self, size: int, kept: Tensor, variant: int) -> Tensor:
        """The indices along an axis of this size that belong to units (n,) int64."""
        found, start = [], 0
        for part in self.parts(size, variant):
            found.append(start + columns_of(kept, part // self.units))
            start += part
        return torch.cat(found)


@dataclass(frozen=True)
class Group:
    """In one block: the layer that reads a width, what makes it (layers and plain tensors), and the family."""

    family: Family
    reader: str
    makers: tuple[str, ...]


def shorter_axes(before: Model, after: Model) -> Axes:
    """Raises: UnsupportedError where the modules are not the same otherwise."""
    first, second = shapes_of(before), shapes_of(after)
    if first.keys() != second.keys():
        raise UnsupportedError("The changed config makes other modules, so no weights can be cut to fit them.")
    found = {}
    for name, shape in first.items():
        axes = tuple(axis for axis, size in enumerate(shape) if second[name][axis] != size)
        if axes:
            found[name] = axes
    return found


def shapes_of(model: Model) -> dict[str, tuple[int, ...]]:
    """Of layers, (out, in), and of plain tensors."""
    plain = {name: shape for name, (shape, _) in model.plain_shapes.items()}
    return plain | {name: spec.shape for name, spec in model.structure.layers.items()}


def feed_forwards(model: Model) -> list[Family]:
    """The widths of the feed-forwards, nothing kept yet less than all; none where no number in the config is one."""
    found = []
    for key in FEED_FORWARD:
        size = number(model, key)
        if size is None and key == "n_inner" and hasattr(model.config, "n_inner"):
            size = 4 * int(model.config.hidden_size)  # what GPT-2's config means by none
        if size is not None and size > 1 and (axes := some_axes(model, [{key: size - 1}])):
            found.append(Family(key, size, size, {}, axes))
    return found


def heads_of(model: Model) -> int:
    """Heads of keys and values. Raises: UnsupportedError for a model without any."""
    return attentions(model.config.get_text_config())[0].kv_heads


def query_heads_of(model: Model) -> int:
    """Heads of queries."""
    return attentions(model.config.get_text_config())[0].heads


def head_size(model: Model) -> int:
    """Of each head of attention."""
    return attentions(model.config.get_text_config())[0].size


def heads(model: Model, kept: int) -> Family:
    """Groups of heads: those of the queries with the head of keys and values that they share.

    Args: kept: heads of keys and values that stay. Raises: UnsupportedError, UsageError.
    """
    text = model.config.get_text_config()
    one = attentions(text)[0]
    name = getattr(model.config, "attribute_map", {}).get("num_attention_heads", "num_attention_heads")

    def changes(left: int) -> dict[str, Any]:
        found = {name: one.heads // one.kv_heads * left, "head_dim": one.size}
        return found if number(model, HEADS) is None else {**found, HEADS: left}

    # whatever their number, it is the same axes; not every number can be built
    axes: Axes = {} if kept == one.kv_heads else some_axes(model, map(changes, (kept, *range(1, one.kv_heads))))
    if kept < one.kv_heads and not axes:
        raise UnsupportedError(
            f"Heads of '{text.model_type}' cannot go: its config says how wide they are only as a share of the hidden "
            "size (it knows no head_dim), so no plain config.json has fewer of them. Feed-forwards can (ffn)."
        )
    return Family(
        HEADS,
        one.kv_heads,
        kept,
        changes(kept),
        axes,
        (one.heads * one.size, one.kv_heads * one.size, one.kv_heads * one.size),
    )


def number(model: Model, key: str) -> int | None:
    """An integer of the config. Raises: UnsupportedError for one that differs from block to block."""
    value = getattr(model.config, key, None) if model.config is not None else None
    if isinstance(value, list | tuple):
        raise UnsupportedError(f"{key} differs from block to block in this model; blocks of one width are narrowed.")
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def some_axes(model: Model, changes: Iterable[dict[str, Any]]) -> Axes:
    """What becomes shorter by the first of some changes with which modules can be built; nothing where none can.

    Raises: UnsupportedError, see `shorter_axes`.
    """
    if model.raw_config.get("text_config") is not None:
        raise UnsupportedError("A config with one for text inside it is not narrowed yet.")
    for each in changes:
        shape = Shape(dict(each), model.edits, model.origins)
        if not unbuildable(model, shape):
            return shorter_axes(model, reshaped(model, shape))
    return {}


def unbuildable(model: Model, shape: Shape) -> str:
    """Why the architecture's own code builds no modules of a shape, or ""."""
    from huggingface_hub.errors import StrictDataclassError

    try:
        reshaped(model, shape)
    except (StrictDataclassError, ValueError, ZeroDivisionError, RuntimeError) as error:
        return str(error).strip().splitlines()[-1].strip() or type(error).__name__
    return ""


def groups_of(family: Family, model: Model, segment: int) -> list[Group]:
    """Who makes and who reads the width in one block, each expert by itself.

    Raises: UnsupportedError where that cannot be told, or an axis is no multiple of the units.
    """
    shapes = shapes_of(model)
    path = model.structure.blocks_path
    readers: dict[str, list[str]] = {}
    makers: dict[str, list[str]] = {}
    for name, axes in family.axes.items():
        if segment_of(name, path) == OUTER:
            raise UnsupportedError(f"{name}, outside the blocks, is as wide as {family.key}: it cannot be narrowed.")
        if segment_of(name, path) != segment:
            continue
        if any(shapes[name][axis] % family.units for axis in axes):
            raise UnsupportedError(f"{name} is {shapes[name]}: not in runs for each of {family.units} ({family.key}).")
        spec = model.structure.layers.get(name)
        if spec is not None and axes not in ((0,), (1,)):
            raise UnsupportedError(f"Rows and columns of {name} are both as wide as {family.key}: it is not narrowed.")
        owner = _owner(name, spec is not None and spec.kind is LayerKind.EXPERT)
        (readers if spec is not None and axes == (1,) else makers).setdefault(owner, []).append(name)
    for names in readers.values():
        if len(names) > 1:
            raise UnsupportedError(f"{', '.join(names)} all read {family.key}: it is not one width of one layer.")
    if strangers := [name for owner, names in makers.items() if owner not in readers for name in names]:
        raise UnsupportedError(f"{strangers[0]} has {family.key} in its shape, and no layer of its own reads that.")
    return [Group(family, names[0], tuple(makers.get(owner, ()))) for owner, names in readers.items()]


def _owner(name: str, expert: bool) -> str:
    """What is narrowed by itself: the block's only one, or an expert."""
    if not expert:
        return ""
    path, _, index = experts.owner(name)
    return f"{path}.{index}"


def kept_of(family: Family, wanted: int) -> Family:
    """The family with so many units left. Raises: UsageError."""
    if not 1 <= wanted <= family.units:
        raise UsageError(f"{family.key}={family.units} can become 1 to {family.units}, not {wanted}.")
    return replace(family, kept=wanted, changes={**family.changes, family.key: wanted})


def cut_layer(layer: Layer, rows: Tensor | None = None, columns: Tensor | None = None) -> Layer:
    """Some rows, with their bias, and some input columns of a plain layer."""
    weight, bias = layer.weight, layer.bias
    assert isinstance(weight, Tensor), layer.name  # nothing has a format yet
    if rows is not None:
        weight, bias = weight[rows], None if bias is None else bias[rows]
    weight = weight if columns is None else weight[:, columns]
    return replace(layer, weight=weight.contiguous(), bias=bias)


def cut_group(
    group: Group, kept: Tensor, variant: int, layers: dict[str, Layer], plain: Mapping[str, Tensor]
) -> tuple[dict[str, Layer], dict[str, Tensor]]:
    """What is left of the layers and plain tensors of a group with units (n,) int64 kept."""
    family = group.family
    reader = layers[group.reader]
    cut = {group.reader: cut_layer(reader, columns=family.places(reader.shape[1], kept, 1))}
    tensors: dict[str, Tensor] = {}
    for name in group.makers:
        if name in layers:
            cut[name] = cut_layer(layers[name], rows=family.places(layers[name].shape[0], kept, variant))
            continue
        for axis in family.axes[name]:
            tensor = tensors.get(name, plain[name])
            tensors[name] = tensor.index_select(axis, family.places(tensor.shape[axis], kept, variant))
    return cut, tensors
