"""The `onnx` target: capture, lower every placeholder by its layer's format, write weights tensor by tensor."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
from torch import Tensor

from compress.export.onnx import (
    angles,
    attention,
    cache_codes,
    experts,
    files,
    fusions,
    grouped_codes,
    grouped_query,
    growing,
    half,
    providers,
    qdq_edges,
    slot_heads,
    slots,
    transforms,
)
from compress.export.onnx.capture import PARAMETER, cache_shapes, capture_graph
from compress.export.onnx.deployed import deployed
from compress.export.onnx.graph import MICROSOFT, GraphBuilder
from compress.export.onnx.graphs import compare_graphs
from compress.export.onnx.interfaces import DOMAIN
from compress.export.onnx.lowering import Choice, Source, by_user, choose, lowerings, sources_of
from compress.export.onnx.pattern import put_all_for
from compress.export.onnx.profiler import profile_operators
from compress.export.onnx.runner import Runner
from compress.export.onnx.runtime import (
    PORTABLE,
    REASON,
    ROUNDED,
    SHARED,
    SLOTS,
    Session,
    preferred,
)
from compress.export.onnx.shared_runner import SharedRunner
from compress.export.onnx.slot_runner import SlotRunner
from compress.export.onnx.slot_session import SlotSession
from compress.export.tensorrt import shapes
from compress.honours import combined
from compress.hwprofiles import Profile, Runtime
from compress.kv.spec import KvSpec
from compress.layer import LayerSpec
from compress.models.model import Model, Task
from compress.runtime import probing
from compress.target import Lowered, Refusal, accepted, as_dense

RUNTIME = "onnxruntime"
FOLDER = "onnx"
HONOURS = combined(module.LOWERS.honours for module in lowerings())
TAKES_GRAPHS = True
TAKES_EDITS = True
GRAPH, DATA = files.GRAPH, files.DATA
Attend = Callable[[GraphBuilder, ir.Node, ir.Value, ir.Value], list[ir.Value]]


# the interface of compress.target
__all__ = ["FOLDER", "RUNTIME", "TAKES_EDITS", "TAKES_GRAPHS", "capture", "compare_graphs", "plan_layer"]
__all__ += ["predict_bytes", "probe_command", "profile_operators", "runner", "session", "takes_caches", "timed_here"]
__all__ += ["write"]


def session(folder: Path, threads: int, exact: bool = False) -> Session:
    """A written folder in ONNX Runtime, the graph that decodes faster where it has two; exact: see `Session`, then
    without what a cache that drops or rounds loses."""
    if not exact:
        return deployed(folder, threads)
    plain = (folder / ROUNDED).is_file()
    return Session(folder, threads, exact=True, graph=PORTABLE if plain else preferred(folder))


def timed_here(profile: Profile) -> bool:
    """Whether the profile's provider is one that this machine has."""
    return providers.usable(profile.runtime(RUNTIME).provider)


def runner(session: Session, folder: Path) -> Runner:
    """Batches through a session."""
    if isinstance(session, SlotSession):
        return SlotRunner(session, folder)
    return SharedRunner(session, folder) if session.shares_cache else Runner(session, folder)


def probe_command(folder: Path, threads: int, prompt: int, tokens: int) -> list[str]:
    """Runs `runtime.probe` in a process of its own."""
    return probing.command("compress.export.onnx.deployed", folder, threads, prompt, tokens)


def takes_caches(specs: Sequence[KvSpec], profile: Profile) -> Refusal | None:
    """Why caches cannot be exported; None where they can."""
    runtime = profile.runtime(RUNTIME)
    return slots.refusal(specs, runtime) if any(spec.evicts for spec in specs) else growing.refusal(specs, runtime)


def plan_layer(spec: LayerSpec, profile: Profile) -> Choice | Refusal:
    """A layer's `Choice` or `Refusal`; the same function decides in `plan` and in `write`."""
    answer = choose(spec.as_dense, profile.runtime(RUNTIME))
    return as_dense(spec, experts.noted(spec, answer) if isinstance(answer, Choice) else answer)


def capture(model: Model, profile: Profile) -> bytes:
    """The weight-free graph of a model's structure. Raises: UnsupportedError where it cannot be traced."""
    if model.image is not None and model.image.graph:
        return model.image.graph
    return capture_graph(model, profile.runtime(RUNTIME).opset)


