"""`kv_cache_scheme` of compressed-tensors (0.20): one for the caches of all layers, with scales beside the weights.

In config.json: num_bits, type (`int`, `float`), strategy (`tensor`, `attn_head`), symmetric, dynamic false. In the
files, per attention: `k_scale` and `v_scale`, (1,) by tensor, (kv heads, 1, 1) by head, float32. Readers round keys
after their rotation and values before they attend to them, x / scale to the nearest. transformers keeps the rounded
values in float, vLLM the codes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from compress.export.checkpoint.names import FileNames
from compress.formats.float_grid import FloatGrid
from compress.formats.int_grid import IntGrid
from compress.kv.observed import attention_of
from compress.kv.spec import KvSpec
from compress.kv.static import static_format
from compress.models.model import Model
from compress.target import Refusal

LAYOUT = "compressed-tensors"
STRATEGIES = {"tensor": "tensor", "head": "attn_head"}
NAMES = {"key_scale": "k_scale", "value_scale": "v_scale"}
GIVE = "Give kv_quant(keys=int8(tensor), values=int8(tensor), static=minmax), or fp8_e4m3, or by head"
NOTE = "transformers rounds keys and values by these scales and keeps them in float; vLLM keeps the codes"


def refusal(specs: Sequence[KvSpec], layout: str) -> Refusal | None:
    """Why a checkpoint cannot say how the caches are stored; None where it can."""
    if layout != LAYOUT:
        return Refusal(f"{layout} says nothing of caches; {LAYOUT} has kv_cache_scheme", usage=False)
    found = dict.fromkeys(reason for spec in specs if (reason := _reason(spec)))
    if not found and len({(spec.keys, spec.values) for spec in specs}) > 1:
        found = dict.fromkeys(["kv_cache_scheme is one for all layers, and these differ"])
    return Refusal(f"{'; '.join(found)}. {GIVE}") if found else None


def _reason(spec: KvSpec) -> str:
    if spec.evicts:
        return "kv_cache_scheme drops no tokens"
    if spec.selects:
        return "kv_cache_scheme attends to all tokens"
    if not (spec.keys and spec.values):
        return "kv_cache_scheme rounds keys and values of all layers, and some are in float"
    if spec.keys != spec.values:
        return f"keys in {spec.keys} and values in {spec.values}: kv_cache_scheme has one format for both"
    if spec.residual:
        return "kv_cache_scheme keeps no newest tokens in float"
    if not (spec.static_part("key") and spec.static_part("value")):
        return f"{spec.keys} has a scale with each token, where kv_cache_scheme has those that data gave (static)"
    form = static_format(spec.keys)
    whole = isinstance(form, IntGrid) and form.bits == 8
    small = isinstance(form, FloatGrid) and (form.exponent, form.mantissa) == (4, 3)
    if not (whole or small) or form.group not in STRATEGIES:
        return f"{spec.keys} is none of kv_cache_scheme's, which has int8 and fp8_e4m3 by tensor or by head"
    return ""


def config(specs: Sequence[KvSpec]) -> dict[str, Any] | None:
    """`kv_cache_scheme`; None where no cache is rounded. All specs are alike."""
    if not specs:
        return None
    form = static_format(specs[0].keys)
    return {
        "num_bits": 8,
        "type": "int" if isinstance(form, IntGrid) else "float",
        "strategy": STRATEGIES[str(form.group)],
        "symmetric": True,
        "dynamic": False,
        "group_size": None,
        "block_structure": None,
        "actorder": None,
        "observer": "minmax",
        "observer_kwargs": {},
    }


def entries(model: Model, names: FileNames) -> dict[str, tuple[tuple[int, ...], int]]:
    """Shape and bytes of each tensor of the files, by name, before there are values."""
    if not model.kv:
        return {}
    by_head = _is_by_head(model.kv[0])
    found: dict[str, tuple[tuple[int, ...], int]] = {}
    for module, attention in zip(_modules(model, names), model.attentions, strict=True):
        shape = (attention.kv_heads, 1, 1) if by_head else (1,)
        found |= {f"{module}.{name}": (shape, 4 * shape[0]) for name in NAMES.values()}
    return found


def tensors(model: Model, names: FileNames) -> dict[str, Tensor]:
    """Those of the files, by name."""
    found: dict[str, Tensor] = {}
    for module, held, spec in zip(_modules(model, names), model.kv_tensors, model.kv, strict=True) if model.kv else ():
        by_head = _is_by_head(spec)
        for ours, theirs in NAMES.items():
            scale = held[ours].float()
            found[f"{module}.{theirs}"] = scale.reshape(-1, 1, 1) if by_head else scale.reshape(1)
    return found


def _is_by_head(spec: KvSpec) -> bool:
    return static_format(spec.keys).group == "head"


def _modules(model: Model, names: FileNames) -> list[str]:
    """The names of the attentions, in the order of the cache."""
    found = {id(module): name for name, module in names.module.named_modules()}
    blocks = [
        names.module.get_submodule(model.structure.blocks[place]) for place in model.blocks_without("no attention")
    ]
    return [names.module_name(found[id(attention_of(block))]) for block in blocks]


def attached(model: nn.Module) -> list[nn.Module]:
    """The attentions of a loaded model whose keys and values its reader rounds."""
    return [module for module in model.modules() if all(hasattr(module, name) for name in NAMES.values())]


def switch(modules: Sequence[nn.Module], rounds: bool) -> None:
    """Whether attentions round their keys and values, as compressed-tensors asks."""
    for module in modules:
        module.quantization_enabled = rounds  # type: ignore[assignment]


@contextmanager
def in_float(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Let attentions leave their keys and values as they are, for a while."""
    before = [getattr(module, "quantization_enabled", True) for module in modules]
    switch(modules, False)
    try:
        yield
    finally:
        for module, rounds in zip(modules, before, strict=True):
            switch([module], rounds)
