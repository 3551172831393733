"""Texts of formats, at least one for each line of `FORMATS` and each of `NAMES`."""

SAMPLES = [
    *(f"int{bits}(channel)" for bits in range(2, 9)),
    "int4(group=32)",
    "int3(group=16, asymmetric)",
    "int4(group=32, signed)",
    *("fp8_e4m3(channel)", "fp8_e4m3(group=32)", "fp8_e5m2(tensor)", "fp6_e2m3(group=32)", "fp6_e3m2(channel)"),
    *("fp4_e2m1(group=16, scale=float32)", "fp3_e1m1(channel, scale=e8m0)", "fp5_e2m2(group=24)", "fp7_e3m3(channel)"),
    *("mxfp4", "mxfp6_e2m3", "mxfp6_e3m2", "mxfp8_e4m3", "mxfp8_e5m2", "nvfp4"),
    *("nf4(block=64)", "nf4(block=64, double)", "fp4(block=32)", "table(bits=3, group=16)", "table(bits=5, block=64)"),
    "int4(group=32, float_zero)",
    *("codebook(vector=2, entries=16, stages=2)", "codebook(vector=7, entries=8, stages=1, groups=2, scale=none)"),
    "codebook(vector=2, entries=1024, stages=1, out)",
    "codebook(vector=5, entries=4, stages=3, scale=column, share=7)",
    *("trellis(bits=2, block=16)", "trellis(bits=5, mcg, block=32)"),
    *("sparse(mask=bitmask, density=0.5, values=float16)", "sparse(mask=bitmask, density=0.1234, values=float32)"),
    *("sparse(mask=2:4, values=float16)", "sparse(mask=2:4, values=bfloat16)"),
]


def name_of(text: str) -> str:
    """`int4(group=32)` → `int4`."""
    return text.partition("(")[0]


def shape_of(text: str) -> tuple[int, int]:
    """A size (out, in) that a format takes: an odd one, but for formats that take whole blocks only."""
    return (32, 64) if name_of(text) == "trellis" else (5, 70)
