"""What each store of a cache loses on keys with channels that stand out, beside the bits that it holds.

    python benchmarks/kv_stores.py

Keys are drawn: 16 heads of 64 channels, 4096 tokens, normal, plus an offset of 10 on three channels of each head before
they are rotated (base 10,000, halves); values and queries are normal. The last 256 queries attend to all tokens before
them with keys read from the store and values in float. Static scales see the first 512 tokens only. The error is the
norm of the outputs' difference by the outputs' norm, of each head: mean and extremes over heads. Bits are those of all
tensors that the store holds, for each entry. Writes results/kv_stores.json.
"""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress.kv.calibrating import Magnitudes, Method, Ranges
from compress.kv.spec import KvSpec
from compress.kv.static import has_static, static_format
from compress.kv.storing import store_of

RESULT = Path(__file__).parent / "results" / "kv_stores.json"
HEADS, SIZE, TOKENS, SEEN, QUERIES = 16, 64, 4096, 512, 256
OFFSET, BASE = 10.0, 10_000.0


def rotated(states: Tensor) -> Tensor:
    """(1, heads, n, size) at positions 0 to n − 1."""
    angles = torch.arange(states.shape[2])[:, None].double() * BASE ** (-torch.arange(0, SIZE, 2).double() / SIZE)
    cos, sin = angles.cos().float().repeat(1, 2), angles.sin().float().repeat(1, 2)
    first, second = states.chunk(2, -1)
    return states * cos + torch.cat([-second, first], -1) * sin


def drawn(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys, values."""
    maker = torch.Generator().manual_seed(seed)
    query, key, value = torch.randn(3, 1, HEADS, TOKENS, SIZE, generator=maker).unbind()
    for head in range(HEADS):
        key[0, head, :, torch.randperm(SIZE, generator=maker)[:3]] += OFFSET
    return rotated(query), rotated(key), value


def outputs(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Of the last queries, (heads, queries, size) float64."""
    asked, places = query[0, :, -QUERIES:].double(), torch.arange(TOKENS)
    products = asked @ key[0].double().transpose(1, 2) * SIZE**-0.5
    later = places[None] > places[-QUERIES:, None]
    return products.masked_fill(later, -torch.inf).softmax(-1) @ value[0].double()


def static(text: str, method: Method, envelope: bool, key: Tensor) -> dict[str, Tensor]:
    """The scales that the first tokens give."""
    pairs = (torch.arange(SIZE) + SIZE // 2) % SIZE if envelope else None
    found, seen = Magnitudes(static_format(text), pairs), key[:, :, :SEEN]
    found.reach(seen)
    found.count(seen)
    return {"key_scale": found.scale(Ranges(method, envelope=envelope))}


def cases() -> list[tuple[str, KvSpec, Method, bool]]:
    """Name, store and, of static scales, how they are chosen."""
    found: list[tuple[str, KvSpec, Method, bool]] = []
    for bits in ("int8", "int4"):
        found += [
            (f"{bits} static tensor", KvSpec(keys=f"{bits}(tensor)", static=True), "minmax", False),
            (f"{bits} static channel", KvSpec(keys=f"{bits}(channel)", static=True), "minmax", False),
        ]
        for method in ("minmax", "percentile", "mse"):
            name = f"{bits} static channel, envelope, {method}"
            found.append((name, KvSpec(keys=f"{bits}(channel)", static=True), method, True))  # type: ignore[arg-type]
        found += [
            (f"{bits} token", KvSpec(keys=f"{bits}(token)"), "minmax", False),
            (f"{bits} token, rotated", KvSpec(keys=f"{bits}(token)", rotated=True), "minmax", False),
            (f"{bits} group 32, asymmetric", KvSpec(keys=f"{bits}(group=32, float_zero)"), "minmax", False),
        ]
    for bits in ("int8", "int4", "int2"):
        spec = KvSpec(keys=f"{bits}(group=32, float_zero)", keys_by="channel", residual=128)
        found.append((f"{bits} KIVI", spec, "minmax", False))
    for shared in ("tensor", "head", "channel"):
        name, text = f"fp8_e4m3 static {shared}, envelope", f"fp8_e4m3({shared})"
        found.append((name, KvSpec(keys=text, static=True), "minmax", True))
    found.append(("fp8_e4m3 token", KvSpec(keys="fp8_e4m3(token)"), "minmax", False))
    found.append(("nf4 token", KvSpec(keys="nf4"), "minmax", False))
    found.append(("nf4 token, rotated", KvSpec(keys="nf4", rotated=True), "minmax", False))
    return found


def main() -> None:
    query, key, value = drawn()
    exact = outputs(query, key, value)
    rows: list[dict[str, Any]] = []
    for name, spec, method, envelope in cases():
        tensors = static(spec.keys, method, envelope, key) if has_static(spec.keys) else {}
        store = store_of(spec, "key", tensors)
        store.append(key)
        read = store.read()
        assert read is not None
        off = outputs(query, read, value) - exact
        errors = off.norm(dim=(1, 2)) / exact.norm(dim=(1, 2))
        row = {
            "store": name,
            "bits": round(store.nbytes * 8 / key.numel(), 3),
            "output_error": float(errors.mean()),
            "least": float(errors.min()),
            "most": float(errors.max()),
            "key_error": float((read - key).norm() / key.norm()),
        }
        rows.append(row)
        print(f"{name:44} {row['bits']:6.3f} bits  {row['output_error']:.4f} ({row['least']:.4f} to {row['most']:.4f})")
    settings = {"heads": HEADS, "size": SIZE, "tokens": TOKENS, "seen": SEEN, "queries": QUERIES, "offset": OFFSET}
    about = {"machine": platform.processor() or platform.machine(), "torch": torch.__version__, **settings}
    RESULT.write_text(json.dumps({**about, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
