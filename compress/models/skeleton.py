"""The module tree without its weights, and where its blocks and layers are.

Models are found by module types and names, never by symbolic tracing.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from compress.errors import UnsupportedError
from compress.layer import LayerKind, LayerSpec
from compress.models import experts

OUTER = -1
"""The segment of everything that is outside the blocks: embeddings, final norm, head."""


def build(
    config: Any, make: Callable[..., Any], attention: str | None = None, mixture: str = experts.EACH
) -> nn.Module:
    """The module of a config with all parameters on `meta`; buffers are real, computed by the module itself.

    Args: make: called with a config and settings; attention: an implementation by name, None for transformers' choice
    (eager where the model has soft caps or sinks); mixture: the implementation of its experts, if it has any.
    """
    from transformers.initialization import no_init_weights

    experts.register()
    settings = {"attn_implementation": attention, "experts_implementation": mixture, "dtype": torch.float32}
    with _parameters_on_meta(), no_init_weights(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module: nn.Module = make(deepcopy(config), **settings)
    module.eval()
    module.tie_weights()  # type: ignore[operator]
    return module


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Each parameter moves to `meta` as it is registered, so at most one is ever allocated."""
    register = nn.Module.register_parameter

    def on_meta(self: Any, name: str, parameter: nn.Parameter | None) -> None:
        register(self, name, parameter)
        if parameter is not None and parameter.device.type != "meta":
            self._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=False)

    nn.Module.register_parameter = on_meta  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


@dataclass(frozen=True)
class Structure:
    """Where the blocks and layers of a module tree are.

    blocks: module paths of the repeated blocks, in order; layers: every compressible layer by name; plain: the
    other stored tensors by segment; aliases: tied parameter names → the name that is stored; head: the output layer.
    """

    blocks_path: str
    blocks: tuple[str, ...]
    layers: dict[str, LayerSpec]
    plain: dict[int, tuple[str, ...]]
    aliases: dict[str, str]
    head: str | None = None

    def user_kind(self, spec: LayerSpec, user: str) -> str:
        """`embedding`, `head`, `expert`, `conv` or `linear`: what one user of a layer is, for `kind:` patterns."""
        if spec.kind is LayerKind.EMBEDDING and user == spec.name:
            return "embedding"
        if user == self.head:
            return "head"
        return str(spec.kind) if spec.kind in (LayerKind.EXPERT, LayerKind.CONV) else "linear"

    def segment_layers(self, segment: int) -> tuple[LayerSpec, ...]:
        """The layers stored in a segment."""
        return tuple(spec for spec in self.layers.values() if spec.segment == segment)

    @property
    def segments(self) -> tuple[int, ...]:
        """OUTER, then the blocks in order."""
        return (OUTER, *range(len(self.blocks)))


def survey(module: nn.Module) -> Structure:
    """Find blocks, layers and tied weights.

    Raises: UnsupportedError where there is no list of like blocks, or each of them is not run once.
    """
    path = blocks_path(module)
    _check_blocks(module, path)
    count = len(module.get_submodule(path))  # type: ignore[arg-type]
    blocks = tuple(f"{path}.{index}" for index in range(count))
    layers = _layers(module, path)
    aliases = tied_names(module)
    owned = {f"{user}.weight" for spec in layers.values() for user in spec.users}
    owned |= {f"{spec.name}.bias" for spec in layers.values()}  # a tied head may have one of its own, which is plain
    owned |= {name.rpartition(".")[0] for name in layers if layers[name].kind is LayerKind.EXPERT}
    plain: dict[int, list[str]] = {segment: [] for segment in (OUTER, *range(count))}
    for name in module.state_dict():
        if name not in owned and name not in aliases:
            plain[segment_of(name, path)].append(name)
    groups = {key: tuple(names) for key, names in plain.items()}
    return Structure(path, blocks, layers, groups, aliases, _head(module))


def _head(module: nn.Module) -> str | None:
    head = module.get_output_embeddings()  # type: ignore[operator]
    return next((name for name, child in module.named_modules() if child is head), None) if head is not None else None


def segment_of(name: str, blocks_path: str) -> int:
    """The block index in a name, or OUTER."""
    if not name.startswith(blocks_path + "."):
        return OUTER
    return int(name[len(blocks_path) + 1 :].split(".", 1)[0])


