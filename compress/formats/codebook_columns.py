"""What a codebook may hold beside its codes: columns in an order of their own, outlier columns with entries of their
own, and a bias.

A weight with any of these is made of pieces, runs of columns that are plain codebooks each: the outlier columns first,
then all others. `order` says where they belong.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import ceil
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from compress.errors import UsageError, nearest
from compress.formats.base import TensorSpec

if TYPE_CHECKING:
    from compress.formats.codebook import Codebook

BIASES = ("none", "row", "column")
# places of columns are stored as the bits of unsigned numbers
NARROW = 1 << 16
MOST_OUTLIER_BITS = 16


class Piece(NamedTuple):
    """Some columns of a weight as a codebook without any of these.

    tensors: as `form` stores them; shape (out, n); columns (n,) int64: their places in the weight; bias float32 (out,
    1) or (1, n), added to what is decoded, or None.
    """

    form: Codebook
    tensors: dict[str, Tensor]
    shape: tuple[int, int]
    columns: Tensor
    bias: Tensor | None

    def decode(self) -> Tensor:
        """(out, n) float32."""
        found = self.form.dequantize(self.tensors, self.shape)
        return found if self.bias is None else found + self.bias


def check(form: Codebook) -> None:
    """Raises: UsageError for settings that cannot be."""
    if isinstance(form.outliers, bool) or not isinstance(form.outliers, int | float) or not 0 <= form.outliers < 1:
        raise UsageError(
            f"codebook: outliers={form.outliers!r} is not allowed. Give the share of the input columns, 0 or more and "
            "less than 1, such as 0.02."
        )
    if form.bias not in BIASES:
        raise UsageError(f"codebook: bias={form.bias!r} is not allowed.{nearest(str(form.bias), BIASES)}")
    if not isinstance(form.permuted, bool):
        raise UsageError(f"codebook: permuted={form.permuted!r} is not allowed. Give true, false or the word alone.")
    for name, highest in (("outlier_vector", 64), ("outlier_entries", 1 << MOST_OUTLIER_BITS)):
        value, least = getattr(form, name), 1 if name == "outlier_vector" else 2
        if type(value) is not int or not least <= value <= highest:
            raise UsageError(f"codebook: {name}={value!r} is not allowed. Give a whole number, {least} to {highest}.")
        if not form.outliers and value != type(form).__dataclass_fields__[name].default:
            raise UsageError(
                f"codebook: {name}={value} is for outlier columns, and there are none. Give outliers=0.02."
            )
    if form.outlier_entries & (form.outlier_entries - 1):
        raise UsageError(f"codebook: outlier_entries={form.outlier_entries} is no power of two. Give 16, 32, 64 …")


def texts(form: Codebook) -> list[str]:
    """The settings as the format's text has them; none where they are as usual."""
    fields = type(form).__dataclass_fields__
    parts = [f"outliers={form.outliers}"] if form.outliers else []
    for name in ("outlier_vector", "outlier_entries"):
        parts += [f"{name}={getattr(form, name)}"] if getattr(form, name) != fields[name].default else []
    parts += [f"bias={form.bias}"] if form.bias != "none" else []
    return parts + (["permuted"] if form.permuted else [])


def main_form(form: Codebook) -> Codebook:
    """The codebook of the columns that are no outliers, without any of these settings."""
    usual = type(form)()
    vector, entries = usual.outlier_vector, usual.outlier_entries
    return replace(form, outliers=0.0, bias="none", permuted=False, outlier_vector=vector, outlier_entries=entries)


def outlier_form(form: Codebook) -> Codebook:
    """The codebook of the outlier columns: one stage, scaled where columns are; rows have no scale in them."""
    scale = "column" if form.scale == "column" else "none"
    return type(form)(form.outlier_vector, form.outlier_entries, 1, form.axis, 1, scale)


def outlier_count(form: Codebook, columns: int) -> int:
    """How many of the input columns are outliers: the share, rounded up until all others make whole groups of whole
    vectors. `columns` where no number does."""
    if not form.outliers:
        return 0
    each, rest = (form.outlier_vector, form.vector) if form.axis == "in" else (1, 1)
    count = ceil(round(form.outliers * columns, 6) / each) * each
    while count < columns and (columns - count) % (form.groups * rest):
        count += each
    return min(count, columns)


