"""`IntGrid`: uniform integer grids of 2 to 8 bits, per tensor, per channel or per group of input columns."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import Any, ClassVar, Literal, Self, cast, get_args

import torch
from torch import Tensor

from compress.errors import UsageError, nearest
from compress.formats.base import ActivationFormat, Format, Params, QuantTensor, Rounder, TensorSpec
from compress.maths import grid
from compress.spec import Call

Scheme = Literal["symmetric", "asymmetric", "float_zero", "signed"]
Granularity = Literal["channel", "tensor", "token", "head"]
WORDS = (*get_args(Granularity), *get_args(Scheme), "group", "outliers")
"""What a user types."""
EXAMPLES = "Such as int4(group=32, asymmetric), int8(channel), int8(token, outliers=6)."


@dataclass(frozen=True)
class IntGrid(Format, ActivationFormat):
    """value = (code − zero) · scale, scale in float16.

    Settings: `bits` 2–8; `group` input columns per scale, or `channel` (one scale per output row), `tensor` (one
    for all), `token` (activations: one per vector), `head` (caches: one per head); `scheme`: `symmetric`,
    `asymmetric` (integer zero point), `float_zero` (zero point in float16, anywhere between two codes) or `signed`
    (the scale carries the sign of the largest weight, which then uses the extra negative code); `outliers` (with
    `token`): input columns in which any magnitude of the call reaches this stay as they are.
    Text: `int4(group=32)`, `int8(channel)`, `int4(group=64, asymmetric)`, `int8(token, outliers=6)`.
    """

    row_params: ClassVar[frozenset[str] | None] = frozenset({"scale", "zero"})

    bits: int = 4
    group: int | Granularity = "channel"
    scheme: Scheme = "symmetric"
    outliers: float | None = None

    def __post_init__(self) -> None:
        if type(self.bits) is not int or not 2 <= self.bits <= 8:
            raise UsageError(f"An integer format has 2 to 8 bits, found {self.bits!r}.")
        is_size = type(self.group) is int and self.group >= 1
        if not is_size and self.group not in get_args(Granularity):
            raise UsageError(
                f"int{self.bits}: group={self.group!r} is not a group. Give a number of input columns "
                f"(32, 64, 128 …) or one of {', '.join(get_args(Granularity))}."
            )
        if self.scheme not in get_args(Scheme):
            raise UsageError(f"int{self.bits}: unknown scheme '{self.scheme}'.{nearest(self.scheme, get_args(Scheme))}")
        if self.outliers is not None:
            self._check_outliers()

    def _check_outliers(self) -> None:
        number = isinstance(self.outliers, int | float) and not isinstance(self.outliers, bool)
        alone = (self.group, self.scheme) == ("token", "symmetric")
        if not number or not 0 < cast(float, self.outliers) < inf or not alone:
            raise UsageError(
                f"int{self.bits}({self.group}, {self.scheme}): outliers={self.outliers!r} is not allowed. It is a "
                f"magnitude above 0 and goes with token alone: int{self.bits}(token, outliers=6)."
            )

    @classmethod
    def from_call(cls, call: Call, **named: str) -> Self:
        settings: dict[str, Any] = dict(call.kwargs)
        for word in call.args:
            key = "scheme" if word in get_args(Scheme) else "group"
            if key == "group" and word not in get_args(Granularity):
                raise UsageError(f"{call.name}: unknown word '{word}'.{nearest(str(word), WORDS)} {EXAMPLES}")
            if key in settings:
                raise UsageError(f"{call.text()}: {key} is given twice. Keep one of them.")
            settings[key] = word
        unknown = set(settings) - {"group", "scheme", "outliers"}
        if unknown:
            name = sorted(unknown)[0]
            raise UsageError(f"{call.name}: unknown setting '{name}'.{nearest(name, WORDS)} {EXAMPLES}")
        return cls(int(named["bits"]), **settings)

    def __str__(self) -> str:
        group = f"group={self.group}" if isinstance(self.group, int) else self.group
        scheme = "" if self.scheme == "symmetric" else f", {self.scheme}"
        outliers = "" if self.outliers is None else f", outliers={self.outliers}"
        return f"int{self.bits}({group}{scheme}{outliers})"

    @property
    def holds_zero(self) -> bool:
        return self.scheme != "float_zero"  # the others have whole zero points

    def group_size(self, columns: int) -> int:
        """Input columns that share a scale, for a weight with this many."""
        if self.group in ("token", "head"):
            what = "rounds activations" if self.group == "token" else "is for the cache of keys and values"
            raise UsageError(f"{self} {what}; a weight takes group=N, channel or tensor.")
        return self.group if isinstance(self.group, int) else columns

    def fit(
        self,
        weight: Tensor,
        *,
        search: bool = False,
        importance: Tensor | None = None,
        peak: float | None = None,
    ) -> Params:
        """See Format.fit. `peak` is not read: an integer grid has no tensor-wide scale beside its groups' own."""
        size = self.group_size(weight.shape[1])
        whole = weight.reshape(1, -1) if self.group == "tensor" else weight
        groups = grid.to_groups(whole, whole.shape[1] if self.group == "tensor" else size)
        if search:
            scale, zero = grid.search_range(groups, self.bits, self.scheme, self._by_group(importance, size))
        else:
            scale, zero = grid.fit_range(groups, self.bits, self.scheme)
        rows = weight.shape[0]
        if self.scheme == "float_zero":
            zero = zero.half().float()
        return {"scale": scale.half().expand(rows, -1), "zero": zero.expand(rows, -1)}

    def _by_group(self, importance: Tensor | None, size: int) -> Tensor | None:
        if importance is None or self.group == "tensor":
            return None
        return grid.to_groups(importance.reshape(1, -1), size)[0]

    def quantize(self, weight: Tensor, params: Params, columns: Tensor) -> tuple[Tensor, Tensor]:
        groups = params["scale"].shape[1]
        # one group for the whole row needs no division by its (unknown here) width
        index = columns // cast(int, self.group) if groups > 1 else torch.zeros_like(columns)
        scale, zero = params["scale"][:, index].float(), params["zero"][:, index]
        codes = grid.encode(weight, scale, zero, self.bits)
        return codes.to(torch.uint8), grid.decode(codes, scale, zero)

    def rounder(self, params: Params, columns: Tensor) -> Rounder:
        """As Format.rounder, without looking anything up per column."""
        scales = params["scale"].T.float().contiguous().unbind()
        zeros = params["zero"].T.contiguous().unbind()
        places = (columns // cast(int, self.group)).tolist() if len(scales) > 1 else [0] * len(columns)
        top = 2**self.bits - 1

        def round_to(weight: Tensor, at: int) -> tuple[Tensor, Tensor]:
            scale, zero = scales[places[at]], zeros[places[at]]
            codes = torch.div(weight, scale).add_(zero).round_().clamp_(0, top)
            return codes.to(torch.uint8), codes.sub_(zero).mul_(scale)

        return round_to

    def refit_span(self, columns: int) -> int:
        return 0 if self.group == "tensor" else self.group_size(columns)

    def rescale(self, params: Params, group: int, factor: Tensor) -> Tensor:
        scale = params["scale"][:, group]
        before = scale.float()
        wanted = before * factor
        kept = (wanted.abs() < torch.finfo(torch.float16).tiny) | ~torch.isfinite(wanted.half())
        scale.copy_(torch.where(kept, before, wanted))
        return scale.float() / before

    def pack(self, codes: Tensor, params: Params, shape: tuple[int, int]) -> QuantTensor:
        scale = params["scale"]
        tensors = {
            "codes": grid.pack_bits(codes, self.bits),
            "scale": (scale[:1, :1] if self.group == "tensor" else scale).contiguous(),
        }
        zero = params["zero"][:1, :1] if self.group == "tensor" else params["zero"]
        if self.scheme == "asymmetric":
            tensors["zero"] = grid.pack_bits(zero, self.bits)
        if self.scheme == "float_zero":
            tensors["zero"] = zero.half().contiguous()
        return QuantTensor(self, tensors, shape)

    def unpack(self, tensors: dict[str, Tensor], shape: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
        """Codes (out, in) uint8, scales (out, groups) float16, zero points (out, groups) uint8, or float16."""
        rows, columns = shape
        codes = grid.unpack_bits(tensors["codes"], self.bits, columns)
        scale = tensors["scale"]
        if self.scheme == "float_zero":
            zero = tensors["zero"]
        elif "zero" in tensors:
            zero = grid.unpack_bits(tensors["zero"], self.bits, scale.shape[1])
        else:
            zero = torch.full(scale.shape, 2 ** (self.bits - 1), dtype=torch.uint8)
        return codes, scale.expand(rows, -1), zero.expand(rows, -1)

    def dequantize(self, tensors: dict[str, Tensor], shape: tuple[int, int]) -> Tensor:
        codes, scale, zero = self.unpack(tensors, shape)
        size = shape[1] if scale.shape[1] == 1 else cast(int, self.group)
        groups = grid.to_groups(codes, size)
        values = grid.decode(groups, scale.float()[..., None], zero.float()[..., None])
        return values.reshape(shape[0], -1)[:, : shape[1]].contiguous()

    def tensor_specs(self, shape: tuple[int, int]) -> dict[str, TensorSpec]:
        rows, columns = shape
        groups = -(-columns // self.group_size(columns))
        scale_rows = 1 if self.group == "tensor" else rows
        specs: dict[str, TensorSpec] = {
            "codes": ((rows, grid.packed_bytes(1, columns, self.bits)), torch.uint8),
            "scale": ((scale_rows, groups), torch.float16),
        }
        if self.scheme == "asymmetric":
            specs["zero"] = ((scale_rows, grid.packed_bytes(1, groups, self.bits)), torch.uint8)
        if self.scheme == "float_zero":
            specs["zero"] = ((scale_rows, groups), torch.float16)
        return specs

    @property
    def rounds_activations(self) -> bool:
        return self.group in ("tensor", "token") and self.scheme in ("symmetric", "asymmetric")

    def round_activation(self, values: Tensor) -> Tensor:
        if not self.rounds_activations:
            raise UsageError(
                f"{self} cannot round activations at run time. Allowed: int{self.bits}(tensor), "
                f"int{self.bits}(token), each with 'asymmetric' if wanted."
            )
        if self.outliers is not None:
            return grid.fake_quantize_rest(values, self.bits, self.outliers)
        return grid.fake_quantize(values, self.bits, self.scheme, str(self.group))

    def fit_activation(self, low: Tensor, high: Tensor) -> Params:
        """See ActivationFormat. scale (1, 1) float32 and, where asymmetric, zero (1, 1) uint8."""
        if self.group != "tensor" or not self.rounds_activations:
            raise UsageError(
                f"{self} has no static grid for activations: one scale for all of them is what integer kernels take. "
                f"Allowed: int{self.bits}(tensor), int{self.bits}(tensor, asymmetric)."
            )
        scale, zero = grid.activation_grid(low.min().reshape(1, 1), high.max().reshape(1, 1), self.bits, self.scheme)
        return {"scale": scale, "zero": zero.to(torch.uint8)} if self.scheme == "asymmetric" else {"scale": scale}

    def round_static(self, values: Tensor, params: Params) -> Tensor:
        """See ActivationFormat. What lies outside the range becomes its end."""
        zero = params["zero"].float() if "zero" in params else torch.tensor(float(2 ** (self.bits - 1)))
        scale = params["scale"].to(values.device)
        return grid.quantize_activation(values, scale, zero.to(values.device), self.bits).reshape(values.shape)
