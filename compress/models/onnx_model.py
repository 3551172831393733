"""ONNX files as models: images, texts or any arrays in, any float outputs for each sample out.

An opened file is a graph with placeholders (compress/models/onnx_layers.py) and the weights of its layers. The graph is
what a store keeps, so an artifact needs the file no more.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor, nn

from compress.errors import InputError, UnsupportedError
from compress.layer import LayerKind, LayerSpec
from compress.models.image_source import BLOCK, Opened
from compress.models.onnx_file import RUN_DOMAINS, open_file
from compress.models.onnx_folder import Beside, read_beside, read_preprocessing
from compress.models.onnx_interface import GIVEN, IDS, Interface
from compress.models.onnx_layers import DOMAIN, take_layers
from compress.models.onnx_module import GraphModule, Place, Plan
from compress.models.onnx_prepare import TOLERANCE, prepare, sample
from compress.models.onnx_runtime import open_session
from compress.models.reader import StateReader
from compress.models.skeleton import OUTER, Structure
from compress.models.user_module import Preprocess

FILE = "graph.onnx"
"""The graph without its layers' weights, in a store."""
AS_STORED = "none: arrays as they are"


@dataclass(frozen=True, eq=False)
class OnnxModule:
    """What is known of an ONNX model besides its layers (compress/models/image_model.py, `ImageSource`).

    graph: with placeholders, serialized; multiplications: per sample, in all layers; labelled: whether it puts out the
    logits of classes; positions: tokens of the longest text, where it takes texts; beside: files that a text needs.
    """

    interface: Interface
    preprocess: Preprocess
    graph: bytes = field(repr=False)
    multiplications: int
    labelled: bool = False
    positions: int = 0
    beside: tuple[Path, ...] = ()

    @property
    def shape(self) -> tuple[int, ...]:
        """(channels, h, w) of an image, (width,) of any other row."""
        return self.interface.shape

    @property
    def is_image(self) -> bool:
        """Whether it takes images."""
        return self.interface.is_image

    @property
    def classes(self) -> int:
        """Numbers that it puts out for a sample."""
        return sum(self.interface.sizes(self.interface.length))

    @property
    def outputs(self) -> tuple[tuple[str, int], ...]:
        """Name and size of each."""
        return tuple((name, prod(shape)) for name, shape in self.interface.shapes(self.interface.length))

    def sizes(self, row: tuple[int, ...]) -> tuple[int, ...]:
        """Of each output for a row of a shape."""
        return self.interface.sizes(self.interface.length_of(row))

    def noise(self, count: int, row: tuple[int, ...]) -> Tensor:
        """Made-up rows, the same each time."""
        length = self.interface.length_of(row)
        if self.is_image:
            return torch.randn(count, *row, generator=torch.Generator().manual_seed(0))
        return torch.from_numpy(self.interface.drawn(count, length, np.random.default_rng(0)))

    @property
    def input(self) -> str:
        """The name of its images."""
        return self.interface.input

    @property
    def batch(self) -> int:
        """How many samples it takes at once; 0 for any number."""
        return self.interface.batch

    @property
    def vocabulary(self) -> int:
        """Token ids are below it; 0 where it takes no texts."""
        if not self.interface.is_text:
            return 0
        return next(feed.high for feed in self.interface.inputs if feed.name == IDS)

    @property
    def longest(self) -> int:
        """Tokens of the longest text that it takes; 0 where it takes none."""
        return (self.fixed_length or self.positions or self.interface.length) if self.interface.is_text else 0

    @property
    def fixed_length(self) -> int:
        """Tokens of all texts, where there is no other length; else 0."""
        return self.interface.inputs[0].shape[0] if self.interface.is_text else 0

    def side_files(self) -> Sequence[Path]:
        """Config and tokenizer of a model of texts."""
        return self.beside

    @property
    def kept_bytes(self) -> int:
        """The graph, and what lies beside it."""
        return len(self.graph) + sum(path.stat().st_size for path in self.beside)

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
        facts = {"graph": FILE, "multiplications": self.multiplications, "preprocessing": preprocessing}
        return facts | {"labelled": self.labelled, "positions": self.positions}

    def described(self) -> dict[str, Any]:
        """For the preprocessing.json of an exported folder."""
        shapes = self.interface.shapes(self.interface.length)
        outputs = [{"name": name, "shape": list(shape)} for name, shape in shapes]
        facts = {"output": {"name": outputs[0]["name"], "classes": self.classes}, "outputs": outputs}
        if not self.is_image:
            return facts | {"interface": json.loads(self.interface.text), "longest": self.longest}
        channels, height, width = self.shape
        return facts | {
            "input": {"name": self.input, "channels": channels, "height": height, "width": width},
            "preprocessing": self.preprocess.text,
            "mean": list(self.preprocess.mean),
            "std": list(self.preprocess.std),
        }


