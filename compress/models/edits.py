"""What a model is beyond its config.json: modules that were removed or resized, and which block of the source each is.

A change that a config can say (all blocks alike, fewer of them) needs none of this.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor, nn

from compress.errors import InputError
from compress.layer import LayerSpec
from compress.models import skeleton
from compress.models.image_model import ImageModule, resized

if TYPE_CHECKING:
    from compress.models.model import Model

EditKind = Literal["no attention", "no feed-forward", "resized"]


@dataclass(frozen=True)
class Edit:
    """One change of a module tree.

    path: of the module; kind: `no attention` or `no feed-forward` where that part of a block adds nothing to the stream
    any more and caches nothing, `resized` where a module has a weight of another shape; shape: of that weight, as the
    module stores it, empty where it is gone.
    """

    path: str
    kind: EditKind
    shape: tuple[int, ...] = ()

    def as_data(self) -> dict[str, Any]:
        """For JSON."""
        return {"path": self.path, "kind": self.kind, "shape": list(self.shape)}

    @classmethod
    def from_data(cls, data: Mapping[str, Any]) -> Edit:
        """Raises: KeyError, TypeError, ValueError for what is none."""
        if data["kind"] not in get_args(EditKind):
            raise ValueError(f"edit kind {data['kind']!r}, allowed {', '.join(get_args(EditKind))}")
        return cls(str(data["path"]), data["kind"], tuple(int(size) for size in data["shape"]))


@dataclass(frozen=True)
class Shape:
    """What a pass makes of the shape of a model.

    config: changes of config.json; edits: all of the new module tree, in its own names; origin: the source's block that
    each block is, by index (`Model.origins` tells those of the model that the pass got).
    """

    config: dict[str, Any] = field(default_factory=dict)
    edits: tuple[Edit, ...] = ()
    origin: tuple[int, ...] = ()


class Removed(nn.Module):
    """In place of a part of a block: zeros, which the stream of hidden states takes up unchanged."""

    def __init__(self, pairs: bool) -> None:
        super().__init__()
        self.pairs = pairs  # attention gives its weights beside its output

    def forward(self, *args: Any, **settings: Any) -> Any:
        """Zeros of the hidden states' shape."""
        hidden: Tensor = args[0] if args else settings["hidden_states"]
        zeros = torch.zeros_like(hidden)
        return (zeros, None) if self.pairs else zeros


def apply_edits(module: nn.Module, edits: Iterable[Edit]) -> None:
    """Change a module tree whose parameters are on `meta`, in place; what is left of the attentions is numbered anew,
    by which they find their keys and values in a cache.

    Raises: InputError for a path that is not there, or a module that cannot be resized.
    """
    without: set[int] = set()
    for edit in edits:
        try:
            child = module.get_submodule(edit.path)
        except AttributeError as error:
            raise InputError(f"structure.json edits '{edit.path}', which the model does not have.") from error
        if edit.kind == "resized":
            _resize(child, edit)
            continue
        parent, _, name = edit.path.rpartition(".")
        setattr(module.get_submodule(parent), name, Removed(edit.kind == "no attention"))
        if edit.kind == "no attention":
            without.add(skeleton.segment_of(edit.path, skeleton.blocks_path(module)))
    if without:
        _number(module, without)


def _number(module: nn.Module, without: Container[int]) -> None:
    """Cache layers without gaps: a model takes the length of its cache from the first of them."""
    blocks = list(module.get_submodule(skeleton.blocks_path(module)))  # type: ignore[call-overload]
    left = [block for index, block in enumerate(blocks) if index not in without]
    for index, block in enumerate(left):
        for child in block.modules():
            if hasattr(child, "layer_idx"):
                child.layer_idx = index


SIZES: dict[type[nn.Module], tuple[str, ...]] = {
    nn.Linear: ("out_features", "in_features"),
    nn.Conv2d: ("out_channels", "in_channels"),
    nn.BatchNorm2d: ("num_features",),
}
"""The attributes that say what the first sizes of a weight say."""


