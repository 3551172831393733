"""Products of vector-quantized weights with activations, from the codes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from math import inf

import torch
from torch import Tensor
from torch.nn import functional as F

from compress.errors import UsageError
from compress.kernels import library, packing, plain
from compress.kernels.checks import check_input, check_parts, check_rows

# With more tokens than this, decoding rows and multiplying them by torch is faster than the codes token by token.
FEW_TOKENS = 4
# bytes of the dense rows that are there at a time
PANEL = 4 << 20
CPU = torch.device("cpu")

_few: ContextVar[float] = ContextVar("few", default=FEW_TOKENS)


@contextmanager
def as_decoding() -> Iterator[None]:
    """Inside, every token is computed as a single one is, with the same rounding, however many there are."""
    before = _few.set(inf)
    try:
        yield
    finally:
        _few.reset(before)


def few_tokens() -> float:
    """Up to so many tokens are computed straight from the codes."""
    return _few.get()


class CodebookProduct:
    """x → x Wᵀ for a weight of additive codebooks, W = scale · Σ over stages of codebook[stage][code].

    codes: (rows, units, m) integers; rows = out, or ⌈out/v⌉ for axis "out"; units = in/v, or in.
    codebook: (g, m, k, v) float32; the g groups of columns are equally wide. v: at most 64, k: at most 65536.
    scale: (out, 1), (1, in) or (1, 1) float32.
    shape: (out, in). axis: "in": a code stands for v columns of one row; "out": for v rows of one column.
    path: as in COMPRESS_KERNELS, over which it goes; None takes the fastest there is.

    Rounding, as a share of the result's norm: codebooks of up to 256 entries along axis "in" go by look-up, whose
    tables have 12 bits with avx512-vbmi, or with avx2 and up to 16 entries (7e-4 on normal weights and inputs), and 10
    with avx2 and more entries (3e-3) for up to `FEW_TOKENS` tokens; all else is float32. NaN or infinity among the
    inputs of a token leaves none of its outputs finite.

    Raises: UsageError: shapes or codes that do not fit, no such path. UnsupportedError: a path this machine lacks.
    """

    def __init__(
        self,
        codes: Tensor,
        codebook: Tensor,
        scale: Tensor,
        shape: tuple[int, int],
        axis: str = "in",
        *,
        path: str | None = None,
    ) -> None:
        check_parts(codes, codebook, scale, shape, axis)
        if {each.device.type for each in (codes, codebook, scale)} != {"cpu"}:
            raise UsageError("These kernels compute on the CPU. `codebook_product` makes the product for a GPU.")
        self.shape, self.axis = shape, axis
        self.path = library.chosen_path(path)
        self._rows, self._units, self._stages = codes.shape
        self._groups, _, self._entries, self._vector = codebook.shape
        self._by_lookup = axis == "in" and self._entries <= 256
        self._by_nibbles = self._by_lookup and self._entries <= 16 and self.path not in (library.TORCH, "portable")
        self._codes = self._packed(packing.narrow(codes, self._entries))
        width = self._vector if self.path == library.TORCH else packing.padded_width(self._vector)
        self._book = F.pad(codebook.float(), (0, width - self._vector)).contiguous()
        self._tables = torch.empty(0)
        if self._by_lookup and self.path != library.TORCH:
            width = 16 if self._by_nibbles else 256
            self._tables = F.pad(codebook.float().transpose(2, 3), (0, width - self._entries)).contiguous()
        self._row_scale = scale.float().expand(shape[0], -1)[:, 0].contiguous() if scale.shape[1] == 1 else None
        self._column_scale = None if scale.shape[1] == 1 else scale.float().flatten().contiguous()

    @property
    def kernel(self) -> str:
        """What computes a single token: "codebook avx512-vbmi", "codebook decode avx2", "codebook torch"."""
        if self._by_lookup or self.path == library.TORCH:
            return f"codebook {self.path}"
        return f"codebook decode {'portable' if self.path == 'portable' else 'avx2'}"

    @property
    def nbytes(self) -> int:
        """Bytes held: codes, codebooks (once more in the order of the tables) and scale, as float32."""
        held = (self._codes, self._book, self._tables, self._row_scale, self._column_scale)
        return sum(each.nbytes for each in held if each is not None)

    def __call__(self, x: Tensor) -> Tensor:
        """x (..., in) floating → (..., out), of x's dtype; computed in float32.

        Raises: UsageError: x of another width, kind or device, or one that gradients are wanted of.
        """
        check_input(x, self.shape[1], CPU)
        tokens = x.detach().reshape(-1, self.shape[1]).float()
        tokens = (tokens if self._column_scale is None else tokens * self._column_scale).contiguous()
        if len(tokens) > few_tokens():
            found = self._by_panels(tokens)
        else:
            found = (
                torch.stack([self._one(token) for token in tokens]) if len(tokens) else x.new_empty(0, self.shape[0])
            )
        return found.reshape(*x.shape[:-1], self.shape[0]).to(x.dtype)

    def dequantize(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows start to stop (all) of the weight: (stop - start, in) float32."""
        stop = check_rows(start, stop, self.shape[0])
        per_code = 1 if self.axis == "in" else self._vector
        first = start // per_code // packing.BLOCK * packing.BLOCK
        rows = self._decoded(first, -(-stop // per_code))[start - first * per_code : stop - first * per_code]
        rows = rows if self._row_scale is None else rows.mul_(self._row_scale[start:stop, None])
        return rows if self._column_scale is None else rows.mul_(self._column_scale)

    def _packed(self, codes: Tensor) -> Tensor:
        if self.path == library.TORCH:
            return codes.contiguous()
        if self._by_nibbles:
            return packing.by_nibbles(codes)
        return packing.by_tables(codes) if self._by_lookup else packing.by_eights(codes)

    @property
    def _kind(self) -> int:
        """How the codes lie, as decode.c counts it: bytes, pairs of them, halves."""
        return 2 if self._by_nibbles else int(self._entries > 256)

    def _one(self, x: Tensor) -> Tensor:
        """(in) → (out)"""
        if self.path == library.TORCH:
            return self._one_by_torch(x)
        threads, out = library.thread_count(self._rows * self._units * self._stages), self.shape[0]
        path, opened = library.PATHS[self.path], library.library()
        if self._by_lookup:
            y, scale = torch.empty(out), self._row_scale if self._row_scale is not None else torch.ones(out)
            sizes = (out, self._units, self._stages, self._vector, self._groups)
            read = [each.data_ptr() for each in (self._codes, self._tables, scale, x, y)]
            if self._by_nibbles:
                memory = library.scratch(opened.codebook_nibbles_memory(self._units, self._stages))
                opened.codebook_nibbles(path, threads, *sizes, *read, memory)
            else:
                memory = library.scratch(opened.codebook_lookup_memory(path, out))
                opened.codebook_lookup(path, threads, *sizes, *read, memory)
            return y
        return self._one_by_decoding(x, path, threads)

    def _one_by_decoding(self, x: Tensor, path: int, threads: int) -> Tensor:
        across, padded = self.axis == "out", self._book.shape[-1]
        if not across and padded != self._vector:
            x = F.pad(x.view(-1, self._vector), (0, padded - self._vector)).flatten()
        y = torch.empty(self._rows * self._vector if across else self._rows)
        sizes = (self._rows, self._units, self._stages, self._entries, self._vector, padded, self._groups)
        library.library().codebook_product(
            path, threads, self._kind, int(across), *sizes,
            *(each.data_ptr() for each in (self._codes, self._book, x, y)),
        )  # fmt: skip
        y = y[: self.shape[0]]
        return y if self._row_scale is None else y.mul_(self._row_scale)

    def _one_by_torch(self, x: Tensor) -> Tensor:
        if self.axis == "out" or self._entries > self._rows:  # tables would cost more than the product
            return self._by_panels(x[None])[0]
        y = plain.by_lookup(x, self._codes, self._book)
        return y if self._row_scale is None else y.mul_(self._row_scale)

    def _by_panels(self, tokens: Tensor) -> Tensor:
        """(n, in) → (n, out), the dense weight a few rows at a time."""
        per_code = 1 if self.axis == "in" else self._vector
        step = max(PANEL // (4 * self.shape[1] * per_code) // packing.BLOCK, 1) * packing.BLOCK
        found = torch.empty(len(tokens), self._rows * per_code)
        for start in range(0, self._rows, step):
            stop = min(start + step, self._rows)
            found[:, start * per_code : stop * per_code] = tokens @ self._decoded(start, stop).T
        found = found[:, : self.shape[0]]
        return found if self._row_scale is None else found.mul_(self._row_scale)

    def _decoded(self, start: int, stop: int) -> Tensor:
        """Rows of codes, `start` a multiple of 64, as weights without a scale: (rows · v for axis out, in)."""
        if self.path == library.TORCH:
            return plain.decoded(self._codes[start:stop], self._book, self.axis)
        across = self.axis == "out"
        out = torch.empty((stop - start) * (self._vector if across else 1), self.shape[1])
        layout = -(-self._rows // packing.BLOCK) * packing.BLOCK if self._by_lookup else 0
        sizes = (layout, self._units, self._stages, self._entries, self._vector, self._book.shape[-1], self._groups)
        threads = library.thread_count((stop - start) * self._units * self._stages)
        library.library().codebook_rows(
            library.PATHS[self.path], threads, self._kind, int(across), *sizes,
            self._codes.data_ptr(), self._book.data_ptr(), start, stop, out.data_ptr(),
        )  # fmt: skip
        return out
