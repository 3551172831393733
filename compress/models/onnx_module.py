"""An ONNX graph as a torch module: its layers are torch's own, everything between them runs in ONNX Runtime.

So statistics, sequential calibration and the judgement in memory are those of any module. What lies between two layers
is one session per level: a node's level is the number of layers on the longest way to it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import helper
from torch import Tensor, nn

from compress.models.onnx_interface import Interface
from compress.models.onnx_layers import DOMAIN
from compress.models.onnx_runtime import failure, open_session


@dataclass(frozen=True)
class Place:
    """A layer in the graph: its name, the values it takes and gives, and the attributes of its placeholder."""

    name: str
    kind: str
    taken: str
    given: str
    attributes: dict[str, Any]

    def module(self) -> nn.Module:
        """The torch module without values."""
        found, shape = self.attributes, [int(size) for size in self.attributes["weight"]]
        if self.kind == "Linear":
            return nn.Linear(shape[1], shape[0], bias=bool(found["bias"]), device="meta")
        groups, pads = int(found["group"]), list(found["pads"])
        return nn.Conv2d(
            shape[1] * groups,
            shape[0],
            (shape[2], shape[3]),
            tuple(found["strides"]),
            (pads[0], pads[1]),
            tuple(found["dilations"]),
            groups,
            bool(found["bias"]),
            device="meta",
        )


@dataclass
class _Level:
    """What runs in ONNX Runtime, then the layers. drop: values that nothing needs afterwards."""

    nodes: list[onnx.NodeProto] = field(default_factory=list)
    places: list[Place] = field(default_factory=list)
    session: Any = None
    inputs: list[str] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)
    drop: list[str] = field(default_factory=list)

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> list[NDArray[Any]]:
        """The session's outputs. Raises: ResourceError, InputError."""
        try:
            found: list[NDArray[Any]] = self.session.run(self.outputs, dict(feeds))
        except Exception as error:  # onnxruntime raises its own kinds, which share no base but Exception
            raise failure(error, f"What lies between layers, with {self.nodes[0].name}, fails") from error
        return found


class Plan:
    """How a graph with placeholders is run. It is the same for every module of the graph, and never copied."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.outputs = [value.name for value in model.graph.output]
        self.levels = _levels(model.graph)
        self.places = [place for level in self.levels for place in level.places]
        _connect(model, self.levels, self.outputs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Plan:
        return self

    def run(self, module: nn.Module, inputs: Mapping[str, Tensor], device: torch.device) -> list[Tensor]:
        """The outputs for as many samples as the graph takes at once."""
        values = dict(inputs)
        for level in self.levels:
            if level.session is not None:
                feeds = {name: values[name].detach().cpu().numpy() for name in level.inputs}
                found = level.run(feeds)
                values |= {name: torch.from_numpy(array) for name, array in zip(level.outputs, found, strict=True)}
            for place in level.places:
                # on its device under its name, so that layers that share an input see one tensor
                values[place.taken] = values[place.taken].to(device)
                values[place.given] = module.get_submodule(place.name)(values[place.taken])
            for name in level.drop:
                values.pop(name, None)
        return [values[name].to(device) for name in self.outputs]


class GraphModule(nn.Module):
    """Rows (`Interface`; images are their own) → (n, all outputs of a sample in a row), as many at a time as the graph
    takes.

    Gradients end where ONNX Runtime begins.
    """

    def __init__(self, plan: Plan, interface: Interface) -> None:
        super().__init__()
        self.__dict__["_plan"] = plan
        self.interface = interface
        for place in plan.places:
            _put(self, place.name, place.module())

    def forward(self, samples: Tensor) -> Tensor:
        """See above."""
        plan: Plan = self.__dict__["_plan"]

        def run(inputs: dict[str, NDArray[Any]]) -> list[NDArray[Any]]:
            given = {name: torch.from_numpy(array) for name, array in inputs.items()}
            return [output.detach().cpu().numpy() for output in plan.run(self, given, samples.device)]

        rows = self.interface.rows(run, np.ascontiguousarray(samples.detach().cpu().numpy()))
        return torch.from_numpy(rows).to(samples.device)


def _put(module: nn.Module, name: str, child: nn.Module) -> None:
    """Add a child at a path, with plain modules on the way."""
    *way, last = name.split(".")
    for part in way:
        if part not in module._modules:
            module.add_module(part, nn.Module())
        module = module._modules[part]  # type: ignore[assignment]
    module.add_module(last, child)


def _levels(graph: onnx.GraphProto) -> list[_Level]:
    levels: list[_Level] = []
    at: dict[str, int] = {}
    for node in graph.node:
        depth = max((at[name] for name in node.input if name in at), default=0)
        while len(levels) <= depth:
            levels.append(_Level())
        if node.domain == DOMAIN:
            attributes = {each.name: helper.get_attribute_value(each) for each in node.attribute}
            name = attributes.pop("layer").decode()
            levels[depth].places.append(Place(name, node.op_type, node.input[0], node.output[0], attributes))
            at[node.output[0]] = depth + 1
        else:
            levels[depth].nodes.append(node)
            at |= {name: depth for name in node.output if name}
    return levels


def _connect(model: onnx.ModelProto, levels: Sequence[_Level], outputs: Sequence[str]) -> None:
    """Find out what each level takes and gives, and make its session."""
    graph = model.graph
    stored = {tensor.name: tensor for tensor in graph.initializer}
    types = {value.name: value for value in (*graph.value_info, *graph.input, *graph.output)}
    last = {name: len(levels) for name in outputs}
    for depth, level in enumerate(levels):
        own = {name for node in level.nodes for name in node.output}
        read = {name for node in level.nodes for name in node.input if name}
        level.inputs = sorted(read - own - set(stored))
        for name in (*level.inputs, *(place.taken for place in level.places)):
            last[name] = max(last.get(name, 0), depth)
    for depth, level in enumerate(levels):
        made = [name for node in level.nodes for name in node.output if name]
        level.outputs = [name for name in made if name in last]
        level.drop = [name for name, when in last.items() if when == depth]
        if level.nodes:
            level.session = _session(model, level, stored, types)


def _session(
    model: onnx.ModelProto, level: _Level, stored: Mapping[str, onnx.TensorProto], types: Mapping[str, Any]
) -> Any:
    inputs = [_open(name, types) for name in level.inputs]
    outputs = [_open(name, types) for name in level.outputs]
    names = dict.fromkeys(name for node in level.nodes for name in node.input if name in stored)
    graph = helper.make_graph(level.nodes, "between layers", inputs, outputs, [stored[name] for name in names])
    imports = [item for item in model.opset_import if item.domain != DOMAIN]
    made = helper.make_model(graph, opset_imports=imports, ir_version=model.ir_version)
    return open_session(made, f"what lies between layers, with {level.nodes[0].name}")


def _open(name: str, types: Mapping[str, Any]) -> onnx.ValueInfoProto:
    """A value with its type and any shape; what a layer puts out is float32."""
    known = types.get(name)
    kind = known.type.tensor_type.elem_type if known is not None else onnx.TensorProto.FLOAT
    return helper.make_tensor_value_info(name, kind or onnx.TensorProto.FLOAT, None)
