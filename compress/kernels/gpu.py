"""Products of vector-quantized weights with activations in a GPU's memory: by Triton, without it by torch."""

from __future__ import annotations

import os
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from compress import extras
from compress.errors import UnsupportedError
from compress.kernels import library, packing, plain
from compress.kernels.checks import check_input, check_parts, check_rows
from compress.kernels.codebook import CodebookProduct, few_tokens
from compress.maths import grid

# bytes of the dense rows that are there at a time
PANEL = 64 << 20
COMPUTED = (torch.float16, torch.bfloat16, torch.float32)
# pointers into a codebook are 32 bits in the kernels
MOST_VALUES = 1 << 31


def codebook_product(
    codes: Tensor,
    codebook: Tensor,
    scale: Tensor,
    shape: tuple[int, int],
    axis: str = "in",
    *,
    device: torch.device | str | None = None,
    path: str | None = None,
) -> CodebookProduct | GpuProduct:
    """The product for a device, None: that of the codes. Arguments, results and errors: see `CodebookProduct`."""
    where = torch.device(device) if device is not None else codes.device
    if where.type == "cpu":
        return CodebookProduct(codes.cpu(), codebook.cpu(), scale.cpu(), shape, axis, path=path)
    return GpuProduct(codes, codebook, scale, shape, axis, device=where, path=path)


