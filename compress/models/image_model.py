"""Image classifiers of the user's own code: found by hooks on one pass, never by names or symbolic tracing.

Convolutions and linear layers that the module calls are the layers; everything else is left as plain tensors. The
model is one block, since its modules may be wired in any way.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compress.errors import InputError, UnsupportedError
from compress.layer import LayerKind, LayerSpec
from compress.maths import products
from compress.models import fold_norms
from compress.models.fold_norms import ModuleCall, Pair
from compress.models.image_source import BLOCK, OfImages, Opened
from compress.models.reader import StateReader
from compress.models.skeleton import OUTER, Structure, tied_names
from compress.models.user_module import Factory, Preprocess, open_factory


@dataclass(frozen=True)
class ImageModule(OfImages):
    """What is known of an image classifier besides its weights.

    shape: (channels, h, w) of an image; classes: logits per image; folded: normalisations that are part of their
    convolution; multiplications: per image, in all layers; places: of each layer's output, per image, by user.
    """

    factory: Factory
    shape: tuple[int, int, int]
    classes: int
    preprocess: Preprocess
    folded: tuple[Pair, ...]
    multiplications: int
    places: Mapping[str, int] = field(compare=False)

    @property
    def outputs(self) -> tuple[tuple[str, int], ...]:
        """The logits."""
        return (("logits", self.classes),)

    @property
    def labelled(self) -> bool:
        """Always."""
        return True

    @property
    def batch(self) -> int:
        """Any."""
        return 0

    @property
    def graph(self) -> bytes:
        """None: it is traced."""
        return b""

    @property
    def input(self) -> str:
        """As its export names them."""
        return "images"

    @property
    def kept_bytes(self) -> int:
        """Nothing."""
        return 0

    def described(self) -> dict[str, Any]:
        """See `ImageSource`."""
        channels, height, width = self.shape
        return {
            "input": {"name": self.input, "channels": channels, "height": height, "width": width},
            "output": {"name": "logits", "classes": self.classes},
            "preprocessing": self.preprocess.text,
            "mean": list(self.preprocess.mean),
            "std": list(self.preprocess.std),
        }

    def keep(self, folder: Path) -> dict[str, Any]:
        """See `ImageSource`: the code itself is not kept."""
        file, folded = str(self.factory.path), [list(pair) for pair in self.folded]
        return {"file": file, "callable": self.factory.name, "sha256": self.factory.sha256, "folded": folded}

    def skeleton(self) -> nn.Module:
        """The module tree from the callable, normalisations folded, parameters on `meta`; buffers as it makes them."""
        module = self.factory.build().float()
        fold_norms.fold_shapes(module, self.folded)
        for child in module.modules():
            for key, parameter in child._parameters.items():
                if parameter is not None:
                    child._parameters[key] = nn.Parameter(parameter.to("meta"), requires_grad=False)
        return module


def open_images(reference: str, sha256: str = "") -> Opened[ImageModule]:
    """Run `file.py:callable` and find out what its module is.

    Args: sha256: what the file must be to be run.
    Raises: UsageError, InputError (the file, or values that are not finite), UnsupportedError (another kind of module).
    """
    factory = open_factory(reference, sha256)
    module, images = factory.build(), factory.sample()
    stored = {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}
    module.float()
    expected = _run(factory, module, images)
    pairs = fold_norms.candidates(fold_norms.record(module, images)[0])
    folded, change = fold_norms.fold_all(module, pairs, images, expected)
    calls, output = fold_norms.record(module, images)
    state = {name: _as_stored(name, tensor, stored, folded) for name, tensor in module.state_dict().items()}
    structure = _structure(module, calls, output, state)
    channels, height, width = (int(size) for size in images.shape[1:])
    places = _places(calls, structure, images.shape[0])
    image = ImageModule(
        factory,
        (channels, height, width),
        int(expected.shape[1]),
        factory.preprocess(channels),
        tuple(folded),
        _multiplications(structure, places),
        places,
    )
    size = sum(tensor.numel() * tensor.element_size() for tensor in stored.values())
    notes = _notes(module, structure, folded, change)
    return Opened(image, structure, StateReader(state, factory.reference, size), _digest(factory, stored), notes)


def _run(factory: Factory, module: nn.Module, images: Tensor) -> Tensor:
    """The logits of the sample images. Raises: see `open_images`."""
    if images.ndim != 4 or images.shape[0] < 2:
        raise UnsupportedError(
            f"{factory.path}: sample_inputs(2) gave {tuple(images.shape)}; modules are supported that take images "
            "(batch, channels, h, w)."
        )
    try:
        with torch.no_grad():
            found, again = module(images), module(images)
    except Exception as error:  # the user's code
        text = f"{type(error).__name__}: {error}"
        raise InputError(f"{factory.reference} failed on sample_inputs(2) ({text}).") from error
    if not isinstance(found, Tensor) or found.ndim != 2 or found.shape[0] != images.shape[0] or found.shape[1] < 2:
        shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise UnsupportedError(f"{factory.reference} returns {shape}; logits (batch, classes) are supported.")
    if not products.all_finite(found):
        raise InputError(f"{factory.reference} puts out NaN or infinite values for sample_inputs(2).")
    if not torch.equal(found, again):
        raise UnsupportedError(f"{factory.reference} gives other outputs for the same images: it draws random numbers.")
    return found


def _as_stored(name: str, tensor: Tensor, stored: Mapping[str, Tensor], folded: Sequence[Pair]) -> Tensor:
    """In the dtype it had, unless folding made it anew."""
    is_new = name.rpartition(".")[0] in {conv for conv, _ in folded}
    return tensor.detach().clone() if is_new else tensor.detach().to(stored[name].dtype).clone()


def _structure(
    module: nn.Module, calls: Sequence[ModuleCall], output: Tensor, state: Mapping[str, Tensor]
) -> Structure:
    by_weight: dict[int, LayerSpec] = {}
    called, owners = {call.name for call in calls}, _owners(module)
    for name, child in module.named_modules():
        weight = child._parameters.get("weight")
        if name not in called or weight is None or not _is_layer(child):
            continue
        spec = _spec(name, child, state)
        first = by_weight.get(id(weight))
        by_weight[id(weight)] = spec if first is None else replace(first, users=(*first.users, name))
    shared = {key for key, spec in by_weight.items() if owners[key] != len(spec.users) or not _alike(module, spec)}
    layers = {spec.name: spec for key, spec in by_weight.items() if key not in shared}
    aliases = tied_names(module)
    owned = {f"{user}.weight" for spec in layers.values() for user in spec.users}
    owned |= {f"{spec.name}.bias" for spec in layers.values()}
    plain = tuple(name for name in state if name not in owned and name not in aliases)
    head = next((call.name for call in reversed(calls) if call.output is output and call.name in layers), None)
    return Structure(BLOCK, (BLOCK,), layers, {OUTER: (), 0: plain}, aliases, head)


def _owners(module: nn.Module) -> Counter[int]:
    """How many modules hold each parameter."""
    return Counter(id(own) for child in module.modules() for own in child._parameters.values() if own is not None)


def _alike(module: nn.Module, spec: LayerSpec) -> bool:
    """Whether all users of a weight compute with it in one way."""
    users = [module.get_submodule(user) for user in spec.users]
    return len({(isinstance(user, nn.Conv2d), getattr(user, "groups", 1)) for user in users}) == 1


def _is_layer(module: nn.Module) -> bool:
    """Whether the module computes what its class says, in a way that is stored."""
    kind = next((kind for kind in (nn.Conv2d, nn.Linear) if isinstance(module, kind)), None)
    if kind is None or type(module).forward is not kind.forward:
        return False
    if not isinstance(module, nn.Conv2d):
        return True
    return type(module)._conv_forward is nn.Conv2d._conv_forward and module.padding_mode == "zeros"


def _spec(name: str, module: nn.Module, state: Mapping[str, Tensor]) -> LayerSpec:
    weight, bias = state[f"{name}.weight"], state.get(f"{name}.bias")
    is_conv = isinstance(module, nn.Conv2d)
    return LayerSpec(
        name,
        LayerKind.CONV if is_conv else LayerKind.LINEAR,
        (int(weight.shape[0]), prod(weight.shape[1:])),
        (name,),
        has_bias=bias is not None,
        source_dtype=weight.dtype,
        segment=0,
        kernel=(int(weight.shape[1]), int(weight.shape[2]), int(weight.shape[3])) if is_conv else None,
        groups=module.groups if isinstance(module, nn.Conv2d) else 1,
        bias_dtype=None if bias is None else bias.dtype,
    )


def _places(calls: Sequence[ModuleCall], structure: Structure, batch: int) -> dict[str, int]:
    """Per image: how often each user of a layer computes all of the layer's outputs."""
    rows = {user: spec.shape[0] for spec in structure.layers.values() for user in spec.users}
    found: Counter[str] = Counter()
    for call in calls:
        if call.name in rows:
            found[call.name] += int(call.output.numel()) // (batch * rows[call.name])
    return dict(found)


