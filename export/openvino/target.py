"""The `openvino` target: capture, lower in standard operators, read into OpenVINO, put the weights in, write.

See compress.target.Target.
"""

from __future__ import annotations

import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir

from compress.errors import UnsupportedError, UsageError
from compress.export.onnx import experts, files, transforms
from compress.export.onnx import target as portable
from compress.export.onnx.capture import capture_graph
from compress.export.onnx.interfaces import DOMAIN
from compress.export.onnx.lowering import Choice, Source
from compress.export.openvino import rules, runtime
from compress.export.openvino.profiler import profile_operators
from compress.export.openvino.runner import Runner
from compress.export.openvino.runtime import GRAPH, Session
from compress.export.openvino.weights import put_in
from compress.hwprofiles import Profile, Runtime
from compress.layer import LayerSpec
from compress.models.model import Model
from compress.target import Lowered, Refusal, granted

RUNTIME = rules.RUNTIME
FOLDER = "openvino"
GENAI = "genai_config.json"  # of onnxruntime-genai, which does not read these files

# the interface of compress.target
__all__ = ["FOLDER", "RUNTIME", "capture", "plan_layer", "predict_bytes", "probe_command", "require_tools", "runner"]
__all__ += ["profile_operators", "session", "write"]

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
    return rules.choose(spec, profile)


def capture(model: Model, profile: Profile) -> bytes:
    """See Target. Raises: UnsupportedError where the model cannot be traced."""
    return capture_graph(model, _runtime(profile).opset)


def predict_bytes(specs: Iterable[LayerSpec], model: Model, profile: Profile) -> int:
    """See Target."""
    specs = list(specs)
    choices = [choice for spec in specs if not isinstance(choice := plan_layer(spec, profile), Refusal)]
    weights = sum(choice.stored_bytes for choice in choices) + model.plain_bytes + transforms.stored_bytes(specs)
    side = sum(path.stat().st_size for path in model.side_files())
    return weights + side + GRAPH_BYTES + len(choices) * GRAPH_LAYER_BYTES


def write(model: Model, profile: Profile, folder: Path, graph: bytes | None = None) -> Lowered:
    """See Target. Raises: UsageError, UnsupportedError naming the layer that OpenVINO does not take."""
    require_tools(profile)
    specs = model.structure.layers
    choices = _require(specs, profile)
    sources = {name: Source(spec, choices[name], _reader(model, spec)) for name, spec in specs.items()}
    document = ir.from_proto(onnx.load_from_string(graph or capture(model, profile)))
    portable.lower(document, {user: one for one in sources.values() for user in one.spec.users}, model)
    document.ir_version = _runtime(profile).ir_version
    document.opset_imports.pop(DOMAIN, None)
    folder.mkdir(parents=True, exist_ok=True)
    _save(document, sources, folder)
    files.write(model, folder, shared=False)
    (folder / GENAI).unlink(missing_ok=True)
    operators = Counter(choice.operator for choice in choices.values())
    plain = tuple(name for name, spec in specs.items() if spec.format is None)
    return Lowered(folder, dict(sorted(operators.items())), plain, experts.bounds(choices, specs))


def _reader(model: Model, spec: LayerSpec) -> Any:
    return lambda: model.layer(spec)


def _require(specs: Mapping[str, LayerSpec], profile: Profile) -> dict[str, Choice]:
    choices: dict[str, Choice] = {}
    for name, spec in specs.items():
        answer = plan_layer(spec, profile)
        if isinstance(answer, Refusal):
            kind = UsageError if answer.usage else UnsupportedError
            raise kind(f"Layer {name} cannot be exported for profile {profile.id}: {answer.reason}.")
        choices[name] = answer
    return choices


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
    command = [sys.executable, "-m", "compress.export.openvino.runtime", str(folder)]
    return [*command, "--threads", str(threads), "--prompt", str(prompt), "--tokens", str(tokens)]
