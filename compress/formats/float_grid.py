"""`FloatGrid`: small floats with a scale per tensor, channel, token or group: FP8, ExMy, MXFP4/6/8, NVFP4."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self, cast, get_args

import torch
from torch import Tensor

from compress.errors import UsageError, nearest
from compress.formats.base import ActivationFormat, Format, Params, QuantTensor, Rounder, TensorSpec
from compress.formats.float_text import NAMED, SCALE_DTYPES, Granularity, ScaleFormat, settings_of, usual_scale
from compress.maths import floats, grid
from compress.maths.floats import ExMy
from compress.spec import Call


@dataclass(frozen=True)
class FloatGrid(Format, ActivationFormat):
    """value = element(code) · scale, or element(code) · scale / global_scale where the scale is `float8_e4m3`.

    Settings: `exponent`, `mantissa` bits of an element (see compress.maths.floats), 3 to 8 bits with the sign;
    `group` input columns per scale, or `channel` (one scale per output row), `tensor`, `token` (activations: one
    per vector), `head` (caches: one per head); `scale` format: `float32`, `float16`, `e8m0` (powers of two) or
    `float8_e4m3` (two levels: global_scale, one float32 for the tensor, is 448 · largest element / peak, a
    multiplier as in compressed-tensors). Text: `fp8_e4m3(channel)`, `fp6_e3m2(group=32)`, `fp4_e2m1(group=64,
    scale=e8m0)`; `mxfp4`, `nvfp4` … name the settings in `NAMED`. Where text names no scale, a group's is float16
    and any other float32. Stored: `codes` packed lowest bits first; `scale`, as uint8 bit patterns where it has 8
    bits, since few operators take 8-bit floats; `global_scale` (1,) float32. A short last group is allowed: we
    store it; kernels and other tools' files mostly cannot.
    """

    row_params: ClassVar[frozenset[str] | None] = frozenset({"scale"})

    exponent: int
    mantissa: int
    group: int | Granularity = "channel"
    scale: ScaleFormat = "float32"

    def __post_init__(self) -> None:
        name = f"e{self.exponent}m{self.mantissa}"
        if self.exponent < 1 or self.mantissa < 0 or not 3 <= self.bits <= 8:
            raise UsageError(
                f"{name} has {self.bits} bits with the sign. A float format has 3 to 8, at least 1 of them exponent: "
                "fp8_e4m3, fp6_e3m2, fp4_e2m1 …"
            )
        is_size = type(self.group) is int and self.group >= 1
        if not is_size and self.group not in get_args(Granularity):
            raise UsageError(
                f"fp{self.bits}_{name}: group={self.group!r} is not a group. Give a number of input columns "
                f"(16, 32, 64 …) or one of {', '.join(get_args(Granularity))}."
            )
        if self.scale not in get_args(ScaleFormat):
            known = nearest(str(self.scale), SCALE_DTYPES)
            raise UsageError(f"fp{self.bits}_{name}: unknown scale format '{self.scale}'.{known}")
        if self.shares_peak and self.group == "tensor":
            raise UsageError(
                f"fp{self.bits}_{name}: scale=float8_e4m3 is a second level under one scale for the tensor, so "
                "there must be more than one: give group=N or channel, or scale=float32."
            )

    @classmethod
    def from_call(cls, call: Call, **named: str) -> Self:
        if call.name in NAMED:
            if call.args or call.kwargs:
                exponent, mantissa, group, scale = NAMED[call.name]
                raise UsageError(
                    f"{call.text()}: {call.name} takes no settings, for weights or activations. Write "
                    f"{call.name}, or with other settings fp{1 + exponent + mantissa}_e{exponent}m{mantissa}"
                    f"(group={group}, scale={scale})."
                )
            return cls(*NAMED[call.name])
        bits, exponent, mantissa = (int(named[key]) for key in ("bits", "exponent", "mantissa"))
        if bits != 1 + exponent + mantissa:
            raise UsageError(
                f"{call.name}: 1 sign, {exponent} exponent and {mantissa} mantissa bits are {1 + exponent + mantissa}, "
                f"not {bits}. Write fp{1 + exponent + mantissa}_e{exponent}m{mantissa}, or other splits."
            )
        return cls(exponent, mantissa, **settings_of(call))

    def __str__(self) -> str:
        for name, named in NAMED.items():
            if named == (self.exponent, self.mantissa, self.group, self.scale):
                return name
        group = f"group={self.group}" if isinstance(self.group, int) else self.group
        scale = "" if self.scale == usual_scale(self.group) else f", scale={self.scale}"
        return f"fp{self.bits}_e{self.exponent}m{self.mantissa}({group}{scale})"

    @property
    def bits(self) -> int:
        """Of one element with its sign."""
        return 1 + self.exponent + self.mantissa

    @property
    def kind(self) -> ExMy:
        """The elements, for compress.maths.floats."""
        return ExMy(self.exponent, self.mantissa)

    @property
    def shares_peak(self) -> bool:
        return self.scale == "float8_e4m3"

    @property
    def rounds_activations(self) -> bool:
        return self.group not in ("channel", "head")

    @property
    def holds_zero(self) -> bool:
        return True

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
        """See Format.fit. Returns: scale (out, groups) float32 as stored; global_scale (1,) float32 with two levels.

        Raises: ValueError where `peak` is below the weight's own, whose top would be cut off.
        """
        groups = self._groups(weight)
        peaks = _peaks(groups)
        params: Params = {}
        multiplier: Tensor | float = 1.0
        if self.shares_peak:
            own = peaks.max()
            if peak is not None and peak < float(own):
                raise ValueError(f"{self}: the shared peak {peak:g} is below this weight's own {float(own):g}.")
            shared = own if peak is None else torch.tensor(peak)
            multiplier = params["global_scale"] = self._global_scale(shared.reshape(1))
        scale = self._scale(peaks, multiplier)
        if search:
            weighing = None if importance is None else self._by_group(importance, weight)
            scale = floats.search_scale(groups, scale, multiplier, self.kind, SCALE_DTYPES[self.scale], weighing)
        return {"scale": scale.expand(weight.shape[0], -1), **params}

    def _groups(self, weight: Tensor) -> Tensor:
        """(out, groups, group); (1, 1, out · in) with one scale for the tensor."""
        size = self.group_size(weight.shape[1])
        return weight.reshape(1, 1, -1) if self.group == "tensor" else grid.to_groups(weight, size)

    def _by_group(self, importance: Tensor, weight: Tensor) -> Tensor:
        return self._groups(importance.expand(weight.shape[0] if self.group == "tensor" else 1, -1))[0]

    def _global_scale(self, peaks: Tensor) -> Tensor:
        """What takes the largest block scale up to E4M3's largest, float32, elementwise; 1 for zeros."""
        found = floats.E4M3_MOST * floats.largest(self.kind) / peaks
        return torch.where(torch.isposinf(found), 1.0, found)

    def _scale(self, peaks: Tensor, multiplier: Tensor | float) -> Tensor:
        """Scales, as they will be stored, that let the largest element reach each peak; float32."""
        if self.scale == "e8m0":
            return floats.power_of_two(peaks, floats.overflow(self.kind))
        return floats.as_stored(peaks / floats.largest(self.kind) * multiplier, SCALE_DTYPES[self.scale])

    def quantize(self, weight: Tensor, params: Params, columns: Tensor) -> tuple[Tensor, Tensor]:
        groups = params["scale"].shape[1]
        # one group for the whole row needs no division by its (unknown here) width
        index = columns // cast(int, self.group) if groups > 1 else torch.zeros_like(columns)
        scale = _effective(params["scale"][:, index], params)
        codes = floats.encode(weight / scale, self.kind)
        return codes, floats.decode(codes, self.kind) * scale

    def rounder(self, params: Params, columns: Tensor) -> Rounder:
        """As Format.rounder, without looking anything up per column."""
        scales = _effective(params["scale"], params).T.contiguous().unbind()
        places = (columns // cast(int, self.group)).tolist() if len(scales) > 1 else [0] * len(columns)

        def round_to(weight: Tensor, at: int) -> tuple[Tensor, Tensor]:
            scale = scales[places[at]]
            codes = floats.encode(weight / scale, self.kind)
            return codes, floats.decode(codes, self.kind).mul_(scale)

        return round_to

    def refit_span(self, columns: int) -> int:
        """See Format. Powers of two are too far apart to be refitted, and a tensor's scale belongs to all rows."""
        return 0 if self.group == "tensor" or self.scale == "e8m0" else self.group_size(columns)

    def rescale(self, params: Params, group: int, factor: Tensor) -> Tensor:
        """See Format. Of the scales that can be stored, the one nearest to the wanted; the error is quadratic in it, so
        never worse than the one before."""
        scale = params["scale"][:, group]
        before = scale.clone()
        wanted = floats.as_stored(before * factor, SCALE_DTYPES[self.scale])
        scale.copy_(torch.where(torch.isfinite(wanted), wanted, before))
        return scale / before

    def pack(self, codes: Tensor, params: Params, shape: tuple[int, int]) -> QuantTensor:
        scale = params["scale"][:1, :1] if self.group == "tensor" else params["scale"]
        stored = scale.to(SCALE_DTYPES[self.scale]).contiguous()
        tensors = {
            "codes": grid.pack_bits(codes, self.bits),
            "scale": stored.view(torch.uint8) if stored.dtype.itemsize == 1 else stored,
        }
        if self.shares_peak:
            tensors["global_scale"] = params["global_scale"]
        return QuantTensor(self, tensors, shape)

    def unpack(self, tensors: dict[str, Tensor], shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Codes (out, in) uint8 and scales (out, groups) float32, the global one divided out."""
        scale = tensors["scale"]
        if scale.dtype == torch.uint8:
            scale = scale.view(SCALE_DTYPES[self.scale])
        scale = _effective(scale.float(), tensors)
        return grid.unpack_bits(tensors["codes"], self.bits, shape[1]), scale.expand(shape[0], -1)

    def dequantize(self, tensors: dict[str, Tensor], shape: tuple[int, int]) -> Tensor:
        codes, scale = self.unpack(tensors, shape)
        size = shape[1] if scale.shape[1] == 1 else cast(int, self.group)
        values = floats.decode(grid.to_groups(codes, size), self.kind) * scale[..., None]
        return values.reshape(shape[0], -1)[:, : shape[1]].contiguous()

    def tensor_specs(self, shape: tuple[int, int]) -> dict[str, TensorSpec]:
        rows, columns = shape
        groups = -(-columns // self.group_size(columns))
        dtype = SCALE_DTYPES[self.scale]
        specs: dict[str, TensorSpec] = {
            "codes": ((rows, grid.packed_bytes(1, columns, self.bits)), torch.uint8),
            "scale": ((1 if self.group == "tensor" else rows, groups), torch.uint8 if dtype.itemsize == 1 else dtype),
        }
        if self.shares_peak:
            specs["global_scale"] = ((1,), torch.float32)
        return specs

    def round_activation(self, values: Tensor) -> Tensor:
        """See ActivationFormat. Groups run along the features; with two levels each vector has a global scale of its
        own, so that no token's rounding depends on another token."""
        if not self.rounds_activations:
            raise UsageError(f"{self} cannot round activations. Allowed: tensor, token or group=N, mxfp4, nvfp4 …")
        if values.numel() == 0:
            return values
        groups = self._activation_groups(values)
        peaks = _peaks(groups)
        multiplier = self._global_scale(peaks.amax(-1, keepdim=True)) if self.shares_peak else 1.0
        return self._round_groups(groups, self._scale(peaks, multiplier) / multiplier, values)

    def fit_activation(self, low: Tensor, high: Tensor) -> Params:
        """See ActivationFormat. A `tensor` grid's scale (1, 1), or the global_scale (1, 1) under which block scales
        are still fitted at run time; float32."""
        if not self.shares_peak and self.group != "tensor":
            return super().fit_activation(low, high)
        peak = torch.maximum(high.abs().max(), low.abs().max()).reshape(1, 1)
        return {"global_scale": self._global_scale(peak)} if self.shares_peak else {"scale": self._scale(peak, 1.0)}

    def round_static(self, values: Tensor, params: Params) -> Tensor:
        """See ActivationFormat. What lies outside the range becomes its end."""
        if values.numel() == 0:
            return values
        groups = self._activation_groups(values)
        if "scale" in params:
            return self._round_groups(groups, params["scale"], values)
        multiplier = params["global_scale"]
        return self._round_groups(groups, self._scale(_peaks(groups), multiplier) / multiplier, values)

    def _activation_groups(self, values: Tensor) -> Tensor:
        flat = values.reshape(1, -1) if self.group == "tensor" else values.reshape(-1, values.shape[-1])
        return grid.to_groups(flat, self.group if isinstance(self.group, int) else flat.shape[1])

    def _round_groups(self, groups: Tensor, scale: Tensor, values: Tensor) -> Tensor:
        """groups (rows, G, group) on their scales (rows, G), in the shape of the values that they were made of."""
        rounded = floats.round_to(groups / scale[..., None], self.kind) * scale[..., None]
        whole = rounded.reshape(groups.shape[0], -1)
        return (whole if self.group == "tensor" else whole[:, : values.shape[-1]]).reshape(values.shape)


def _peaks(groups: Tensor) -> Tensor:
    return torch.maximum(groups.amax(-1), -groups.amin(-1))


def _effective(scale: Tensor, tensors: dict[str, Tensor]) -> Tensor:
    return scale / tensors["global_scale"] if "global_scale" in tensors else scale