def blocks_path(module: nn.Module) -> str:
    """Of the list of like blocks. Raises: UnsupportedError where there is none."""
    lists = {name: child for name, child in module.named_modules() if isinstance(child, nn.ModuleList)}
    for name, blocks in lists.items():
        is_alike = len({type(block) for block in blocks}) == 1
        if is_alike and any(_is_linear(part) for part in blocks.modules()):
            return str(name)
    raise UnsupportedError(
        f"{type(module).__name__} has no list of like blocks (an nn.ModuleList with linear layers in it), so it cannot "
        "be walked block by block. Supported: decoders and encoders of that form."
    )


def _check_blocks(module: nn.Module, path: str) -> None:
    found = len(module.get_submodule(path))  # type: ignore[arg-type]
    wanted = int(getattr(module.config.get_text_config(), "num_hidden_layers", None) or found)  # type: ignore[union-attr, operator]
    if found != wanted:
        raise UnsupportedError(
            f"{type(module).__name__} has {found} block(s) in '{path}', but {wanted} layers by its config: they are "
            "shared or of several kinds, so it cannot be walked block by block. Supported: models whose layers are "
            "blocks of one kind."
        )


def _is_linear(module: nn.Module) -> bool:
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, nn.Linear | Conv1D)


def is_turned(module: nn.Module) -> bool:
    """Whether the module stores its weight as (in, out): transformers' Conv1D."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, Conv1D)


def _layers(module: nn.Module, blocks_path: str) -> dict[str, LayerSpec]:
    embedding = module.get_input_embeddings()  # type: ignore[operator]
    by_weight: dict[int, LayerSpec] = {}
    mixtures: list[LayerSpec] = []
    for name, child in module.named_modules():
        segment = segment_of(name, blocks_path)
        if child is embedding:
            kind = LayerKind.EMBEDDING
        elif _is_linear(child):
            kind = LayerKind.LINEAR
        else:
            mixtures += _experts(name, child, segment)
            continue
        weight = child.weight
        if id(weight) in by_weight:
            first = by_weight[id(weight)]
            by_weight[id(weight)] = replace(first, users=(*first.users, name))
            continue
        rows, columns = weight.shape[::-1] if is_turned(child) else weight.shape
        by_weight[id(weight)] = LayerSpec(
            name,
            kind,
            (int(rows), int(columns)),
            (name,),
            has_bias=getattr(child, "bias", None) is not None,
            segment=segment,
            turned=is_turned(child),
            routed=_is_router(name, int(rows)),
        )
    return {spec.name: spec for spec in (*by_weight.values(), *mixtures)}


def _is_router(name: str, rows: int) -> bool:
    """A mixture's gate: few outputs, named so. Rounding it reorders experts, so only a pass that names it may."""
    last = name.rpartition(".")[2]
    return last in {"router", "gate", "shared_expert_gate"} and rows <= 512


def _experts(name: str, module: nn.Module, segment: int) -> list[LayerSpec]:
    """One layer per expert and per 3-D parameter, (experts, out, in) or turned."""
    stacks = {key: p for key, p in module.named_parameters(recurse=False) if p.ndim == 3 and key.endswith("_proj")}
    if stacks and not experts.is_experts(module):
        raise UnsupportedError(
            f"{type(module).__name__} ({name}) computes its experts by itself, not through transformers' experts "
            "interface, so they cannot be seen one by one."
        )
    specs = []
    for key, parameter in stacks.items():
        turned = bool(module.is_transposed)
        rows, columns = (int(size) for size in (parameter.shape[:0:-1] if turned else parameter.shape[1:]))
        names = [f"{name}.{key}.{index}" for index in range(parameter.shape[0])]
        specs += [LayerSpec(n, LayerKind.EXPERT, (rows, columns), (n,), segment=segment, turned=turned) for n in names]
    return specs


def tied_names(module: nn.Module) -> dict[str, str]:
    """Parameter names of one tensor: each later one → the first."""
    first: dict[int, str] = {}
    aliases = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if id(parameter) in first:
            aliases[name] = first[id(parameter)]
        else:
            first[id(parameter)] = name
    return aliases