class GpuProduct:
    """As `CodebookProduct`, with everything it holds in the memory of `device`.

    path: "triton" or "torch"; None takes what COMPRESS_KERNELS names, else Triton where it is installed and the device
    is one of CUDA (or ROCm), else torch.

    Held: with Triton the codes' bits without gaps, as the format stores them, with torch one or two bytes each; the
    codebooks in float16 where that holds them exactly (as the format does), else in float32.
    Rounding: up to `FEW_TOKENS` tokens are summed in float32, and rounded to the dtype of the inputs at the end; for
    more of them rows of the weight are decoded to that dtype and multiplied by torch, as in a dense layer of it. The
    last bits of float32 may depend on how many tokens are computed together.

    Raises: UsageError: as CodebookProduct. UnsupportedError: a path that is not there for this device, and why.
    """

    def __init__(
        self,
        codes: Tensor,
        codebook: Tensor,
        scale: Tensor,
        shape: tuple[int, int],
        axis: str = "in",
        *,
        device: torch.device | str,
        path: str | None = None,
    ) -> None:
        check_parts(codes, codebook, scale, shape, axis)
        self.shape, self.axis = shape, axis
        self.path = chosen_path(torch.device(device), path)
        self._rows, self._units, self._stages = codes.shape
        self._vector = codebook.shape[3]
        self._book = _smallest(codebook.to(device, torch.float32))
        self.device = self._book.device  # with the number that "cuda" leaves open
        flat = scale.to(self.device, torch.float32)
        self._row_scale = flat.expand(shape[0], -1)[:, 0].contiguous() if scale.shape[1] == 1 else None
        self._column_scale = None if scale.shape[1] == 1 else flat.flatten().contiguous()
        self._codes = torch.empty(0)
        self._weight: Any = None
        if self.path == library.TORCH:
            self._codes = packing.narrow(codes, codebook.shape[2]).to(self.device).contiguous()
        else:
            self._weight = self._packed(codes, codebook.shape[2])

    @property
    def kernel(self) -> str:
        """What computes a single token: "codebook triton" or "codebook torch"."""
        return f"codebook {self.path}"

    @property
    def nbytes(self) -> int:
        """Bytes held on the device: codes, codebooks and scale."""
        codes, book = (self._weight.codes, self._weight.book) if self._weight is not None else (self._codes, self._book)
        return sum(each.nbytes for each in (codes, book, self._row_scale, self._column_scale) if each is not None)

    def __call__(self, x: Tensor) -> Tensor:
        """x (..., in) floating, on the device → (..., out), of x's dtype.

        Raises: UsageError: x of another width, kind or device, or one that gradients are wanted of.
        """
        check_input(x, self.shape[1], self.device)
        dtype = x.dtype if x.dtype in COMPUTED else torch.float32
        tokens = x.detach().reshape(-1, self.shape[1])
        few = len(tokens) <= few_tokens()
        if few and self._weight is not None:
            found: Tensor = _kernels().product(self._weight, tokens.to(dtype).contiguous())
        else:
            found = self._by_panels(tokens.to(torch.float32 if few else dtype))
        return found.reshape(*x.shape[:-1], self.shape[0]).to(x.dtype)

    def dequantize(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows start to stop (all) of the weight: (stop - start, in) float32, on the device."""
        stop = check_rows(start, stop, self.shape[0])
        per_code = 1 if self.axis == "in" else self._vector
        first = start // per_code
        found = self._decoded(first, -(-stop // per_code), torch.float32)
        return found[start - first * per_code : stop - first * per_code]

    def _packed(self, codes: Tensor, entries: int) -> Any:
        """What the kernels read. Entries are filled up to a power of two with zeros."""
        bits = max((entries - 1).bit_length(), 1)
        stream = grid.pack_bits(codes.cpu().flatten(1), bits)
        width = 1 << (self._vector - 1).bit_length()
        self._book = F.pad(self._book, (0, width - self._vector)).contiguous()
        if self._book.numel() >= MOST_VALUES:
            raise UnsupportedError(f"Codebooks of {self._book.numel()} values: Triton's kernels take less than 2^31.")
        return _kernels().Weight(
            F.pad(stream.flatten(), (0, 2)).to(self.device), self._book, self._row_scale, self._column_scale,
            self.shape, self._rows, self._units, stream.shape[1], bits, self._vector, self.axis == "out",
        )  # fmt: skip

    def _by_panels(self, tokens: Tensor) -> Tensor:
        """(n, in) → (n, out), the dense weight a few rows at a time."""
        per_code = 1 if self.axis == "in" else self._vector
        step = max(PANEL // (tokens.element_size() * self.shape[1] * per_code), 1)
        found = torch.empty(len(tokens), self.shape[0], dtype=tokens.dtype, device=self.device)
        for start in range(0, self._rows, step):
            panel = self._decoded(start, min(start + step, self._rows), tokens.dtype)
            found[:, start * per_code : start * per_code + len(panel)] = tokens @ panel.T
        return found

    def _decoded(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """Rows of codes → scaled rows of the weight, all that they stand for and that there are: (…, in) dtype."""
        if self._weight is not None:
            found: Tensor = _kernels().decoded(self._weight, start, stop, dtype)
            return found
        weight = plain.decoded(self._codes[start:stop], self._book.float(), self.axis)
        first = start * (1 if self.axis == "in" else self._vector)
        weight = weight[: self.shape[0] - first]
        if self._row_scale is not None:
            weight = weight * self._row_scale[first : first + len(weight), None]
        return (weight if self._column_scale is None else weight * self._column_scale).to(dtype)


def missing_triton() -> str:
    """Why there is no Triton; empty where there is."""
    try:
        _kernels()
    except UnsupportedError as error:
        return str(error)
    return ""


def gpu_paths() -> tuple[str, ...]:
    """Paths for CUDA devices, fastest first."""
    return (library.TORCH,) if missing_triton() else (library.TRITON, library.TORCH)


def chosen_path(device: torch.device, asked: str | None = None) -> str:
    """The path asked for, else the one that COMPRESS_KERNELS names, else the fastest for this device.

    Raises: UsageError: no such path. UnsupportedError: it is not there for this device, and why.
    """
    named, takes = library.named_path(asked), device.type == "cuda" or _interpreted()
    if not named:
        return gpu_paths()[0] if takes else library.TORCH
    if named == library.TORCH:
        return named
    if named != library.TRITON:
        raise UnsupportedError(f"Kernels '{named}' compute on the CPU; for {device} there are triton and torch.")
    if not takes:
        raise UnsupportedError(f"Kernels 'triton' compute on CUDA devices; for {device} there is torch.")
    _kernels()
    return named


def _interpreted() -> bool:
    """Whether Triton's interpreter stands in for a GPU, on tensors of any device."""
    return os.environ.get("TRITON_INTERPRET", "") == "1" and not missing_triton()


@cache
def _kernels() -> Any:
    """The module of kernels. Raises: UnsupportedError naming the extra that installs Triton."""
    extras.load("triton", "Triton", "triton")
    from compress.kernels import triton_codebook

    return triton_codebook


def _smallest(book: Tensor) -> Tensor:
    """In float16, where that changes no value."""
    half = book.half()
    return half if torch.equal(half.float(), book) else book
