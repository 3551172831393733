"""`Layer`: all that a pass gets and gives back (design §2), and `LayerSpec`: the same without the weights."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import StrEnum

import torch
from torch import Tensor

from compress.formats.base import ActivationFormat, Format, Params, QuantTensor
from compress.maths.masks import Pattern
from compress.transforms import Hadamard


class LayerKind(StrEnum):
    """What computes with the weight. Seen as (out, in) in every kind."""

    LINEAR = "linear"
    EMBEDDING = "embedding"  # (vocabulary, features)
    EXPERT = "expert"  # one expert's slice of a 3-D parameter
    CONV = "conv"  # a 2-D convolution, seen as (out, in/groups · kh · kw)


@dataclass(frozen=True)
class ActSpec:
    """The input grid: dynamic (fitted at run time to the values it sees), or static with parameters from calibration.

    params: a static grid's tensors by name; None where it is dynamic, or only planned.
    """

    format: Format
    static: bool = False
    params: Params | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        if not isinstance(self.format, ActivationFormat):
            raise TypeError(f"{self.format} cannot round activations")

    def round(self, values: Tensor) -> Tensor:
        """values (…, features) float32 → rounded, same shape."""
        assert isinstance(self.format, ActivationFormat)
        if not self.static:
            return self.format.round_activation(values)
        assert self.params is not None
        return self.format.round_static(values, self.params)

    def __str__(self) -> str:
        return f"static {self.format}" if self.static else str(self.format)


@dataclass(frozen=True)
class Zeros:
    """What a pass that prunes will leave of a weight: its pattern, and how many weights at most."""

    pattern: Pattern
    kept: int


@dataclass(frozen=True)
class LayerSpec:
    """A layer as planning and lowering see it: everything but the values.

    `users` are the module paths that compute with it; more than one where weights are tied. `name` is the first.
    `turned`: the module stores it as (in, out). `routed`: a mixture's router, which no pass touches unless it is named.
    `kernel`: a convolution's (in/groups, kh, kw), whose product is shape[1]; `groups`: of its channels. `pre`: see
    Layer. `zeros`: of a recipe that is planned; a store does not say.
    """

    name: str
    kind: LayerKind
    shape: tuple[int, int]
    users: tuple[str, ...]
    has_bias: bool = False
    source_dtype: torch.dtype = torch.float32
    format: Format | None = None
    act: ActSpec | None = None
    segment: int = -1
    turned: bool = False
    routed: bool = False
    kernel: tuple[int, int, int] | None = None
    groups: int = 1
    bias_dtype: torch.dtype | None = None
    pre: tuple[Hadamard, ...] = ()
    zeros: Zeros | None = None

    @property
    def as_dense(self) -> LayerSpec:
        """The same as a plain weight, where its format is a layout of plain numbers (`Format.dense`); else itself."""
        dtype = None if self.format is None else self.format.dense
        return self if dtype is None else replace(self, format=None, source_dtype=dtype, bias_dtype=self._own_bias)

    @property
    def _own_bias(self) -> torch.dtype | None:
        return self.stored_bias_dtype if self.has_bias else self.bias_dtype

    @property
    def source_bytes(self) -> int:
        """Bytes of the weight as the source stores it."""
        return self.shape[0] * self.shape[1] * self.source_dtype.itemsize

    @property
    def bias_bytes(self) -> int:
        """Bytes of the bias as the source stores it."""
        return self.shape[0] * self.stored_bias_dtype.itemsize if self.has_bias else 0

    @property
    def stored_bias_dtype(self) -> torch.dtype:
        """The weight's, unless a pass gave the layer a bias of its own."""
        return self.bias_dtype or self.source_dtype


@dataclass(frozen=True, eq=False)
class Layer:
    """One weight with its bias and input grid. A pass returns `replace(layer, …)`.

    weight: (out, in) in the source's dtype, or a QuantTensor; bias (out,) or None; act: input grid or None;
    users, groups: see LayerSpec; notes: a pass's remarks for the report, taken off before the layer is stored; pre:
    transforms of the input at run time, in order, before it is rounded; mask: (out, in) bool, what is left of a weight
    that a pass before has pruned, None where none has: the rest must stay zero, and grids are fitted without it. The
    engine sets it for the passes that come after and takes it off again; it is not stored.
    """

    name: str
    kind: LayerKind
    weight: Tensor | QuantTensor
    bias: Tensor | None = None
    act: ActSpec | None = None
    users: tuple[str, ...] = ()
    groups: int = 1
    notes: tuple[str, ...] = ()
    pre: tuple[Hadamard, ...] = ()
    mask: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return int(self.weight.shape[0]), int(self.weight.shape[1])

    @property
    def format(self) -> Format | None:
        """The weight's format, None while it is a plain tensor."""
        return self.weight.format if isinstance(self.weight, QuantTensor) else None

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight, everything counted."""
        if isinstance(self.weight, QuantTensor):
            return self.weight.bits_per_weight
        return 8.0 * self.weight.element_size()

    def float_weight(self) -> Tensor:
        """(out, in) float32, decoded if need be."""
        return self.weight.dequantize() if isinstance(self.weight, QuantTensor) else self.weight.float()

    @property
    def as_dense(self) -> Layer:
        """See LayerSpec."""
        dtype = None if self.format is None else self.format.dense
        return self if dtype is None else replace(self, weight=self.float_weight().to(dtype))

    def with_weight(self, weight: Tensor | QuantTensor) -> Layer:
        """The same layer with another weight."""
        return replace(self, weight=weight)
