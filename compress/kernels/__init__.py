"""Products with compressed weights on the CPU, straight from the codes.

    product = CodebookProduct(*form.unpack(tensors, shape), shape, form.axis)
    y = product(x)                     # x (..., in) floating → y (..., out), x's dtype
    product.kernel                     # "codebook avx512-vbmi": what computes one token
    product.nbytes                     # bytes held: codes, codebooks, scale
    product.dequantize(start, stop)    # rows of the weight, float32
    kernel_paths()                     # paths this machine has, fastest first, "torch" last
    missing()                          # why there is no compiled library; "" where there is one

A compiled library beside this file (`lookup.c`, `decode.c`: plain functions reached through ctypes, built with the
package where there is a compiler) does the work: up to `FEW_TOKENS` tokens one at a time from the codes, more of them
by panels of rows that are decoded and multiplied by torch, so that the dense weight is never whole in memory. Without
the library torch does all of it, many times slower for one token, and `kernel` says "codebook torch"; nothing is
compiled when a program runs. `python -m compress.kernels` tells what there is, `python -m compress.kernels build`
compiles the library with the machine's `cc`.

The environment variable COMPRESS_KERNELS names the path to take: avx512-vbmi, avx2, portable or torch. A path that
this machine lacks is refused with the reason. Threads are as many as torch uses (`torch.set_num_threads`); their
number does not change a byte of the result.
"""

from compress.kernels.codebook import FEW_TOKENS, CodebookProduct, as_decoding
from compress.kernels.library import kernel_paths, missing

__all__ = ["FEW_TOKENS", "CodebookProduct", "as_decoding", "kernel_paths", "missing"]