def _resize(module: nn.Module, edit: Edit) -> None:
    names = next((found for kind, found in SIZES.items() if isinstance(module, kind)), None)
    weight = getattr(module, "weight", None)
    if names is None or weight is None or len(edit.shape) != weight.ndim:
        raise InputError(f"structure.json resizes '{edit.path}', a {type(module).__name__}, to {edit.shape}: unknown.")
    if isinstance(module, nn.Conv2d) and module.groups > 1:
        if module.groups != module.out_channels or weight.shape[1] != 1:
            raise InputError(f"structure.json resizes '{edit.path}', a convolution of {module.groups} groups: unknown.")
        module.groups = module.in_channels = edit.shape[0]  # depthwise
        names = names[:1]
    for name, size in zip(names, edit.shape, strict=False):
        setattr(module, name, size)
    rows = edit.shape[0]
    module.weight = nn.Parameter(torch.empty(edit.shape, device="meta"), requires_grad=False)
    if getattr(module, "bias", None) is not None:
        module.bias = nn.Parameter(torch.empty(rows, device="meta"), requires_grad=False)
    for name, buffer in list(module.named_buffers(recurse=False)):
        if buffer.ndim == 1:
            module.register_buffer(name, torch.zeros(rows, dtype=buffer.dtype))


def reshaped(model: Model, shape: Shape) -> Model:
    """A model as it will be, before there are weights for it. Stored types are those of the blocks it is made of.

    Raises: InputError where no module can be built so.
    """
    if model.image is not None:
        return resized_images(replace(model, weights=None), shape.edits)
    raw = {**model.raw_config, **deepcopy(shape.config)}
    config = type(model.config).from_dict(raw) if model.config is not None else None
    made = replace(model, config=config, raw_config=raw, weights=None, edits=shape.edits, origin=shape.origin)
    structure = skeleton.survey(made.skeleton())
    former = former_names(model.structure.blocks_path, model.origins, shape.origin)
    layers = {name: _typed(spec, model.structure.layers.get(former(name))) for name, spec in structure.layers.items()}
    return replace(made, structure=replace(structure, layers=layers))


def resized_images(model: Model, edits: tuple[Edit, ...]) -> Model:
    """An image classifier with edits, none of which takes a module away.

    Raises: InputError for edits that do not fit its module.
    """
    if not edits:
        return model
    if not isinstance(model.image, ImageModule) or any(edit.kind != "resized" for edit in edits):
        raise InputError(f"structure.json edits {model.source} in a way that only blocks of a language model can be.")
    if any(min(edit.shape, default=0) < 1 for edit in edits):
        raise InputError(f"structure.json resizes modules of {model.source} to nothing. Copy the artifact again.")
    replace(model, edits=edits).skeleton()  # refuses what is not there or cannot be resized
    image, structure = resized(model.image, model.structure, {edit.path: edit.shape for edit in edits})
    return replace(model, image=image, structure=structure, edits=edits)


def _typed(spec: LayerSpec, before: LayerSpec | None) -> LayerSpec:
    if before is None:
        return spec
    return replace(spec, source_dtype=before.source_dtype, bias_dtype=before.bias_dtype)


def former_names(path: str, before: Sequence[int], after: Sequence[int]) -> Callable[[str], str]:
    """What gives the name of a module or tensor in the model that another was made of.

    Args: path: of the blocks; before, after: `Model.origins` of both.
    """
    places = {index: before.index(origin) for index, origin in enumerate(after)}

    def former(name: str) -> str:
        index = skeleton.segment_of(name, path)
        if index not in places:
            return name
        return f"{path}.{places[index]}{name[len(f'{path}.{index}') :]}"

    return former


def read_edits(info: Mapping[str, Any]) -> tuple[tuple[Edit, ...], tuple[int, ...]]:
    """Edits and origin of a store's structure.json. Raises: KeyError, TypeError, ValueError for malformed ones."""
    edits = tuple(Edit.from_data(item) for item in info.get("edits", ()))
    return edits, tuple(int(index) for index in info.get("origin", ()))
