"""The `tensorrt` target: the captured graph in TensorRT's types, checked first, and an engine built from it.

See compress.target.Target. Engines are built by TensorRT-RTX ahead of time, without a GPU, for the compute
capabilities that it offers; for others by TensorRT on the chip itself, here where this machine has it, else when the
artifact is verified on one that has: until then the folder holds the graph, tensorrt.json and build_command.txt.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray

from compress.export.onnx import experts, files, providers, slot_heads, slots, transforms
from compress.export.onnx import target as portable
from compress.export.onnx.capture import capture_graph
from compress.export.onnx.interfaces import DOMAIN
from compress.export.onnx.lowering import by_user, sources_of
from compress.export.tensorrt import builder, building, engine, flavours, record, rules, shapes, slotted, sparsity
from compress.export.tensorrt.engine import EngineSession
from compress.export.tensorrt.half import KINDS, halve, halve_cache
from compress.export.tensorrt.lowering import LOWERS, PARSER
from compress.export.tensorrt.runner import Runner
from compress.export.tensorrt.runtime import Session, not_timed
from compress.hwprofiles import Profile, Runtime
from compress.kv.spec import KvSpec
from compress.layer import LayerSpec
from compress.models.model import Model, Task
from compress.runtime import probing
from compress.target import Lowered, Refusal, accepted, as_dense, granted
from compress.target import Session as AnySession

RUNTIME = rules.RTX
FOLDER = "tensorrt"
HONOURS = LOWERS.honours
TAKES_EDITS = True
ON_GPU = True
COMMAND = "build_command.txt"
FP4_OPSET, FP4_IR = 23, 11
# Fitted on models of 1 to 8 blocks (TensorRT-RTX 1.7.1): code in an engine, of the whole and per layer. A decoder has
# two optimization profiles, each with code of its own.
ENGINE_BYTES = {Task.CAUSAL_LM: 2_000_000, Task.ENCODER: 900_000}
ENGINE_LAYER_BYTES = {Task.CAUSAL_LM: 310_000, Task.ENCODER: 190_000}
# And of slots (benchmarks/kv_tensorrt.py, 1 and 2 blocks): the whole, each cache, keys or values that are codes; where
# tokens are not ranked by position alone, as much again of the first two.
SLOTS_BYTES, SLOTS_CACHE_BYTES, SLOTS_ROUNDED_BYTES = 2_100_000, 1_300_000, 320_000
IMAGE_ENGINE_BYTES, IMAGE_ENGINE_LAYER_BYTES = 300_000, 120_000
RECORD_BYTES = 2_000

# the interface of compress.target
__all__ = ["FOLDER", "ON_GPU", "RUNTIME", "capture", "plan_layer", "predict_bytes", "predict_deployed_bytes"]
__all__ += ["complete", "deployed_bytes", "misfit", "probe_command", "require_tools", "runner", "session", "timed_here"]
__all__ += ["HONOURS", "compare_graphs", "predict_parts", "takes_caches", "write", "write_baseline"]


def _builds(profile: Profile) -> bool:
    """Whether an engine is built here."""
    return building.flavour_for(profile) is not None


def require_tools(profile: Profile) -> None:
    """Raises: UnsupportedError where an engine is to be built and what builds it is missing or makes no builder;
    UsageError for a profile of another kind of machine."""
    _runtime(profile)
    flavour = building.flavour_for(profile)
    if flavour is not None and profile.gpu is not None:
        builder.require_builder(flavour, profile.gpu.sm)


def _runtime(profile: Profile) -> Runtime:
    return granted(rules.runtime_of(profile), "tensorrt", profile)


def takes_caches(specs: Sequence[KvSpec], profile: Profile) -> Refusal | None:
    """See Target: caches that drop tokens, as slots of an engine that TensorRT-RTX builds."""
    return slotted.refusal(specs, profile)


def plan_layer(spec: LayerSpec, profile: Profile) -> rules.EngineChoice | Refusal:
    """See Target: the rules of TensorRT and the formats of the chip, without building anything."""
    answer = sparsity.noted(spec.as_dense, rules.choose(spec.as_dense, profile), profile)
    return as_dense(spec, answer)


def capture(model: Model, profile: Profile) -> bytes:
    """See Target. Raises: UnsupportedError where the model cannot be traced."""
    return capture_graph(model, _runtime(profile).opset)


def predict_bytes(specs: Iterable[LayerSpec], model: Model, profile: Profile) -> int:
    """See Target: the graph and its weights, and the engine with the same again."""
    graph, engine = _predicted(list(specs), model, profile)
    return graph + RECORD_BYTES + model.side_bytes + (engine if _builds(profile) else 0)


def predict_deployed_bytes(specs: Iterable[LayerSpec], model: Model, profile: Profile) -> int:
    """See Target: the engine alone, or the graph where none is built."""
    graph, engine = _predicted(list(specs), model, profile)
    return engine if _builds(profile) else graph


def predict_parts(specs: Iterable[LayerSpec], model: Model, profile: Profile) -> dict[str, int]:
    """See Target: the engine and the graph that it is built from; nothing where none is built."""
    graph, engine = _predicted(list(specs), model, profile)
    return {"the engine": engine, "the graph that it is built from": graph} if _builds(profile) else {}


def _predicted(specs: Sequence[LayerSpec], model: Model, profile: Profile) -> tuple[int, int]:
    """Bytes of the graph with its weights, and of an engine."""
    specs = [spec.as_dense for spec in specs]
    choices = [choice for spec in specs if not isinstance(choice := plan_layer(spec, profile), Refusal)]
    weights = sum(choice.stored_bytes for choice in choices) + model.plain_bytes + transforms.stored_bytes(specs)
    weights += slot_heads.predict_bytes(model) if model.kv else 0
    graph = weights + portable.GRAPH_BASE_BYTES + len(choices) * portable.GRAPH_LAYER_BYTES
    base = ENGINE_BYTES.get(model.task, IMAGE_ENGINE_BYTES)
    decoded = sum(choice.decoded_bytes for choice in choices)
    engine = weights + decoded + base + len(choices) * ENGINE_LAYER_BYTES.get(model.task, IMAGE_ENGINE_LAYER_BYTES)
    return graph, engine + _slots_bytes(model.kv)


def _slots_bytes(specs: Sequence[KvSpec]) -> int:
    """Code of an engine whose cache drops tokens."""
    if not specs:
        return 0
    ranked = [spec for spec in specs if spec.scorer != "position"]
    rounded = sum(bool(text) for spec in specs for text in (spec.keys, spec.values))
    caches = SLOTS_CACHE_BYTES * (len(specs) + len(ranked)) + SLOTS_ROUNDED_BYTES * rounded
    return SLOTS_BYTES * (2 if ranked else 1) + caches


def write(model: Model, profile: Profile, folder: Path, graph: bytes | None = None) -> Lowered:
    """See Target. Raises: UsageError, UnsupportedError naming the layer that TensorRT does not take."""
    require_tools(profile)
    return _write(model, profile, folder, graph, _builds(profile))


def write_baseline(model: Model, profile: Profile, folder: Path, graph: bytes | None = None) -> Lowered:
    """The same; without an engine where none runs here: the baseline is never deployed, so its graph is enough."""
    return _write(model, profile, folder, graph, timed_here(profile))


def _write(model: Model, profile: Profile, folder: Path, graph: bytes | None, builds: bool) -> Lowered:
    model = model.as_dense
    specs = model.structure.layers
    answers = {name: plan_layer(spec, profile) for name, spec in specs.items()}
    choices = accepted(answers, f"exported for profile {profile.id}")
    document = ir.from_proto(onnx.load_from_string(graph or capture(model, profile)))
    _lower(document, model, choices, _runtime(profile))
    folder.mkdir(parents=True, exist_ok=True)
    ir.save(document, folder / files.GRAPH, external_data=files.DATA)
    files.write(model, folder, shared=False)
    (folder / providers.GENAI).unlink(missing_ok=True)  # whose runtime does not read this cache
    made = _build(model, profile, folder, builds, sparsity.layers(model, choices, profile))
    made.write(folder)
    return Lowered.of(folder, choices, specs, experts.bounds(choices, specs), made.engine_bytes or made.graph_bytes)


def _lower(document: ir.Model, model: Model, choices: Mapping[str, rules.EngineChoice], runtime: Runtime) -> None:
    sources = by_user(sources_of(model, choices))
    if model.kv:
        lowering = slots.Slots(model.kv, model.kv_tensors, KINDS.get(runtime.float_dtype, ir.DataType.FLOAT))
        lowering.open(document.graph)
        portable.lower(document, sources, model, lowering)
        lowering.close(document)
    else:
        portable.lower(document, sources, model)
    if runtime.float_dtype in KINDS:
        halve(document.graph, KINDS[runtime.float_dtype])
        halve_cache(document.graph, KINDS[runtime.float_dtype])
    document.opset_imports.pop(DOMAIN, None)
    seal(document, runtime)


def seal(document: ir.Model, runtime: Runtime) -> None:
    """Opset and IR version of what the graph holds, whose nodes mean the same in both opsets; inputs left out at the
    end of a node are not named, since the parser takes a convolution without bias only so."""
    for node in document.graph:
        given = [place for place, value in enumerate(node.inputs) if value is not None]
        node.resize_inputs(max(given, default=-1) + 1)
    four = any(value.dtype is ir.DataType.FLOAT4E2M1 for value in document.graph.initializers.values())
    document.ir_version = FP4_IR if four else runtime.ir_version
    document.opset_imports[""] = FP4_OPSET if four else runtime.opset
    if any(node.domain == PARSER for node in document.graph):
        document.opset_imports[PARSER] = 1
    document.producer_name, document.producer_version = "compress", None


def _build(model: Model, profile: Profile, folder: Path, builds: bool, sparse: tuple[str, ...]) -> record.Record:
    """The engine beside the graph, or the command that makes it. sparse: layers that are 2:4."""
    assert profile.gpu is not None
    sm, ranges = profile.gpu.sm, shapes.ranges(model, profile)
    sizes = [(folder / name).stat().st_size for name in (files.GRAPH, files.DATA) if (folder / name).is_file()]
    made = record.Record(
        level="checked",
        builder="TensorRT",
        sm=sm,
        profile=profile.id,
        compute=_runtime(profile).float_dtype,
        engine="",
        onnx_sha256=record.digests(folder, (files.GRAPH, files.DATA)),
        ranges=shapes.as_json(ranges),
        engine_bytes=0,
        graph_bytes=sum(sizes),
        module="tensorrt",
        settings=builder.PLANNED,
        sparse=sparse,
    )
    flavour = building.flavour_for(profile) if builds else None
    if flavour is not None:
        return building.make(made, flavour, folder, folder)
    (folder / COMMAND).write_text(
        shapes.build_command(ranges, files.GRAPH, "engine", sparse=bool(sparse)), encoding="utf8"
    )
    return made


def complete(folder: Path, timing: Path | None = None) -> bool:
    """See Target: the engine that a folder lacks, where this machine is the one that it is built on."""
    return building.complete(folder, timing)


def deployed_bytes(folder: Path) -> int:
    """See Target: of the engine alone, or the graph where there is none."""
    kept = record.read(folder)
    return kept.engine_bytes or kept.graph_bytes


def session(folder: Path, threads: int, exact: bool = False) -> Session | EngineSession:
    """See Target: the engine where it runs here. Otherwise, and for `exact`, its graph in ONNX Runtime, whose kernels
    round nothing by themselves."""
    kept = record.read(folder)
    if not exact and not engine.misfit(kept):
        return EngineSession(folder, kept, partial(Session, folder, kept, threads, whole=True))
    return Session(folder, kept, threads, whole=exact)


def compare_graphs(
    session: AnySession, exact: AnySession, ids: NDArray[np.int64], limit: float, room: int
) -> tuple[bool, tuple[str, ...]]:
    """See Target: of slots, whose logits of whole rows are those of the graph on the CPU; nothing where there are
    none."""
    assert isinstance(session, Session | EngineSession)
    return slotted.agree(session, exact, ids, limit) if session.slots is not None else (True, ())


def timed_here(profile: Profile) -> bool:
    """See Target: whether this machine has the profile's chip and what runs its engines."""
    flavour = building.flavour_for(profile)
    return flavour is not None and profile.gpu is not None and not flavours.lacking(flavour, profile.gpu.sm)


def misfit(folder: Path) -> str:
    """See Target."""
    return building.misfit(record.read(folder))


def runner(session: Session | EngineSession, folder: Path) -> Runner:
    """Batches through an engine, or its graph."""
    return Runner(session, folder)


def probe_command(folder: Path, threads: int, prompt: int, tokens: int) -> list[str]:
    """Runs `runtime.probe` in a process of its own. Raises: UnsupportedError where the engine does not run here, since
    load time and memory are the engine's own."""
    kept = record.read(folder)
    if engine.misfit(kept):
        raise not_timed(kept.runtime)
    return probing.command("compress.export.tensorrt.engine", folder, threads, prompt, tokens)
