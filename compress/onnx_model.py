"""ONNX files as models: images in, any float outputs for each image out.

An opened file is a graph with placeholders (compress/onnx_layers.py) and the weights of its layers. The graph is what a
store keeps, so an artifact needs the file no more.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import isfinite, prod
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor, nn

from compress.errors import InputError, UnsupportedError
from compress.image_model import BLOCK, StateReader
from compress.layer import LayerKind, LayerSpec
from compress.onnx_file import RUN_DOMAINS, open_file
from compress.onnx_interface import GIVEN, Interface
from compress.onnx_layers import DOMAIN, take_layers
from compress.onnx_module import GraphModule, Place, Plan
from compress.onnx_prepare import TOLERANCE, open_session, prepare, sample
from compress.skeleton import OUTER, Structure
from compress.user_module import Preprocess, normalising

FILE = "graph.onnx"
"""The graph without its layers' weights, in a store."""
PREPROCESSING = "preprocessing.json"
"""Beside a model: `mean` and `std` per channel of pixels from 0 to 1, as an exported folder has it."""


@dataclass(frozen=True, eq=False)
class OnnxModule:
    """What is known of an ONNX model besides its layers (compress/image_model.py, `ImageSource`).

    graph: with placeholders, serialized; multiplications: per image, in all layers.
    """

    interface: Interface
    preprocess: Preprocess
    graph: bytes = field(repr=False)
    multiplications: int

    @property
    def shape(self) -> tuple[int, int, int]:
        """(channels, h, w) of an image."""
        return self.interface.shape

    @property
    def classes(self) -> int:
        """Numbers that it puts out for an image."""
        return sum(self.interface.sizes)

    @property
    def outputs(self) -> tuple[tuple[str, int], ...]:
        """Name and size of each."""
        return tuple((name, prod(shape)) for name, shape in self.interface.outputs)

    @property
    def labelled(self) -> bool:
        """Whether it is a classifier: one output, a vector of two or more."""
        shapes = [shape for _, shape in self.interface.outputs]
        return len(shapes) == 1 and len(shapes[0]) == 1 and shapes[0][0] > 1

    @property
    def input(self) -> str:
        """The name of its images."""
        return self.interface.input

    @property
    def batch(self) -> int:
        """How many images it takes at once; 0 for any number."""
        return self.interface.batch

    @property
    def kept_bytes(self) -> int:
        """The graph."""
        return len(self.graph)

    @cached_property
    def plan(self) -> Plan:
        """How it is run; made once."""
        return Plan(onnx.ModelProto.FromString(self.graph))

    def skeleton(self) -> nn.Module:
        """The module tree with parameters on `meta`."""
        return GraphModule(self.plan, self.interface)

    def keep(self, folder: Path) -> dict[str, Any]:
        """Write what a store needs of it, and say how to find it again."""
        (folder / FILE).write_bytes(self.graph)
        made = self.preprocess
        preprocessing = {"text": made.text, "mean": [*made.mean], "std": [*made.std]}
        return {"graph": FILE, "multiplications": self.multiplications, "preprocessing": preprocessing}

    def described(self) -> dict[str, Any]:
        """For the preprocessing.json of an exported folder."""
        channels, height, width = self.shape
        outputs = [{"name": name, "shape": list(shape)} for name, shape in self.interface.outputs]
        return {
            "input": {"name": self.input, "channels": channels, "height": height, "width": width},
            "output": {"name": outputs[0]["name"], "classes": self.classes},
            "outputs": outputs,
            "preprocessing": self.preprocess.text,
            "mean": list(self.preprocess.mean),
            "std": list(self.preprocess.std),
        }


@dataclass(frozen=True)
class OpenedGraph:
    """An ONNX model, ready to be a Model. digest: of its files and its preprocessing."""

    image: OnnxModule
    structure: Structure
    reader: StateReader
    digest: str
    notes: tuple[str, ...]


def open_onnx(source: str) -> OpenedGraph:
    """Open `model.onnx`. Raises: UsageError, InputError (malformed, unsafe), UnsupportedError (see `prepare`)."""
    path = Path(source).expanduser()
    opened = open_file(path)
    ready, interface = prepare(opened.model, path)
    taken = take_layers(ready)
    if not taken.tensors:
        why = " ".join(taken.notes) or "It has no MatMul, Gemm or Conv."
        raise UnsupportedError(f"{path} has no layer to compress: no MatMul, Gemm or Conv of a stored weight. {why}")
    preprocess, told = _preprocess(path, interface.shape[0])
    image = OnnxModule(interface, preprocess, _with_interface(taken.model, interface), 0)
    image = replace(image, multiplications=_check_module(image, ready, taken.tensors, path))
    digest = f"{opened.sha256} {preprocess.text}"
    reader = StateReader(taken.tensors, str(path), opened.nbytes)
    return OpenedGraph(image, _structure(image.plan), reader, digest, (*taken.notes, *told))


