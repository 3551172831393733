"""What a written graph holds, as it stands in the file."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx


def stored_bytes(graph: Path) -> Counter[str]:
    """Bytes of all initializers of each layer, by its name."""
    found: Counter[str] = Counter()
    for tensor in onnx.load(str(graph), load_external_data=False).graph.initializer:
        layer = tensor.name.rsplit(".weight", 1)[0].rsplit(".bias", 1)[0]
        found[layer] += int(np.prod(tensor.dims)) * onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    return found
