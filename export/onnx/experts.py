"""Mixtures of experts as a dense loop: every expert computes every token, masked by its routing weight.

Correct for any batch; the time is that of all experts. Each product goes through its layer's own lowering.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import onnx_ir as ir

from compress.export.onnx.graph import GraphBuilder
from compress.export.onnx.lowering import Choice, Source
from compress.layer import LayerKind, LayerSpec
from compress.records import Bounds

NOTE = "every expert computes every token (no kernel here picks experts), so time is that of all of them"
# Where activations are rounded, a token near the edge between two experts may take the other one, whose output is
# unrelated: 0.3 of the largest logit on small random models, so this bounds nothing but gross errors.
ROUTING_BOUND = 1.0


def noted(spec: LayerSpec, choice: Choice) -> Choice:
    """The same choice, for an expert as one that works but is not fast."""
    if spec.kind is not LayerKind.EXPERT:
        return choice
    return replace(choice, kernel="works", note="; ".join(filter(None, (NOTE, choice.note))))


def bounds(choices: Mapping[str, Choice], specs: Mapping[str, LayerSpec]) -> Bounds:
    """The loosest bounds of a model's choices; wider where a rounded activation can change a route."""
    found = Bounds.loosest(choice.bounds for choice in choices.values())
    if all(spec.kind is not LayerKind.EXPERT for spec in specs.values()):
        return found
    shipped, exact = (max(bound, ROUTING_BOUND) if bound else 0.0 for bound in (found.shipped, found.exact))
    return Bounds(shipped=shipped, exact=exact)


def lower(place: GraphBuilder, node: ir.Node, sources: Mapping[str, Source]) -> ir.Value:
    """Replace an Experts placeholder and its ExpertInput: (tokens, features) as the sum over experts.

    The captured activation of one expert is copied for each, then removed.
    """
    region = _region(node)
    start = region[0]
    hidden, activated = start.inputs[0], node.inputs[1]
    assert hidden is not None and activated is not None
    layers = [item.attributes["layer"].as_string() for item in (start, node)]
    biases = [item.inputs[count] if len(item.inputs) > count else None for item, count in ((start, 1), (node, 4))]
    total: ir.Value | None = None
    for expert, share in enumerate(_shares(place, node)):
        values = _product(place, sources[f"{layers[0]}.{expert}"], hidden, biases[0], expert)
        inner = _copy(place, region[1:], {start.outputs[0]: values}, expert)[activated]
        outer = _product(place, sources[f"{layers[1]}.{expert}"], inner, biases[1], expert)
        part = place.node("Mul", [outer, share])
        total = part if total is None else place.node("Add", [total, part])
    node.replace_input_with(0, None)
    node.replace_input_with(1, None)
    place.graph.remove(reversed(region), safe=True)
    assert total is not None
    return total


def _region(node: ir.Node) -> list[ir.Node]:
    """The ExpertInput node of an Experts node and those between them, each after what it needs."""
    start, last = _producer(node, 0), _producer(node, 1)
    inside, waiting = {start}, [start]
    while waiting:
        users = {user for value in waiting.pop().outputs for user, _ in value.uses()} - inside - {node}
        inside |= users
        waiting += users
    order: list[ir.Node] = []

    def visit(item: ir.Node) -> None:
        for before in item.predecessors():
            if before in inside and before not in order:
                visit(before)
        order.append(item)

    visit(last)
    return order


def _producer(node: ir.Node, place: int) -> ir.Node:
    value = node.inputs[place]
    assert value is not None
    producer = value.producer()
    assert producer is not None, f"{node.name} reads {value.name}, which no node makes"
    return producer


def _shares(place: GraphBuilder, node: ir.Node) -> list[ir.Value]:
    """Each expert's routing weight per token, (tokens, 1), zero where it was not picked."""
    count = int(node.attributes["count"].as_int())
    index, weights = node.inputs[2], node.inputs[3]
    assert weights is not None
    picked = place.node("OneHot", [index, place.constant(count), place.constant([0.0, 1.0], np.float32)])
    scaled = place.node("Mul", [picked, place.node("Unsqueeze", [weights, place.constant([2])])])
    shares = place.node("ReduceSum", [scaled, place.constant([1])], {"keepdims": 0})
    split = place.node("Split", [shares], {"axis": 1, "num_outputs": count}, outputs=count).producer()
    assert split is not None
    return list(split.outputs)


def _product(place: GraphBuilder, source: Source, values: ir.Value, bias: ir.Value | None, expert: int) -> ir.Value:
    """values (tokens, in) → (tokens, out), with the expert's row of bias (experts, out)."""
    inner = place.at(source.spec.name)
    written = source.choice.lowers.linear
    assert written is not None
    result = written(inner, source, values)
    if bias is not None:
        result = inner.node("Add", [result, inner.node("Gather", [bias, inner.constant(expert)])])
    place.nodes += inner.nodes
    return result


def _copy(
    place: GraphBuilder, nodes: list[ir.Node], known: dict[ir.Value, ir.Value], expert: int
) -> dict[ir.Value, ir.Value]:
    """Copy nodes, reading `known` values instead of theirs; all values of the originals → those of the copies."""
    for node in nodes:
        inputs = [None if value is None else known.get(value, value) for value in node.inputs]
        name = f"{place.prefix}.{expert}/{node.name}"
        attributes = list(node.attributes.values())
        copy = ir.Node(node.domain, node.op_type, inputs, attributes, num_outputs=len(node.outputs), name=name)
        for number, (old, new) in enumerate(zip(node.outputs, copy.outputs, strict=True)):
            new.name, new.type, new.shape = f"{name}:{number}", old.type, old.shape
            known[old] = new
        place.nodes.append(copy)
    return known
