"""Products with compressed weights on the CPU or a GPU, straight from the codes.

    product = CodebookProduct(*form.unpack(tensors, shape), shape, form.axis)
    y = product(x)                     # x (..., in) floating → y (..., out), x's dtype
    product.kernel                     # "codebook avx512-vbmi": what computes one token
    product.nbytes                     # bytes held: codes, codebooks, scale
    product.dequantize(start, stop)    # rows of the weight, float32
    kernel_paths()                     # paths this machine has, fastest first, "torch" last
    missing()                          # why there is no compiled library; "" where there is one
    codebook_product(…, device="cuda") # the same in a GPU's memory: .kernel is "codebook triton"
    PiecedProduct(parts, shape)        # of a format with outlier columns, an order or a bias: one for each piece

A compiled library beside this file (`lookup.c`, `nibble.c`, `decode.c`: plain functions reached through ctypes, built
with the package where there is a compiler) does the work: up to `FEW_TOKENS` tokens one at a time from the codes, more
of them by panels of rows that are decoded and multiplied by torch, so that the dense weight is never whole in memory.
Without the library torch does all of it, many times slower for one token, and `kernel` says "codebook torch"; nothing
is compiled when a program runs. `python -m compress.kernels` tells what there is, `python -m compress.kernels build`
compiles the library with the machine's `cc`.

On a GPU Triton's kernels (`triton_codebook.py`, extra `triton`) do both, from codes that are packed as they are stored;
without Triton torch decodes panels of rows for every product, and `kernel` says "codebook torch".

The environment variable COMPRESS_KERNELS names the path to take: avx512-vbmi, avx2, portable or torch, on a GPU triton
or torch. A path that this machine lacks, or that is not for the device of the codes, is refused with the reason.
Threads on the CPU are as many as torch uses (`torch.set_num_threads`); their number does not change a byte of the
result.
"""

from compress.kernels.codebook import FEW_TOKENS, CodebookProduct, as_decoding
from compress.kernels.gpu import GpuProduct, codebook_product, gpu_paths, missing_triton
from compress.kernels.library import kernel_paths, missing
from compress.kernels.pieced import Part, PiecedProduct

__all__ = [
    "FEW_TOKENS",
    "CodebookProduct",
    "GpuProduct",
    "Part",
    "PiecedProduct",
    "as_decoding",
    "codebook_product",
    "gpu_paths",
    "kernel_paths",
    "missing",
    "missing_triton",
]
