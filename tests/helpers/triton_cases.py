"""A process of its own for Triton, whose interpreter has to be chosen before it is imported.

    python -m helpers.triton_cases cpu     # TRITON_INTERPRET=1: every case in the interpreter
    python -m helpers.triton_cases cuda    # on a GPU
    python -m helpers.triton_cases compile # machine code for GPUs that need not be here

The last line is JSON: what was found per case.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
from torch import Tensor

from compress.formats import parse_format
from compress.formats.codebook import Codebook
from compress.kernels import FEW_TOKENS, GpuProduct, as_decoding
from compress.maths import grid

# rows and units that fill no tile, several tiles of units, odd vectors, every number of bytes that a code lies across
CASES = {
    "two entries": ("codebook(vector=8, entries=2, stages=1)", 1, 8),
    "bytes": ("codebook(vector=8, entries=256, stages=2)", 13, 520),
    "groups": ("codebook(vector=4, entries=16, stages=3, groups=2)", 9, 24),
    "three groups": ("codebook(vector=6, entries=128, stages=4, groups=3)", 5, 90),
    "scale of columns": ("codebook(vector=3, entries=8, stages=2, scale=column)", 6, 33),
    "no scale": ("codebook(vector=24, entries=512, stages=2, scale=none)", 3, 48),
    "13 bits": ("codebook(vector=5, entries=8192, stages=1)", 6, 35),
    "single weights": ("codebook(vector=1, entries=32, stages=1)", 7, 290),
    "out": ("codebook(vector=8, entries=256, stages=2, out)", 13, 140),
    "out, groups": ("codebook(vector=6, entries=4096, stages=1, out, groups=2)", 20, 64),
    "out, scale of rows": ("codebook(vector=4, entries=16, stages=3, out, groups=3, scale=row)", 10, 9),
    "out, no scale": ("codebook(vector=24, entries=65536, stages=1, out, scale=none)", 50, 10),
    "out, pairs": ("codebook(vector=2, entries=4, stages=2, out)", 7, 21),
    "out, single weights": ("codebook(vector=1, entries=1024, stages=1, out)", 5, 18),
}
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
FEW, MANY = FEW_TOKENS - 1, FEW_TOKENS + 2
TOKENS = {"float32": (1, FEW, MANY), "float16": (FEW, MANY), "bfloat16": (1, MANY)}
# case, compute capability, dtype of the inputs
BUILDS = (("three groups", 75, "fp16"), ("three groups", 120, "fp32"), ("out, groups", 90, "bf16"))


def stored(name: str) -> tuple[Codebook, dict[str, Tensor], tuple[int, int]]:
    """A layer as its format stores it, of random parts."""
    text, out, columns = CASES[name]
    form = parse_format(text)
    assert isinstance(form, Codebook)
    made = torch.Generator().manual_seed(out * columns)
    rows, units = form.units((out, columns))
    codes = torch.randint(0, form.entries, (rows, units * form.stages), generator=made, dtype=torch.int32)
    codes[0, 0], codes[-1, -1] = form.entries - 1, form.entries - 1
    tensors = {"codes": grid.pack_bits(codes, form.bits)}
    for part, (shape, _) in form.tensor_specs((out, columns)).items():
        if part != "codes":
            tensors[part] = (torch.rand(shape, generator=made) + 0.5).half()
    tensors["codebook"] = (tensors["codebook"] - 1) * 2
    return form, tensors, (out, columns)


def product(name: str, device: str, path: str | None) -> tuple[GpuProduct, Tensor]:
    """The product, and the weight by the format's own decoding."""
    form, tensors, shape = stored(name)
    made = GpuProduct(*form.unpack(tensors, shape), shape, form.axis, device=device, path=path)
    return made, form.dequantize(tensors, shape)


def checked(name: str, device: str, path: str | None) -> dict[str, Any]:
    """A case: largest difference of the decoded weight, relative errors of products by dtype and number of tokens."""
    form, tensors, _ = stored(name)
    multiplies, weight = product(name, device, path)
    out, columns = weight.shape
    decoded, few = multiplies.dequantize().cpu(), multiplies.dequantize(out // 3, out - out // 4).cpu()
    found: dict[str, Any] = {"kernel": multiplies.kernel, "nbytes": multiplies.nbytes}
    found["stored"] = sum(tensor.nbytes for tensor in tensors.values())
    found["packed"] = bool(
        multiplies._weight and torch.equal(multiplies._weight.codes[:-2].cpu(), tensors["codes"].flatten())
    )
    found["decoded"] = float((decoded - weight).abs().max())
    found["rows"] = bool(torch.equal(few, decoded[out // 3 : out - out // 4]))
    made = torch.Generator().manual_seed(1)
    for dtype_name, dtype in DTYPES.items():
        for tokens in TOKENS[dtype_name]:
            x = torch.randn(tokens, columns, generator=made).to(dtype)
            y = multiplies(x.to(device))
            assert y.dtype == dtype and y.shape == (tokens, out) and form.axis == multiplies.axis
            found[f"{dtype_name}, {tokens}"] = error(y, x, weight)
    with as_decoding():
        x = torch.randn(MANY, columns, generator=made)
        found["as decoding"] = error(multiplies(x.to(device)), x, weight)
    bad = torch.ones(2, columns)
    bad[0, columns // 2] = float("nan")
    y = multiplies(bad.to(device)).cpu()
    found["not finite"] = bool(not y[0].isfinite().any() and y[1].isfinite().all())
    return found


def error(found: Tensor, x: Tensor, weight: Tensor) -> float:
    """Relative to the norm of the exact result."""
    exact = x.double() @ weight.double().T
    return float((found.cpu().double() - exact).norm() / exact.norm())


def compiled(name: str, capability: int, dtype: str) -> dict[str, int]:
    """Bytes of machine code of both kernels for a chip."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from compress.kernels import triton_codebook

    weight, found = product(name, "cpu", "torch")[0]._packed(*_codes(name)), {}
    constants = {**triton_codebook.constants(weight), "T": triton_codebook.MOST_TOKENS}
    book = {torch.float16: "*fp16", torch.float32: "*fp32"}[weight.book.dtype]
    pointers = {"codes": "*u8", "book": book, "x": f"*{dtype}", "y": f"*{dtype}", "weight": f"*{dtype}"}
    pointers |= {
        f"{scale}_scale": "*fp32" if constants[f"HAS_{scale.upper()}"] else book for scale in ("row", "column")
    }
    for kernel in (triton_codebook.few_tokens, triton_codebook.decode_rows):
        fixed = {key: value for key, value in constants.items() if key in kernel.arg_names}
        signature = {key: "constexpr" if key in fixed else pointers.get(key, "i32") for key in kernel.arg_names}
        source = ASTSource(fn=kernel, signature=signature, constexprs=fixed)
        code = triton.compile(source, target=GPUTarget("cuda", capability, 32)).asm["cubin"]
        found[kernel.fn.__name__] = len(code)
    return found


def _codes(name: str) -> tuple[Tensor, int]:
    form, tensors, shape = stored(name)
    return form.unpack(tensors, shape).codes, form.entries


def main(what: str) -> None:
    if what == "compile":
        told = {f"{name}, {chip}": compiled(name, chip, dtype) for name, chip, dtype in BUILDS}
    else:
        told = {name: checked(name, what, "triton") for name in CASES}
    print(json.dumps(told))


if __name__ == "__main__":
    main(sys.argv[1])
