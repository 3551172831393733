"""2:4 weights in TensorRT: which layers qualify, and what the builder says that it made of them.

The graph holds them dense; with `SPARSE_WEIGHTS` the builder looks for the pattern by itself, times sparse kernels
beside dense ones and keeps the faster. A weight qualifies where at most two of every four input channels are not zero,
for each output channel and each tap of a convolution's kernel, and there is a whole number of fours (TensorRT's
documentation, "Sparsity"); what is decoded on the way, as INT4, is multiplied by kernels of its own.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from compress.export.tensorrt.rules import EngineChoice
from compress.formats.sparse import crowded
from compress.hwprofiles import Profile
from compress.layer import Layer, LayerKind, LayerSpec
from compress.models.model import Model
from compress.target import Refusal

FIRST_ROWS = 16
"""Looked at first: those of a weight that is not pruned settle it."""
QUALIFIES = (
    "2:4 along its input channels: the builder may multiply it on sparse tensor cores (SPARSE_WEIGHTS); whether that "
    "is faster only a measured engine says"
)
NO_CORES = "2:4, for which SM {sm} has no sparse tensor cores: computed like a dense weight"
OTHER = "pruned by {pattern}, which no kernel of TensorRT uses: computed like a dense weight"
AHEAD = "{count} layer(s) are 2:4 along their input channels (named in tensorrt.json); the builder will be told."
_CHOSE = re.compile(r"\(Sparsity\) Chose (\d+) layer|\(Sparsity\) .*picked sparse implementation for layers:(.*)")


def could(spec: LayerSpec, choice: EngineChoice) -> bool:
    """Whether a layer's product is one that sparse kernels compute: a plain weight in half precision, or weight and
    inputs in 8 bits, with a whole number of fours among its input channels."""
    if spec.kind not in (LayerKind.LINEAR, LayerKind.CONV) or spec.groups > 1 or _channels(spec) % 4:
        return False
    if spec.format is None:
        return choice.compute != "float32"
    return spec.act is not None and choice.stored_bits == 8


def noted(spec: LayerSpec, choice: EngineChoice | Refusal, profile: Profile) -> EngineChoice | Refusal:
    """The same choice with what a planned pattern of zeros comes to on the profile's chip."""
    if isinstance(choice, Refusal) or spec.zeros is None or profile.gpu is None:
        return choice
    pattern = spec.zeros.pattern
    told = OTHER.format(pattern=pattern)
    if pattern.is_two_of_four and could(spec, choice):
        told = QUALIFIES if profile.gpu.has_sparse_cores else NO_CORES.format(sm=profile.gpu.sm)
    return replace(choice, note="; ".join(filter(None, (choice.note, told))))


def layers(model: Model, choices: Mapping[str, EngineChoice], profile: Profile) -> tuple[str, ...]:
    """The layers of a model whose weights are 2:4 as the builder will find them; none for a chip that has no use for
    it."""
    if profile.gpu is None or not profile.gpu.has_sparse_cores:
        return ()
    specs = model.structure.layers
    return tuple(name for name, spec in specs.items() if could(spec, choices[name]) and holds(spec, model.layer(spec)))


def holds(spec: LayerSpec, layer: Layer) -> bool:
    """Whether a weight is 2:4 along its input channels."""
    weight = layer.weight if isinstance(layer.weight, Tensor) else layer.float_weight()
    return not any(crowded(_by_channel(spec, rows)) for rows in (weight[:FIRST_ROWS], weight[FIRST_ROWS:]))


def chosen(lines: Iterable[str]) -> int | None:
    """How many layers the builder says that it gave sparse kernels; None where it says nothing."""
    for line in lines:
        if found := _CHOSE.search(line):
            count, names = found.groups()
            return int(count) if count else len([name for name in names.split(",") if name.strip()])
    return None


def told(sparse: Sequence[str], lines: Iterable[str], builder: str) -> str:
    """For the report: what became of the layers that qualify."""
    count = chosen(lines)
    asked = f"{len(sparse)} layer(s) are 2:4 along their input channels (named in tensorrt.json). {builder}, told so"
    asked += " (SPARSE_WEIGHTS)"
    if count is None:
        return f"{asked}, did not say that it took sparse kernels for any, so they count as dense."
    return f"{asked}, chose sparse kernels for {count}. What that is worth is in the measured speed alone."


def _channels(spec: LayerSpec) -> int:
    return spec.shape[1] if spec.kernel is None else spec.kernel[0]


def _by_channel(spec: LayerSpec, weight: Tensor) -> Tensor:
    """Rows (n, in · kh · kw) with the taps of a kernel apart, (n · kh · kw, in)."""
    if spec.kernel is None:
        return weight
    channels, high, wide = spec.kernel
    return weight.reshape(len(weight), channels, high * wide).transpose(1, 2).reshape(-1, channels)