def predict_bytes(specs: Iterable[LayerSpec], model: Model, profile: Profile) -> int:
    """Bytes of the folder that `write` would make, without the weights (graph estimated per node kind). Raises:
    UnsupportedError for caches whose vectors codes do not divide."""
    specs, runtime = [spec.as_dense for spec in specs], profile.runtime(RUNTIME)
    choices = [choice for spec in specs if isinstance(choice := choose(spec, runtime), Choice)]
    weights = sum(choice.stored_bytes for choice in choices) + transforms.stored_bytes(specs)
    nodes = sum(choice.graph_bytes for choice in choices)
    if model.image is not None:
        quantized = sum(spec.format is not None for spec in specs)
        nodes += IMAGE_BYTES + len(specs) * IMAGE_LAYER_BYTES + quantized * DECODED_BYTES
        return weights + model.plain_bytes + nodes
    side = model.side_bytes + CONFIG_BYTES
    layers = len(choices)
    graphs = GRAPH_BASE_BYTES + layers * GRAPH_LAYER_BYTES + nodes
    drops, reason = any(spec.evicts for spec in model.kv), grouped_codes.refusal(model.kv)
    if model.kv and not drops:
        graphs += GRAPH_BASE_BYTES + layers * ROUNDED_LAYER_BYTES + nodes
        sizes = (size for _, size in cache_shapes(model))
        graphs += sum(map(cache_codes.graph_bytes, model.kv, sizes))
    if drops:
        graphs += slot_heads.predict_bytes(model)
        graphs += SLOTS_BASE_BYTES + layers * SHARED_LAYER_BYTES + len(model.kv) * SLOTS_CACHE_BYTES + nodes
        graphs += sum(
            SLOTS_ROUNDED_BYTES * len([text for text in (each.keys, each.values) if text]) for each in model.kv
        )
    elif model.task is Task.CAUSAL_LM and not reason and cache_shapes(model)[0][1] % grouped_query.STEP == 0:
        rotary = angles.predict_bytes(model.config, model.longest) // (2 if half.wanted(runtime) else 1)
        graphs += SHARED_BASE_BYTES + layers * SHARED_LAYER_BYTES + nodes + rotary
    return weights + model.plain_bytes + side + graphs


# Fitted on the graphs of tests/test_plan.py: bytes of model.onnx besides weights, and of the two JSON files.
CONFIG_BYTES = 2_500
GRAPH_BASE_BYTES = 8_000
GRAPH_LAYER_BYTES = 1_900
# and of model_gqa.onnx
SHARED_BASE_BYTES = 8_000
SHARED_LAYER_BYTES = 1_200
# and of model_kv.onnx, but for its codes
ROUNDED_LAYER_BYTES = 1_400
# and of model_slots.onnx, by layers, by caches, and by keys or values that are rounded
SLOTS_BASE_BYTES = 8_000
SLOTS_CACHE_BYTES = 8_800
SLOTS_ROUNDED_BYTES = 3_800
# The same of image classifiers (the test's own CNN, resnet20 and resnet44): nodes of a layer, and what decoding adds.
IMAGE_BYTES = 800
IMAGE_LAYER_BYTES = 720
DECODED_BYTES = 730


def write(model: Model, profile: Profile, folder: Path, graph: bytes | None = None) -> Lowered:
    """Write the folder for a model whose layers carry their formats.

    Args: model: from `open_store`, or a source (then all layers are float: the baseline); graph: an earlier `capture`
    of the same structure.
    Raises: UsageError, UnsupportedError naming the layer that no operator takes.
    """
    model, runtime = model.as_dense, profile.runtime(RUNTIME)
    specs = model.structure.layers
    answers = {name: choose(spec, runtime) for name, spec in specs.items()}
    choices = accepted(answers, f"exported for profile {profile.id}")
    document = onnx.load_from_string(graph or capture(model, profile))
    sources = by_user(sources_of(model, choices))
    folder.mkdir(parents=True, exist_ok=True)
    drops = any(spec.evicts for spec in model.kv)
    decodes = model.task is Task.CAUSAL_LM and not drops
    reason = grouped_query.refusal(ir.from_proto(document).graph, runtime) if decodes else ""
    if decodes and not reason:
        reason = grouped_codes.refusal(model.kv)
    portable = _document(ir.from_proto(document), sources, model, runtime, fusions.attend(runtime))
    if reason:
        portable.metadata_props[REASON] = reason
    ir.save(portable, folder / GRAPH, external_data=DATA)
    shared = decodes and not reason
    for name in (SHARED, SLOTS, ROUNDED):
        (folder / name).unlink(missing_ok=True)
    for name, other in _others(document, sources, model, runtime, shared):
        _beside(other, folder / name)
    files.write(model, folder, shared)
    ranges = {} if runtime.provider == providers.CPU else shapes.ranges(model, profile)
    providers.write(folder, profile.id, runtime.provider, ranges)
    return Lowered.of(folder, choices, specs, experts.bounds(choices, specs))


