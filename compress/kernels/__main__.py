"""`python -m compress.kernels`: which kernels this machine has; with `build`: compile them."""

from __future__ import annotations

import sys

from compress.errors import CompressError
from compress.kernels import gpu, library


def main(words: list[str]) -> int:
    """Exit code."""
    try:
        if words not in ([], ["build"]):
            print("Usage: python -m compress.kernels [build]", file=sys.stderr)
            return 2
        if words:
            print(f"Built {library.build()}.")
        print(f"Paths of this machine, fastest first: {', '.join(library.kernel_paths())}.")
        if why := library.missing():
            print(f"No compiled library: {why}.")
        print(f"Paths for a CUDA device, fastest first: {', '.join(gpu.gpu_paths())}.")
        if why := gpu.missing_triton():
            print(why)
    except CompressError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
