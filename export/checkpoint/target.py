"""The `checkpoint` targets: one class, one object per layout. See compress.target.Target."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from compress.errors import UnsupportedError
from compress.export.checkpoint import kv_scheme, transform_config
from compress.export.checkpoint.aqlm import Aqlm
from compress.export.checkpoint.awq import Awq
from compress.export.checkpoint.bitsandbytes import BitsAndBytes
from compress.export.checkpoint.compressed_tensors import CompressedTensors
from compress.export.checkpoint.exl3 import Exl3
from compress.export.checkpoint.gptq import Gptq
from compress.export.checkpoint.layout import Choice, Layout, Packed, plain_choice, rows_of
from compress.export.checkpoint.names import FileNames, Place, require_expert_names
from compress.export.checkpoint.runtime import Session
from compress.export.checkpoint.vptq import Vptq
from compress.export.checkpoint.writer import SHARD_BYTES, ShardWriter, header_bytes
from compress.honours import Honours
from compress.hwprofiles import Profile
from compress.kv.spec import KvSpec
from compress.layer import Layer, LayerKind, LayerSpec
from compress.models.model import Model, Task
from compress.records import Bounds
from compress.runtime import probing
from compress.runtime.torch_runner import TorchRunner
from compress.target import DENSE, Lowered, Refusal, accepted, as_dense, plan_layers

CONFIG = "config.json"
Names = dict[str, tuple[Place, ...]]
ALL = frozenset(LayerKind)
NO_READER = {
    "compressed-tensors": (
        "; the readers of its sparse-bitmask and sparse-24-bitmask are gone from compressed-tensors (0.20), by which "
        "transformers reads them"
    )
}
"""By layout: why there is no form for sparse weights, where its name promises one."""


class CheckpointTarget:
    """Writes a model as a folder of transformers with the weights of one layout. Nothing is captured."""

    RUNTIME = "transformers"
    FOLDER = "checkpoint"
    HONOURS = Honours(ALL, act=ALL - {LayerKind.CONV}, pre=frozenset({LayerKind.LINEAR}), bias=ALL)

    def __init__(self, layout: Layout) -> None:
        self.layout = layout

    def plan_layer(self, spec: LayerSpec, profile: Profile) -> Choice | Refusal:
        """See Target. The profile does not matter: the folder is for other tools, on whatever machine."""
        spec, given = spec.as_dense, spec
        answer = transform_config.refuse(spec, self.layout.name, self.layout.transforms) or self._choose(spec)
        answer = as_dense(given, answer, DENSE + NO_READER.get(self.layout.name, ""))
        if not spec.pre or isinstance(answer, Refusal):
            return answer
        return replace(answer, note="; ".join(filter(None, (answer.note, transform_config.NOTE))))

    def _choose(self, spec: LayerSpec) -> Choice | Refusal:
        if spec.format is not None:
            return self.layout.choose(spec)
        if spec.act is not None:
            return Refusal(f"inputs in {spec.act} of a float weight: {self.layout.name} rounds both or none")
        return plain_choice(spec)

    def plan_together(self, specs: Mapping[str, LayerSpec]) -> dict[str, Refusal]:
        """See Target."""
        specs = {name: spec.as_dense for name, spec in specs.items()}
        return transform_config.refuse_alone(specs) | self.layout.together(specs)

    def takes_caches(self, specs: Sequence[KvSpec], profile: Profile) -> Refusal | None:
        """See Target."""
        return kv_scheme.refusal(specs, self.layout.name)

    def predict_bytes(self, specs: Iterable[LayerSpec], model: Model, profile: Profile) -> int:
        """See Target; a sum over the tensors that will be written, and the files' headers."""
        _require_transformers(model)
        layers = {spec.name: spec.as_dense for spec in specs}
        choices = {name: self.plan_layer(spec, profile) for name, spec in layers.items()}
        names, places = FileNames(model), dict[str, tuple[Place, ...]]()
        _require_biases(layers, names)
        if any(spec.format is not None for spec in layers.values()):
            places = {name: names.places(spec) for name, spec in layers.items()}
            require_expert_names(layers, places, self.layout.name, self.layout.expert_reader)
        entries: dict[str, tuple[tuple[int, ...], int]] = {}
        for name, choice in choices.items():
            if isinstance(choice, Choice):
                entries |= _entries(layers[name], choice, places.get(name, ()))
        entries |= kv_scheme.entries(model, names)
        plain = model.plain_shapes | transform_config.tensor_specs(_transformed(layers, names))
        entries |= {name: (shape, prod(shape) * dtype.itemsize) for name, (shape, dtype) in plain.items()}
        storable = _storable(choices, places, layers)
        texts = self._configs(self._config(model, layers, names)) if storable else {}
        config = sum(map(len, texts.values()))
        return sum(size for _, size in entries.values()) + header_bytes(entries) + model.side_bytes + config

    def capture(self, model: Model, profile: Profile) -> bytes:
        """See Target."""
        return b""

    def write(self, model: Model, profile: Profile, folder: Path, graph: bytes | None = None) -> Lowered:
        """See Target."""
        _require_transformers(model)
        model = model.as_dense
        specs = model.structure.layers
        answers = plan_layers(self, specs, profile)
        choices = cast("dict[str, Choice]", accepted(answers, f"stored as {self.layout.name}"))
        names = FileNames(model)
        _require_biases(specs, names)
        packed = self._places(specs, names)
        require_expert_names(specs, packed, self.layout.name, self.layout.expert_reader)
        folder.mkdir(parents=True, exist_ok=True)
        writer = ShardWriter(folder, SHARD_BYTES)
        for segment in model.structure.segments:
            for tensors in self._segment(model, segment, names, packed):
                writer.add(tensors)
        writer.add(transform_config.tensors(_transformed(specs, names)))
        writer.add(kv_scheme.tensors(model, names))
        writer.finish()
        for name, text in self._configs(self._config(model, specs, names)).items():
            (folder / name).write_text(text, encoding="utf8")
        for path in model.side_files():
            shutil.copyfile(path, folder / path.name)
        return Lowered.of(folder, choices, specs, Bounds.loosest(choice.bounds for choice in choices.values()))

    def session(self, folder: Path, threads: int, exact: bool = False) -> Session:
        """See Target; exact: inputs rounded by our own grids, weights decoded in float32."""
        return Session(folder, threads, exact=exact)

    def runner(self, session: Session, folder: Path) -> TorchRunner:
        """See Target."""
        return TorchRunner(session, folder)

    def probe_command(self, folder: Path, threads: int, prompt: int, tokens: int) -> list[str]:
        """Runs `runtime.probe` in a process of its own."""
        return probing.command("compress.export.checkpoint.runtime", folder, threads, prompt, tokens)

    def _places(self, specs: Mapping[str, LayerSpec], names: FileNames) -> Names:
        """Quantized layer → its modules in the files. Raises: UnsupportedError where it has none."""
        found: Names = {}
        for name, spec in specs.items():
            if spec.format is None:
                continue
            found[name] = names.places(spec)
            if not found[name]:
                raise UnsupportedError(
                    f"Layer {name} has no module of its own in this model's files, so {self.layout.name} cannot store "
                    "it. Leave it in float, or export for onnx."
                )
        return found

    def _segment(self, model: Model, segment: int, names: FileNames, packed: Names) -> Iterator[dict[str, Tensor]]:
        """The tensors of a segment by their file names, some at a time."""
        floats = dict(model.plain(segment))
        for spec in model.structure.segment_layers(segment):
            if spec.name in packed:
                yield self._pack(model.layer(spec), packed[spec.name], names)
            elif spec.kind is not LayerKind.EXPERT:
                floats |= _float_tensors(model.layer(spec), spec)
        yield names.revert(floats)
        for stack, specs in _float_stacks(model, segment, packed).items():
            yield names.revert({stack: torch.stack([_as_stored(model.layer(spec), spec) for spec in specs])})

    def _pack(self, layer: Layer, places: tuple[Place, ...], names: FileNames) -> dict[str, Tensor]:
        """All tensors of a layer; of a tied one, for each of its users."""
        found: dict[str, Tensor] = {}
        for place in places:
            part = rows_of(layer, place.start, place.stop)
            tensors = self.layout.tensors(part) | ({"bias": part.bias} if part.bias is not None else {})
            modules = [place.module, *(names.module_name(user) for user in layer.users[1:])]
            for number, module in enumerate(modules):
                copied = {key: tensor.clone() if number else tensor for key, tensor in tensors.items()}
                found |= {f"{module}.{key}": tensor for key, tensor in copied.items()}
        return found

    def _configs(self, config: dict[str, Any]) -> dict[str, str]:
        """The files that hold a config, by name."""
        found, own = {CONFIG: _text(config)}, config.get("quantization_config")
        return found | ({self.layout.config_file: _text(own)} if self.layout.config_file and own else {})

    def _config(self, model: Model, specs: Mapping[str, LayerSpec], names: FileNames) -> dict[str, Any]:
        """The source's config.json with what changed."""
        config = {key: value for key, value in model.raw_config.items() if key != "quantization_config"}
        # of an encoder the base alone was read, and is written
        config["architectures"] = [type(names.module).__name__]
        quantized = [spec for spec in specs.values() if spec.format is not None]
        if model.structure.head is not None and not any(_is_tied(spec) for spec in specs.values()):
            config["tie_word_embeddings"] = False
        if not (quantized or model.kv):
            return config
        packed = [Packed(place.module, spec) for spec in quantized for place in names.places(spec)]
        packed += [Packed(names.module_name(user), spec) for spec in quantized for user in spec.users[1:]]
        config["quantization_config"] = self.layout.config(packed, _plain_modules(model, specs, names))
        if model.kv:
            config["quantization_config"]["kv_cache_scheme"] = kv_scheme.config(model.kv)
        if moved := _transformed(specs, names):
            config["quantization_config"]["transform_config"] = transform_config.config(moved)
        return config