def _others(
    document: onnx.ModelProto, sources: Mapping[str, Source], model: Model, runtime: Runtime, shared: bool
) -> Iterator[tuple[str, ir.Model]]:
    """The graphs beside the portable one, by file name. shared: whether one has GroupQueryAttention."""
    facts = growing.facts(model.kv)
    if any(spec.evicts for spec in model.kv):
        lowering, opened = slots.Slots(model.kv, model.kv_tensors), ir.from_proto(document)
        lowering.open(opened.graph)
        slotted = _document(opened, sources, model, runtime, lowering)
        lowering.close(slotted)
        yield SLOTS, slotted
        return
    attends = {SHARED: grouped_codes.attend(model)} if shared else dict[str, Attend]()
    if model.kv:
        attends[ROUNDED] = growing.Growing(model.kv, model.kv_tensors)
    for name, attend in attends.items():
        made = _document(ir.from_proto(document), sources, model, runtime, attend)
        made.metadata_props.update(facts)
        yield name, made


def _beside(document: ir.Model, path: Path) -> None:
    """Save another graph of the same weights, which stay in the first one's file."""
    grouped_query.refer(document, ir.load(path.with_name(GRAPH)), DATA)
    ir.save(document, path)


def _document(
    lowered: ir.Model, sources: Mapping[str, Source], model: Model, runtime: Runtime, attend: Attend
) -> ir.Model:
    """The captured graph, every placeholder lowered. attend: how an attention with or without a cache is."""
    lower(lowered, sources, model, attend)
    fusions.fuse(lowered, runtime)
    if half.wanted(runtime):
        half.halve(lowered, {name for source in sources.values() for name in source.choice.lowers.half})
    _open_cache_inputs(lowered.graph)
    lowered.ir_version = runtime.ir_version
    lowered.producer_name = "compress"
    lowered.producer_version = None
    lowered.opset_imports.pop(DOMAIN, None)
    lowered.opset_imports[MICROSOFT] = 1
    return lowered


def _open_cache_inputs(graph: ir.Graph) -> None:
    """Leave the heads and head size of the cache inputs open; the outputs keep them.

    optimum guesses those of the empty first cache from the config, wrongly where head_dim is explicit, and an empty
    tensor of another width is harmless.
    """
    for value in graph.inputs:
        if value.name is not None and value.name.startswith("past_key_values."):
            assert value.shape is not None
            batch, _, length, _ = value.shape
            value.shape = ir.Shape([batch, f"{value.name}.heads", length, f"{value.name}.size"])


def lower(
    document: ir.Model, sources: Mapping[str, Source], model: Model, attend: Attend = attention.attention
) -> None:
    """Turn parameters into initializers and each placeholder into its lowering's nodes, in place. sources: by user."""
    graph = document.graph
    builder = GraphBuilder(graph)
    slots.forget_features(graph)
    _parameters_to_initializers(graph, builder, model)
    inputs = {value.name: value for value in graph.inputs}
    for node in list(graph):
        if node.domain != DOMAIN or node.op_type == "ExpertInput":  # its Experts node takes it along
            continue
        if node.op_type == "Attention":
            place = builder.at(node.name or "attention")
            values = attend(place, node, inputs["input_ids"], inputs["attention_mask"])
        elif node.op_type == "Experts":
            place = builder.at(node.attributes["layer"].as_string())
            values = [experts.lower(place, node, sources)]
        else:
            user = node.attributes["layer"].as_string()
            place = builder.at(user)
            values = [_lower_layer(place, node, sources[user])]
        put_all_for(graph, node, place.nodes, values)
    qdq_edges.close(builder)


def _lower_layer(builder: GraphBuilder, node: ir.Node, source: Source) -> ir.Value:
    values = node.inputs[0]
    assert values is not None
    if source.spec.pre:
        values = transforms.lower(builder, source.spec.pre, values)
    return source.choice.lowers.write(builder, source, values, node)


def _parameters_to_initializers(graph: ir.Graph, builder: GraphBuilder, model: Model) -> None:
    for value in list(graph.inputs):
        if value.name is None or not value.name.startswith(PARAMETER):
            continue
        name = value.name.removeprefix(PARAMETER)
        shape, dtype = model.plain_shapes[name]
        graph.inputs.remove(value)
        if not value.uses():
            continue
        initializer = builder.float_initializer(name, _plain_reader(model, name), dtype, shape)
        value.replace_all_uses_with(initializer)


def _plain_reader(model: Model, name: str) -> Any:
    def read() -> Tensor:
        return model.reader.plain([name])[name]

    return read