def require_others(form: Codebook, columns: int) -> None:
    """Raises: UsageError where all input columns would be outliers."""
    if outlier_count(form, columns) == columns:
        raise UsageError(
            f"{form}: outliers, rounded up until the other input columns make whole groups of whole vectors, are all "
            f"{columns}. Give a smaller share, or another vector or number of groups."
        )


def ordered(form: Codebook, importance: Tensor) -> Tensor:
    """(in,) int64: outlier columns first, those of the largest `importance` (in,); the others by it too where the
    format is permuted, else as they stand."""
    order = torch.argsort(importance, descending=True, stable=True)
    if form.permuted:
        return order
    count = outlier_count(form, len(order))
    return torch.cat([order[:count].sort().values, order[count:].sort().values])


def order_of(form: Codebook, tensors: dict[str, Tensor], columns: int) -> Tensor:
    """(in,) int64: the place in the weight of each column as its codes lie."""
    if "order" not in tensors:
        return torch.arange(columns)
    first = tensors["order"].long() & (NARROW - 1 if tensors["order"].dtype == torch.int16 else -1)
    if len(first) == columns:
        return first
    left = torch.ones(columns, dtype=torch.bool)
    left[first] = False
    return torch.cat([first, left.nonzero()[:, 0]])


def specs(form: Codebook, shape: tuple[int, int]) -> dict[str, TensorSpec]:
    """See Format.tensor_specs."""
    rows, columns = shape
    count = outlier_count(form, columns)
    found = main_form(form).tensor_specs((rows, columns - count))
    if form.scale == "column":
        found["scale"] = ((columns,), torch.float16)
    if form.outliers:
        aside = outlier_form(form).tensor_specs((rows, count))
        found |= {f"outlier_{name}": aside[name] for name in ("codes", "codebook")}
    if form.bias != "none":
        found["bias"] = ((rows if form.bias == "row" else columns,), torch.float16)
    if form.outliers or form.permuted:
        places = torch.int16 if columns <= NARROW else torch.int32
        found["order"] = ((columns if form.permuted else count,), places)
    return found


def pieces(form: Codebook, tensors: dict[str, Tensor], shape: tuple[int, int]) -> list[Piece]:
    """The outlier columns, where there are any, and all others."""
    rows, columns = shape
    order, count = order_of(form, tensors, columns), outlier_count(form, columns)
    found = []
    for places, own, prefix in (
        (order[:count], outlier_form(form), "outlier_"),
        (order[count:], main_form(form), ""),
    ):
        if prefix and not count:
            continue
        stored = {name: tensors[f"{prefix}{name}"] for name in ("codes", "codebook")}
        if own.scale != "none":
            stored["scale"] = tensors["scale"][places] if own.scale == "column" else tensors["scale"]
        found.append(Piece(own, stored, (rows, len(places)), places, _bias(form, tensors, places, bool(prefix))))
    return found


def _bias(form: Codebook, tensors: dict[str, Tensor], places: Tensor, outliers: bool) -> Tensor | None:
    """That of rows is, as their scale, of the columns that are no outliers."""
    if form.bias == "none" or (form.bias == "row" and outliers):
        return None
    bias = tensors["bias"].float()
    return bias[places][None] if form.bias == "column" else bias[:, None]


def joined(form: Codebook, parts: Sequence[Piece]) -> dict[str, Tensor]:
    """Tensors as the format stores them: the inverse of `pieces`."""
    order, main = torch.cat([each.columns for each in parts]), parts[-1]
    back = torch.argsort(order)
    found = dict(main.tensors)
    if form.scale == "column":
        found["scale"] = torch.cat([each.tensors["scale"] for each in parts])[back]
    for each in parts[:-1]:
        found |= {f"outlier_{name}": each.tensors[name] for name in ("codes", "codebook")}
    if form.bias == "column":
        found["bias"] = torch.cat([_given(each.bias)[0] for each in parts])[back].half()
    elif form.bias == "row":
        found["bias"] = _given(main.bias)[:, 0].half()
    if form.outliers or form.permuted:
        stored = order if form.permuted else order[: len(order) - len(main.columns)]
        found["order"] = stored.to(torch.int32 if len(order) > NARROW else torch.int16).contiguous()
    return found


def _given(bias: Tensor | None) -> Tensor:
    assert bias is not None
    return bias


def assembled(parts: Sequence[Piece], values: Sequence[Tensor]) -> Tensor:
    """(out, in): the values (out, n) of each piece, bias included, at their places."""
    return torch.cat(list(values), 1)[:, torch.argsort(torch.cat([each.columns for each in parts]))]
