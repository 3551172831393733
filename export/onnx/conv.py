"""The `compress::Conv` placeholder, and what every lowering of a convolution needs to know of it.

A lowering that takes convolutions declares `conv(builder, source, values, node)`: values (batch, channels, h, w) to
(batch, out, h', w'), with `node` the placeholder. Its attributes are those of ONNX's Conv: kernel (h, w), strides,
pads (top, left, bottom, right), dilations, group.
"""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
from torch import Tensor, nn

from compress.errors import UnsupportedError
from compress.layer import LayerSpec


def pads(module: nn.Conv2d) -> list[int]:
    """(top, left, bottom, right); "same" puts the odd one out at the end, as torch does."""
    if module.padding == "valid":
        return [0, 0, 0, 0]
    if module.padding == "same":
        whole = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
        return [size // 2 for size in whole] + [size - size // 2 for size in whole]
    sides = [int(size) for size in module.padding]
    return [*sides, *sides]


def geometry(module: nn.Conv2d) -> dict[str, Any]:
    """The placeholder's attributes beside `layer`."""
    return {
        "kernel": list(module.kernel_size),
        "strides": list(module.stride),
        "pads": pads(module),
        "dilations": list(module.dilation),
        "group": module.groups,
    }


def output_shape(module: nn.Conv2d, values: Tensor) -> tuple[Any, ...]:
    """(batch, out, h', w') for values (batch, channels, h, w), whose sizes may be symbols.

    Raises: UnsupportedError for an image without a batch.
    """
    if values.ndim != 4:
        raise UnsupportedError(f"A convolution is handed {tuple(values.shape)}; (batch, channels, h, w) is supported.")
    around = pads(module)
    sizes = [
        (values.shape[2 + axis] + around[axis] + around[axis + 2] - module.dilation[axis] * (kernel - 1) - 1)
        // module.stride[axis]
        + 1
        for axis, kernel in enumerate(module.kernel_size)
    ]
    return (values.shape[0], module.out_channels, *sizes)


def weight_shape(spec: LayerSpec) -> tuple[int, int, int, int]:
    """(out, in/groups, kh, kw) of a layer that is seen as (out, in/groups · kh · kw)."""
    assert spec.kernel is not None
    return (spec.shape[0], *spec.kernel)


def attributes(node: ir.Node) -> dict[str, Any]:
    """A placeholder's attributes as those of an ONNX Conv."""
    found = {name: list(node.attributes[name].as_ints()) for name in ("strides", "pads", "dilations")}
    return {
        "kernel_shape": list(node.attributes["kernel"].as_ints()),
        **found,
        "group": node.attributes["group"].as_int(),
    }