def _require_transformers(model: Model) -> None:
    if not model.raw_config:
        raise UnsupportedError(f"{model.source} is no model of transformers, whose folders this is. Export for onnx.")


def _require_biases(specs: Mapping[str, LayerSpec], names: FileNames) -> None:
    """Raises: UnsupportedError for a bias that a pass gave a layer without one: readers would pass it over."""
    for name, spec in specs.items():
        if spec.has_bias and getattr(names.module.get_submodule(name), "bias", None) is None:
            raise UnsupportedError(
                f"Layer {name} got a bias from a pass, but this architecture has none there, and readers of a "
                "checkpoint would leave it out. Drop the pass that corrects biases, or export for onnx."
            )


def _transformed(specs: Mapping[str, LayerSpec], names: FileNames) -> list[Packed]:
    """The file modules whose inputs go through a transform."""
    return [Packed(names.module_name(user), spec) for spec in specs.values() if spec.pre for user in spec.users]


def _is_tied(spec: LayerSpec) -> bool:
    """A weight of several users that is stored once; packed, it is stored for each."""
    return len(spec.users) > 1 and spec.format is None


def _storable(choices: Mapping[str, Choice | Refusal], places: Names, specs: Mapping[str, LayerSpec]) -> bool:
    homeless = any(spec.format is not None and not places.get(name) for name, spec in specs.items())
    return not homeless and not any(isinstance(choice, Refusal) for choice in choices.values())


