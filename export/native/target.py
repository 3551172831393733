"""The `native` target: weights as they are stored in codebooks, run by this package's own kernels, or without zeros.

See compress.target.Target. Nothing is captured: what runs is transformers' module of the model.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from compress.errors import UnsupportedError
from compress.export.checkpoint.writer import SHARD_BYTES, ShardWriter, header_bytes
from compress.export.native import contents, rules
from compress.export.native.modules import why_not
from compress.export.native.rules import Choice
from compress.export.native.runtime import Session
from compress.formats.base import QuantTensor
from compress.formats.codebook import Codebook
from compress.hwprofiles import Profile
from compress.kv.spec import KvSpec
from compress.layer import Layer, LayerSpec
from compress.models import cache_tensors
from compress.models.model import Model
from compress.records import Bounds
from compress.runtime import probing
from compress.runtime.torch_runner import TorchRunner
from compress.runtime.torch_session import Ids
from compress.target import Lowered, Refusal, accepted, granted

RUNTIME = rules.RUNTIME
FOLDER = "native"
HONOURS = rules.HONOURS
TAKES_EDITS = True
CONFIG = "config.json"
STEPS = 32
"""Tokens that are read one by one to compare."""


def require_tools(profile: Profile) -> None:
    """Raises: UsageError for a profile that does not name the runtime."""
    granted(rules.runtime_of(profile), "native", profile)


def takes_caches(specs: Sequence[KvSpec], profile: Profile) -> None:
    """Sessions cache keys and values as any `KvSpec` says."""


def plan_layer(spec: LayerSpec, profile: Profile) -> Choice | Refusal:
    """See Target."""
    return rules.choose(spec, profile)


def predict_bytes(specs: Iterable[LayerSpec], model: Model, profile: Profile) -> int:
    """See Target. Raises: UnsupportedError as `write`."""
    layers = {spec.name: spec for spec in specs}
    _require_replaceable(model, layers)
    choices = [choice for spec in layers.values() if isinstance(choice := plan_layer(spec, profile), Choice)]
    entries: dict[str, tuple[tuple[int, ...], int]] = {}
    for spec in layers.values():
        entries |= _entries(spec)
    entries |= {name: (shape, prod(shape) * dtype.itemsize) for name, (shape, dtype) in model.plain_shapes.items()}
    texts = _config(model, layers), contents.to_text(contents.of_specs(layers, {}, model))
    beside = sum(map(len, texts)) + model.side_bytes + header_bytes(entries)
    beside += cache_tensors.predict_bytes(model)
    return sum(choice.stored_bytes for choice in choices) + model.plain_bytes + beside


def capture(model: Model, profile: Profile) -> bytes:
    """See Target."""
    return b""


def write(model: Model, profile: Profile, folder: Path, graph: bytes | None = None) -> Lowered:
    """See Target. Raises: UsageError, UnsupportedError naming a layer that is not taken."""
    specs = model.structure.layers
    choices = accepted({name: plan_layer(spec, profile) for name, spec in specs.items()}, "run by the native target")
    _require_replaceable(model, specs)
    folder.mkdir(parents=True, exist_ok=True)
    writer, owners, aliases = ShardWriter(folder, SHARD_BYTES), dict[str, str](), dict[str, str]()
    for segment in model.structure.segments:
        for spec in model.structure.segment_layers(segment):
            layer = model.layer(spec)
            found = _held_in_common(layer, owners)
            aliases |= found
            writer.add({name: tensor for name, tensor in _tensors(layer).items() if name not in found})
        writer.add(model.plain(segment))
    writer.finish()
    (folder / CONFIG).write_text(_config(model, specs), encoding="utf8")
    text = contents.to_text(contents.of_specs(specs, aliases, model))
    (folder / contents.NAME).write_text(text, encoding="utf8")
    cache_tensors.write_tensors(folder, model.kv_tensors)
    for path in model.side_files():
        shutil.copyfile(path, folder / path.name)
    return Lowered.of(folder, choices, specs, Bounds.loosest(choice.bounds for choice in choices.values()))


def session(folder: Path, threads: int, exact: bool = False) -> Session:
    """See Target; exact: weights decoded to float32 and multiplied by torch."""
    return Session(folder, threads, exact=exact)


def runner(session: Session, folder: Path) -> TorchRunner:
    """Batches through a session."""
    return TorchRunner(session, folder)


def probe_command(folder: Path, threads: int, prompt: int, tokens: int) -> list[str]:
    """Runs `runtime.probe` in a process of its own."""
    return probing.command("compress.export.native.runtime", folder, threads, prompt, tokens)


def compare_graphs(session: Session, exact: Session, ids: Ids, limit: float, room: int) -> tuple[bool, tuple[str, ...]]:
    """See Target. What is generated, a token at a time through the cache, beside the exact products of the whole
    sequence. limit: of exact kernels; ours has the bound of `rules`."""
    chosen = _told_choice(session, ids[:1, :room])
    if not session.kernels:
        return True, chosen
    row = ids[:1, : min(STEPS, room)]
    found, expected = session.one_by_one(row), exact.logits(row)
    apart = float(np.abs(found - expected).max() / np.abs(expected).max())
    bound = max(limit, rules.ROUNDED_TABLES.shipped)
    told = f"token by token, as generating runs it: largest relative difference {apart:.2g} on {row.size} positions"
    return apart <= bound, (f"{told} (bound {bound:g}), KL divergence {_divergence(expected, found):.2g} nats", *chosen)


def _told_choice(session: Session, ids: Ids) -> tuple[str, ...]:
    """How much a cache that chooses tokens finds of what attention would read. ids (1, length)."""
    if not any(spec.selects for spec in session.caches):
        return ()
    found = session.recall(ids)
    if not found.heads:
        return (f"The cache chooses tokens, but of the {ids.size} that were read to compare, it leaves none out.",)
    return (f"The cache chooses tokens: {found.told()} (mean over {found.heads} choices of heads, {ids.size} tokens).",)


def _divergence(expected: NDArray[np.float32], found: NDArray[np.float32]) -> float:
    """Mean over positions, in nats."""
    first, second = (torch.from_numpy(each).double().log_softmax(-1) for each in (expected, found))
    return float((first.exp() * (first - second)).sum(-1).mean())


def _require_replaceable(model: Model, specs: Mapping[str, LayerSpec]) -> None:
    """Raises: UnsupportedError for what is no model of transformers, or a quantized layer whose module cannot be
    replaced."""
    if not model.raw_config:
        raise UnsupportedError(f"{model.source} is no model of transformers, which this target runs. Export for onnx.")
    module = model.skeleton()
    for spec in specs.values():
        for user in spec.users if isinstance(spec.format, Codebook) else ():
            if reason := why_not(module.get_submodule(user)):
                raise UnsupportedError(f"Layer {user} cannot be a codebook: {reason}. Leave it in float.")


def _held_in_common(layer: Layer, owners: dict[str, str]) -> dict[str, str]:
    """Name of a tensor that its format shares with other layers → the first name with these values. owners: digest →
    that name; those of this layer are added."""
    weight, found = layer.weight, dict[str, str]()
    if not isinstance(weight, QuantTensor):
        return found
    for part in (part for part, count in weight.format.holders.items() if count > 1):
        name, tensor = f"{layer.name}.weight.{part}", weight.tensors[part].contiguous()
        digest = f"{tuple(tensor.shape)} {tensor.dtype} {hashlib.sha256(tensor.numpy().tobytes()).hexdigest()}"
        owner = owners.setdefault(digest, name)
        found |= {name: owner} if owner != name else {}
    return found


def _tensors(layer: Layer) -> dict[str, Tensor]:
    """A layer's tensors by the names of the files."""
    name, weight = f"{layer.name}.weight", layer.weight
    bias = {f"{layer.name}.bias": layer.bias} if layer.bias is not None else {}
    if isinstance(weight, QuantTensor):
        return {f"{name}.{part}": tensor for part, tensor in weight.tensors.items()} | bias
    return {name: weight, **bias}


def _entries(spec: LayerSpec) -> dict[str, tuple[tuple[int, ...], int]]:
    """The tensors of a layer by name: shape and bytes."""
    name = f"{spec.name}.weight"
    found: dict[str, tuple[tuple[int, ...], int]] = {}
    if spec.format is None:
        found[name] = (spec.shape, spec.source_bytes)
    for part, (shape, dtype) in (spec.format.tensor_specs(spec.shape) if spec.format else {}).items():
        found[f"{name}.{part}"] = (shape, prod(shape) * dtype.itemsize)
    return found | ({f"{spec.name}.bias": ((spec.shape[0],), spec.bias_bytes)} if spec.has_bias else {})


def _config(model: Model, specs: Mapping[str, LayerSpec]) -> str:
    """The source's config.json; where a head was parted from its embedding, it says so."""
    config: dict[str, Any] = {**model.raw_config}
    if model.structure.head is not None and not any(len(spec.users) > 1 for spec in specs.values()):
        config["tie_word_embeddings"] = False
    return json.dumps(config, indent=2, sort_keys=True) + "\n"
