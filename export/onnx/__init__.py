"""The `onnx` target: a folder that ONNX Runtime, onnxruntime-genai and optimum load as it is.

One file per lowering; the table says which is asked first. A format that none accepts is refused with the reasons.
"""

from __future__ import annotations

# asked in this order; each module offers `choose(spec, runtime)`, and declares what it lowers in `LOWERS`
LOWERINGS: tuple[str, ...] = (
    "compress.export.onnx.float_matmul",
    "compress.export.onnx.dynamic_quantize",
    "compress.export.onnx.static_qdq",
    "compress.export.onnx.matmul_nbits",
    "compress.export.onnx.matmul_bnb4",
    "compress.export.onnx.codebook",
    "compress.export.onnx.decoded_conv",
)