def open_onnx(path: Path) -> Opened[OnnxModule]:
    """Open `model.onnx`. Raises: UsageError, InputError (malformed, unsafe), UnsupportedError, ResourceError (see
    `prepare`)."""
    opened, beside = open_file(path), read_beside(path)
    ready, interface, notes = prepare(opened.model, path, beside)
    taken = take_layers(ready)
    if not taken.tensors:
        why = " ".join(taken.notes) or "It has no MatMul, Gemm or Conv."
        raise UnsupportedError(f"{path} has no layer to compress: no MatMul, Gemm or Conv of a stored weight. {why}")
    preprocess, told = Preprocess(AS_STORED), tuple[str, ...]()
    if interface.is_image:
        preprocess, told = read_preprocessing(beside, interface.shape[0])
    image = OnnxModule(
        interface,
        preprocess,
        _with_interface(taken.model, interface),
        0,
        _is_classifier(interface, beside),
        beside.longest,
        tuple(beside.side_files()) if interface.is_text else (),
    )
    image = replace(image, multiplications=_check_module(image, ready, taken.tensors, path))
    digest = f"{opened.sha256} {preprocess.text}"
    reader = StateReader(taken.tensors, str(path), opened.nbytes)
    return Opened(image, _structure(image.plan), reader, digest, (*notes, *taken.notes, *told))


def _is_classifier(interface: Interface, beside: Beside) -> bool:
    """One vector of two or more: of images unless a config says that it is something else, of other inputs where it is
    named logits, or a config says so."""
    shapes = [shape for _, shape in interface.outputs]
    if len(shapes) != 1 or len(shapes[0]) != 1 or shapes[0][0] < 2:
        return False
    if interface.is_image:
        return beside.is_classifier or not beside.architecture
    return beside.is_classifier or interface.outputs[0][0] == "logits"


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
        labelled, positions = bool(kept["labelled"]), int(kept["positions"])
        beside = tuple(Beside(folder).side_files()) if interface.is_text else ()
        graph, count = model.SerializeToString(), int(kept["multiplications"])
        image = OnnxModule(interface, preprocess, graph, count, labelled, positions, beside)
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
    """Hold the module against ONNX Runtime. Returns: multiplications per sample. Raises: UnsupportedError."""
    module = image.skeleton()
    module.load_state_dict(dict(tensors), strict=True, assign=True)
    module.requires_grad_(False)
    rows = sample(image.interface)
    counted: list[int] = []
    for place in image.plan.places:
        columns = prod(int(size) for size in place.attributes["weight"][1:])

        def count(_module: nn.Module, _inputs: Any, output: Tensor, columns: int = columns) -> None:
            counted.append(output.numel() * columns)

        module.get_submodule(place.name).register_forward_hook(count)
    with torch.no_grad():
        found = module(torch.from_numpy(rows))
    session = open_session(ready, str(path))
    wanted = torch.from_numpy(image.interface.rows(lambda inputs: session.run(None, inputs), rows))
    change = float((found - wanted).abs().max() / (wanted.abs().max() or 1.0))
    if not change <= TOLERANCE:
        raise UnsupportedError(
            f"{path}: read layer by layer its outputs differ by {change:.2g} of the largest. Please report this."
        )
    return sum(counted) // len(rows)