def _with_interface(model: onnx.ModelProto, interface: Interface) -> bytes:
    del model.metadata_props[:]
    entry = model.metadata_props.add()
    entry.key, entry.value = GIVEN, interface.text
    return bytes(model.SerializeToString(deterministic=True))


def reopen_onnx(kept: Mapping[str, Any], folder: Path) -> tuple[OnnxModule, Structure]:
    """What a store holds of an ONNX model. Raises: InputError."""
    model = open_file(folder / FILE, RUN_DOMAINS | {DOMAIN}).model
    try:
        interface = Interface.read(next(item.value for item in model.metadata_props if item.key == GIVEN))
        made = kept["preprocessing"]
        preprocess = Preprocess(str(made["text"]), tuple(map(float, made["mean"])), tuple(map(float, made["std"])))
        image = OnnxModule(interface, preprocess, model.SerializeToString(), int(kept["multiplications"]))
        structure = _structure(image.plan)
    except (StopIteration, KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise InputError(f"{folder / FILE} is not a graph of a compress store ({error!r}). Run it again.") from error
    return image, structure


def _structure(plan: Plan) -> Structure:
    layers = {place.name: _spec(place) for place in plan.places}
    head = next((place.name for place in plan.places if [place.given] == plan.outputs), None)
    return Structure(BLOCK, (BLOCK,), layers, {OUTER: (), 0: ()}, {}, head)


def _spec(place: Place) -> LayerSpec:
    shape = [int(size) for size in place.attributes["weight"]]
    is_conv = place.kind == "Conv"
    return LayerSpec(
        place.name,
        LayerKind.CONV if is_conv else LayerKind.LINEAR,
        (shape[0], prod(shape[1:])),
        (place.name,),
        has_bias=bool(place.attributes["bias"]),
        segment=0,
        kernel=(shape[1], shape[2], shape[3]) if is_conv else None,
        groups=int(place.attributes["group"]) if is_conv else 1,
    )


def _check_module(image: OnnxModule, ready: onnx.ModelProto, tensors: Mapping[str, Tensor], path: Path) -> int:
    """Hold the module against ONNX Runtime. Returns: multiplications per image. Raises: UnsupportedError."""
    module = image.skeleton()
    module.load_state_dict(dict(tensors), strict=True, assign=True)
    module.requires_grad_(False)
    images = torch.from_numpy(sample(image.shape, image.interface.batch))
    counted: list[int] = []
    for place in image.plan.places:
        columns = prod(int(size) for size in place.attributes["weight"][1:])

        def count(_module: nn.Module, _inputs: Any, output: Tensor, columns: int = columns) -> None:
            counted.append(output.numel() * columns)

        module.get_submodule(place.name).register_forward_hook(count)
    with torch.no_grad():
        found = module(images)
    outputs = open_session(ready, str(path)).run(None, {image.input: images.numpy()})
    wanted = torch.cat([torch.from_numpy(output).reshape(len(images), -1) for output in outputs], 1)
    change = float((found - wanted).abs().max() / (wanted.abs().max() or 1.0))
    if not change <= TOLERANCE:
        raise UnsupportedError(
            f"{path}: read layer by layer its outputs differ by {change:.2g} of the largest. Please report this."
        )
    return sum(counted) // len(images)


def _preprocess(path: Path, channels: int) -> tuple[Preprocess, tuple[str, ...]]:
    """From the preprocessing.json beside a model. Raises: InputError."""
    beside = path.parent / PREPROCESSING
    if not beside.is_file():
        note = (
            f"No {PREPROCESSING} beside the model: pixels (uint8) enter it as x / 255. If it takes others, "
            "write one with mean and std per channel, such as "
            '{"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}.'
        )
        return Preprocess("x / 255"), (note,)
    try:
        content = json.loads(beside.read_text(encoding="utf8"))
        mean, std = (tuple(float(figure) for figure in content[name]) for name in ("mean", "std"))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{beside} is malformed ({error!r}). Wanted: an object with the lists mean and std."
        ) from error
    if not mean and not std:
        return Preprocess("x / 255"), ()
    if {len(mean), len(std)} != {channels} or min(std) <= 0 or not all(map(isfinite, (*mean, *std))):
        raise InputError(f"{beside}: mean {mean}, std {std}; {channels} figure(s) each are wanted, std above 0.")
    return normalising(mean, std), ()
