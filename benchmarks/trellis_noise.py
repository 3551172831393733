"""What codes lose of Gaussian noise, bit by bit, against published figures and the bound; the time to search a tile.

    python benchmarks/trellis_noise.py [--tiles 512]

The error is the mean square over that of the noise, at the format's own scale and counted without scales. No code of b
bits goes below 4^-b; `published` is QTIP's trellis of 2^12 states (arXiv 2406.11235, Table 1), and at 2 bits the best
scalar grid loses 0.118. Codebooks are learned from other noise than they are tried on. Times are processor seconds of
one thread, the kernel's on each path that this machine has. Writes results/trellis_noise.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress.formats.codebook import Codebook
from compress.formats.trellis import FILL
from compress.kernels import kernel_paths
from compress.kernels import trellis as kernel
from compress.maths import trellis

RESULT = Path(__file__).parent / "results" / "trellis_noise.json"
PUBLISHED = {2: 0.0733, 3: 0.0198, 4: 0.0055}
# vectors, entries, stages of 2, 3 and 4 bits
BOOKS = ((4, 256, 1), (8, 256, 2), (4, 4096, 1), (2, 256, 1))


def noise(rows: int, columns: int, seed: int) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def coded(bits: int, code: str, tiles: int) -> dict[str, Any]:
    wanted, values = noise(tiles, trellis.SYMBOLS, bits), trellis.table(code)
    scale = float(values.std()) * FILL[bits]
    started = time.process_time()
    found = kernel.search(wanted * scale, bits, values)
    spent = time.process_time() - started
    error = float((trellis.decode(found, bits, code) / scale - wanted).square().mean() / wanted.square().mean())
    row = {"bits": bits, "code": code, "error": error, "over_bound": error * 4**bits, "tile_ms": spent / tiles * 1e3}
    return row | ({"published": PUBLISHED[bits]} if bits in PUBLISHED else {})


def booked(vector: int, entries: int, stages: int, tiles: int) -> dict[str, Any]:
    form = Codebook(vector, entries, stages, scale="none")
    rows = tiles * 2
    params, weight = form.fit(noise(rows, 128, 1)), noise(rows, 128, 2)
    error = float(
        (form.quantize(weight, params, torch.arange(128))[1] - weight).square().mean() / weight.square().mean()
    )
    bits = form.bits * stages / vector
    return {"bits": bits, "codebook": str(form), "error": error, "over_bound": error * 4**bits}


def times() -> dict[str, float]:
    """Path → milliseconds for a tile of 2 bits."""
    found = {}
    wanted, values = noise(64, trellis.SYMBOLS, 0), trellis.table("mul1")
    for path in kernel_paths():
        os.environ["COMPRESS_KERNELS"] = path
        count = 4 if path == "torch" else len(wanted)
        search = trellis.search if path == "torch" else kernel.search
        started = time.process_time()
        search(wanted[:count], 2, values)
        found[path] = round((time.process_time() - started) / count * 1e3, 2)
    del os.environ["COMPRESS_KERNELS"]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiles", type=int, default=512)
    tiles = parser.parse_args().tiles
    torch.set_num_threads(1)
    rows = [coded(bits, code, tiles) for bits in FILL for code in trellis.MULTIPLIERS]
    rows += [booked(*sizes, tiles) for sizes in BOOKS]
    for row in rows:
        print(f"{row['bits']} bits, {row.get('code') or row['codebook']}: {row['error']:.6f}", flush=True)
    result = {
        "machine": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "tiles": tiles,
        "rows": rows,
        "tile_ms_by_path": times(),
    }
    RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf8")
    print(f"Wrote {RESULT}; a tile of 2 bits takes {result['tile_ms_by_path']} ms.")


if __name__ == "__main__":
    main()