def _multiplications(structure: Structure, places: Mapping[str, int]) -> int:
    """Per image: each output of a layer takes as many as its weight has columns."""
    return sum(prod(spec.shape) * places[user] for spec in structure.layers.values() for user in spec.users)


def resized(
    image: ImageModule, structure: Structure, shapes: Mapping[str, tuple[int, ...]]
) -> tuple[ImageModule, Structure]:
    """A classifier some of whose modules have weights of other shapes, by path, as the module stores them."""
    layers = {name: _resized(spec, shapes.get(name)) for name, spec in structure.layers.items()}
    structure = replace(structure, layers=layers)
    return replace(image, multiplications=_multiplications(structure, image.places)), structure


def _resized(spec: LayerSpec, shape: tuple[int, ...] | None) -> LayerSpec:
    if shape is None:
        return spec
    rows, *kernel = shape
    is_conv = spec.kernel is not None
    return replace(
        spec,
        shape=(rows, prod(kernel)),
        kernel=(kernel[0], kernel[1], kernel[2]) if is_conv else None,
        groups=rows if spec.groups > 1 else 1,  # only depthwise convolutions are resized (compress/models/edits.py)
    )


def _notes(module: nn.Module, structure: Structure, folded: Sequence[Pair], change: float) -> tuple[str, ...]:
    found = []
    if folded:
        found.append(
            f"{len(folded)} BatchNorm layer(s) are folded into the convolution before each, in the baseline too; the "
            f"output for sample_inputs changed by {change:.1g} of its largest value."
        )
    left = [name for name, child in module.named_modules() if isinstance(child, nn.BatchNorm2d)]
    if left:
        found.append(f"{len(left)} BatchNorm layer(s) follow no convolution of their own and stay: {left[0]} …")
    parameters = dict(module.named_parameters())
    wide = [name for name in structure.plain[0] if name in parameters and parameters[name].ndim > 1]
    if wide:
        found.append(f"{len(wide)} weight(s) of other kinds of layers are left as they are: {wide[0]} …")
    return tuple(found)


def _digest(factory: Factory, state: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(factory.sha256.encode())
    for name, tensor in sorted(state.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
