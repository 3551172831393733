"""The `openvino` target: capture, lower in standard operators, read into OpenVINO, put the weights in, write.

See compress.target.Target.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir

from compress.export.onnx import experts, files, providers, transforms
from compress.export.onnx import target as portable
from compress.export.onnx.capture import capture_graph
from compress.export.onnx.interfaces import DOMAIN
from compress.export.onnx.lowering import Choice, Source, by_user, sources_of
from compress.export.openvino import lowering, rules, runtime
from compress.export.openvino.profiler import profile_operators
from compress.export.openvino.runner import Runner
from compress.export.openvino.runtime import GRAPH, Session
from compress.export.openvino.weights import put_in
from compress.hwprofiles import Profile, Runtime
from compress.layer import LayerSpec
from compress.models.model import Model
from compress.runtime import probing
from compress.target import Lowered, Refusal, accepted, as_dense, granted

RUNTIME = rules.RUNTIME
FOLDER = "openvino"
HONOURS = lowering.LOWERS.honours
TAKES_EDITS = True

# the interface of compress.target
__all__ = ["FOLDER", "HONOURS", "RUNTIME", "capture", "plan_layer", "predict_bytes", "probe_command", "require_tools"]
__all__ += ["profile_operators", "runner", "session", "write"]

# Fitted on models of 1 to 8 blocks: bytes of openvino_model.xml, of the whole and per layer.
GRAPH_BYTES = 60_000
GRAPH_LAYER_BYTES = 9_000


def require_tools(profile: Profile) -> None:
    """Raises: UnsupportedError where openvino is missing; UsageError for a profile that does not name it."""
    _runtime(profile)
    runtime.load_openvino()


def _runtime(profile: Profile) -> Runtime:
    return granted(rules.runtime_of(profile), "openvino", profile)


def plan_layer(spec: LayerSpec, profile: Profile) -> Choice | Refusal:
    """See Target."""
    return as_dense(spec, rules.choose(spec.as_dense, profile))


def capture(model: Model, profile: Profile) -> bytes:
    """See Target. Raises: UnsupportedError where the model cannot be traced."""
    return capture_graph(model, _runtime(profile).opset)


def predict_bytes(specs: Iterable[LayerSpec], model: Model, profile: Profile) -> int:
    """See Target."""
    specs = [spec.as_dense for spec in specs]
    choices = [choice for spec in specs if not isinstance(choice := plan_layer(spec, profile), Refusal)]
    weights = sum(choice.stored_bytes for choice in choices) + model.plain_bytes + transforms.stored_bytes(specs)
    return weights + model.side_bytes + GRAPH_BYTES + len(choices) * GRAPH_LAYER_BYTES


def write(model: Model, profile: Profile, folder: Path, graph: bytes | None = None) -> Lowered:
    """See Target. Raises: UsageError, UnsupportedError naming the layer that OpenVINO does not take."""
    require_tools(profile)
    model = model.as_dense
    specs = model.structure.layers
    answers = {name: plan_layer(spec, profile) for name, spec in specs.items()}
    choices = accepted(answers, f"exported for profile {profile.id}")
    sources = sources_of(model, choices)
    document = ir.from_proto(onnx.load_from_string(graph or capture(model, profile)))
    portable.lower(document, by_user(sources), model)
    document.ir_version = _runtime(profile).ir_version
    document.opset_imports.pop(DOMAIN, None)
    folder.mkdir(parents=True, exist_ok=True)
    _save(document, sources, folder)
    files.write(model, folder, shared=False)
    (folder / providers.GENAI).unlink(missing_ok=True)  # whose runtime does not read these files
    return Lowered.of(folder, choices, specs, experts.bounds(choices, specs))


def _save(document: ir.Model, sources: Mapping[str, Source], folder: Path) -> None:
    """The lowered graph as OpenVINO's two files."""
    ov = runtime.load_openvino()
    with tempfile.TemporaryDirectory(prefix="compress-", dir=folder.parent) as scratch:
        ir.save(document, Path(scratch) / files.GRAPH, external_data=files.DATA)
        model = ov.Core().read_model(str(Path(scratch) / files.GRAPH))
        kept = put_in(model, sources, Path(scratch))
        model.validate_nodes_and_infer_types()
        _name(model)
        ov.save_model(model, str(folder / GRAPH), compress_to_fp16=False)
        del model, kept  # the model first: its constants lie there


def _name(model: Any) -> None:
    """Names by place: OpenVINO's own count on through the process, so that no two files would be the same."""
    for place, node in enumerate(model.get_ordered_ops()):
        if node.get_type_name() not in ("Parameter", "Result"):
            node.set_friendly_name(f"{node.get_type_name()}_{place}")


def session(folder: Path, threads: int, exact: bool = False) -> Session:
    """See Target."""
    return Session(folder, threads, exact=exact)


def runner(session: Session, folder: Path) -> Runner:
    """Batches through a session."""
    return Runner(session, folder)


def probe_command(folder: Path, threads: int, prompt: int, tokens: int) -> list[str]:
    """Runs `runtime.probe` in a process of its own."""
    return probing.command("compress.export.openvino.runtime", folder, threads, prompt, tokens)
