"""What is rewritten in a lowered graph so that ONNX Runtime fuses what is faster fused, and only that.

Its own optimizer runs when the graph is loaded: it makes QuickGelu of x · sigmoid(x) and one operator of a LayerNorm or
an RMSNorm, and folds scales into products. The rewrites bring to the form it looks for what it misses, and keep from
that form what its CPU kernels compute slower fused. What it has operators of its own for and does not find, rotary
embeddings and products of the same values, is written so. A variant is rewritten as its baseline is, but for what the
operators of its format allow.
"""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from compress.export.onnx import angles, attention, gelu, joined, multi_head, norms
from compress.export.onnx.graph import GraphBuilder
from compress.export.onnx.providers import CPU
from compress.hwprofiles import Runtime

REWRITES = (angles.as_operators, norms.as_quotients, norms.keep_apart, gelu.as_operators, gelu.keep_apart, joined.join)
ELSEWHERE = (norms.as_quotients, gelu.as_operators, joined.join)


def attend(runtime: Runtime) -> Callable[[GraphBuilder, ir.Node, ir.Value, ir.Value], list[ir.Value]]:
    """How attention is lowered in the form the runtime is fastest at; see `attention.attention` for the arguments."""
    return multi_head.attention if runtime.provider == CPU else attention.attention


def fuse(document: ir.Model, runtime: Runtime) -> None:
    """Rewrite a lowered graph in place: all for the CPU, where the kernels were timed; for GPUs what brings norms and
    GELU to the form that ONNX Runtime has one operator for, in standard operators, so that its TensorRT provider takes
    them too."""
    builder = GraphBuilder(document.graph)
    for rewrite in REWRITES if runtime.provider == CPU else ELSEWHERE:
        rewrite(builder)
    RemoveUnusedNodesPass()(document)
