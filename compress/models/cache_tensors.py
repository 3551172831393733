"""Tensors that belong to the caches of a model, beside their `KvSpec`s: scales that data gave, heads that score.

One safetensors file beside what says the specs, `<layer>.<name>` each; no file where there are none.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors.torch import save_file
from torch import Tensor

from compress.errors import InputError
from compress.files import umask, whole_file
from compress.kv.spec import KvSpec, LayerTensors
from compress.kv.static import scale_shape, static_format
from compress.models.attention import Attention
from compress.models.weight_files import library_errors, open_file, read_tensor

if TYPE_CHECKING:
    from compress.models.model import Model

FILE = "caches.safetensors"
ENTRY_BYTES = 80
"""About what the file's header says of one tensor."""


def wanted(spec: KvSpec, attention: Attention, hidden: int) -> dict[str, tuple[int, ...]]:
    """Shapes of what a layer's cache needs, by name, before there is any of it. hidden: numbers that go into the
    attention for each token."""
    heads, kv_heads, size = attention
    inputs = (heads + 2 * kv_heads) * size if spec.scorer == "locret" else hidden
    shapes: dict[str, tuple[int, ...]] = {
        "head.first": (spec.head_width, inputs),
        "head.first_bias": (spec.head_width,),
        "head.second": (kv_heads, spec.head_width or inputs),
        "head.second_bias": (kv_heads,),
    }
    for name, text in (("key_scale", spec.keys), ("value_scale", spec.values)):
        if name in spec.wants:
            shapes[name] = scale_shape(static_format(text), kv_heads, size)
    return {name: shapes[name] for name in spec.wants}


def predicted(model: Model) -> Iterator[tuple[str, int]]:
    """Name and bytes (float32) of each tensor that a model's caches need, whether or not it is there yet."""
    if not any(spec.wants for spec in model.kv):
        return
    hidden = int(model.config.get_text_config().hidden_size)
    for spec, attention in zip(model.kv, model.attentions, strict=True):
        for name, shape in wanted(spec, attention, hidden).items():
            yield name, 4 * prod(shape)


def predict_bytes(model: Model) -> int:
    """Of the file; 0 where there will be none."""
    return sum(ENTRY_BYTES + size for _, size in predicted(model))


def write_tensors(folder: Path, layers: Sequence[LayerTensors]) -> None:
    """The file for these layers, complete or absent. Raises: OSError for a full disk and the like."""
    path = folder / FILE
    each = ((f"{layer}.{name}", tensor) for layer, held in enumerate(layers) for name, tensor in held.items())
    found = {name: tensor.contiguous() for name, tensor in sorted(each, key=lambda item: item[0])}
    if not found:
        path.unlink(missing_ok=True)
        return
    with whole_file(path) as beside, library_errors(path):
        save_file(found, beside)
        beside.chmod(0o666 & ~umask())  # the library writes files that only their owner can read


def read_tensors(folder: Path, specs: Sequence[KvSpec]) -> tuple[dict[str, Tensor], ...]:
    """What the caches want of a folder, by layer. Raises: InputError where it is not there."""
    path = folder / FILE
    if not any(spec.wants for spec in specs):
        return tuple({} for _ in specs)
    if not path.is_file():
        layer, spec = next((place, each) for place, each in enumerate(specs) if each.wants)
        raise InputError(f"{path} is missing: the cache of layer {layer} needs its {spec.wants[0]}. Copy it again.")
    handle = open_file(path)
    return tuple(
        {name: read_tensor(handle, f"{layer}.{name}", path) for name in spec.wants} for layer, spec in enumerate(specs)
    )