def _plain_modules(model: Model, specs: Mapping[str, LayerSpec], names: FileNames) -> list[str]:
    """Modules with a weight matrix that stays in float, by file name and by name in memory."""
    users = [user for spec in specs.values() if spec.format is None for user in spec.users]
    users = [user for user in users if specs.get(user) is None or specs[user].kind is not LayerKind.EMBEDDING]
    routers = [
        name.removesuffix(".weight")
        for segment, group in model.structure.plain.items()
        for name in group
        if segment >= 0 and name.endswith(".weight") and len(model.plain_shapes[name][0]) == 2
    ]
    found = {name for user in (*users, *routers) for name in (user, names.module_name(user))}
    if model.task is Task.ENCODER and not any("pooler" in name for name in specs):
        found.add("pooler.dense")  # the base that reads the files may have one, which then starts in float
    experts = {spec.name for spec in specs.values() if spec.kind is LayerKind.EXPERT and spec.format is None}
    for name in experts:
        found.discard(name)
        found |= {place.module for place in names.places(specs[name])}
    return sorted(found)


def _float_tensors(layer: Layer, spec: LayerSpec) -> dict[str, Tensor]:
    found = {f"{spec.name}.weight": _as_stored(layer, spec)}
    return found | ({f"{spec.name}.bias": layer.bias} if layer.bias is not None else {})


def _as_stored(layer: Layer, spec: LayerSpec) -> Tensor:
    assert isinstance(layer.weight, Tensor)
    return layer.weight.T.contiguous() if spec.turned else layer.weight


def _float_stacks(model: Model, segment: int, packed: Names) -> dict[str, list[LayerSpec]]:
    """The float experts of each 3-D parameter, in order."""
    found: dict[str, list[LayerSpec]] = {}
    for spec in model.structure.segment_layers(segment):
        if spec.kind is LayerKind.EXPERT and spec.name not in packed:
            found.setdefault(spec.name.rpartition(".")[0], []).append(spec)
    return {stack: sorted(specs, key=lambda spec: int(spec.name.rpartition(".")[2])) for stack, specs in found.items()}


def _entries(spec: LayerSpec, choice: Choice, places: tuple[Place, ...]) -> dict[str, tuple[tuple[int, ...], int]]:
    """The tensors of a layer by name, those of an expert split over its modules."""
    modules = [place.module for place in places] or [spec.name]
    found = {}
    for key, (shape, dtype) in choice.tensors.items():
        size = prod(shape) * dtype.itemsize
        for module in modules:
            found[f"{module}.{key}"] = (shape, size // len(modules))
        for user in spec.users[1 : choice.copies]:
            found[f"{user}.{key}"] = (shape, size)
    if spec.has_bias:
        found[f"{modules[0]}.bias"] = ((spec.shape[0],), spec.bias_bytes)
    return found


def _text(config: Mapping[str, Any]) -> str:
    return json.dumps(config, indent=2, sort_keys=True) + "\n"


COMPRESSED_TENSORS = CheckpointTarget(CompressedTensors())
GPTQ = CheckpointTarget(Gptq())
AWQ = CheckpointTarget(Awq())
BITSANDBYTES = CheckpointTarget(BitsAndBytes())
AQLM = CheckpointTarget(Aqlm())
VPTQ = CheckpointTarget(Vptq())
EXL3 = CheckpointTarget(Exl3())
