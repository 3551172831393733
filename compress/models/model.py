"""`Model`: what is known of a model before its weights are read, and how its weights are read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compress.errors import InputError, UsageError
from compress.kv.spec import KvSpec
from compress.layer import Layer, LayerSpec
from compress.models import experts, skeleton
from compress.models.attention import Attention, attentions
from compress.models.cache_tensors import read_tensors
from compress.models.edits import Edit, EditKind, apply_edits
from compress.models.folder import SIDE_FILES, load_tokenizer, positions
from compress.models.image_source import ImageSource
from compress.models.reader import DenseReader, Reader
from compress.models.skeleton import Structure


class Task(StrEnum):
    """What a model does; it decides inputs, outputs and metrics."""

    CAUSAL_LM = "causal-lm"
    ENCODER = "encoder"
    IMAGE = "image-classifier"
    OUTPUTS = "image-outputs"  # of any kind, such as a detector's boxes
    CLASSIFIER = "classifier"  # of samples that are no images: texts, or arrays by name
    ARRAYS = "array-outputs"  # of such samples too, outputs of any kind

    @property
    def has_classes(self) -> bool:
        """Whether samples are labelled, and judged by it."""
        return self in (Task.IMAGE, Task.CLASSIFIER)

    @property
    def takes_rows(self) -> bool:
        """Whether it takes samples of a row each, not tokens."""
        return self in (Task.IMAGE, Task.OUTPUTS, Task.CLASSIFIER, Task.ARRAYS)


@dataclass(frozen=True)
class Model:
    """A model before compression. Weights are read from its files when asked for.

    image: of a model that takes images or other samples of a row each: a module of the user's own code, or an ONNX
    graph. It has no config. edits: what of its shape its config does not say; origin: the source's block that each
    block is, empty where all are there; kv: how each layer's keys and values are cached, empty where as they are.
    """

    source: str
    path: Path
    task: Task
    config: Any
    structure: Structure
    weights: Reader | None
    digest: str
    raw_config: dict[str, Any] = field(default_factory=dict, repr=False)
    source_digest: str = ""
    warnings: tuple[str, ...] = ()
    image: ImageSource | None = None
    edits: tuple[Edit, ...] = ()
    origin: tuple[int, ...] = ()
    kv: tuple[KvSpec, ...] = ()

    def skeleton(self, attention: str | None = None, mixture: str = experts.EACH) -> nn.Module:
        """A fresh module tree with parameters on `meta`. Args: see `skeleton.build`; a user's own has neither."""
        if self.image is not None:
            module = self.image.skeleton()
        else:
            module = skeleton.build(self.config, maker(self.task, self.raw_config), attention, mixture)
        apply_edits(module, self.edits)
        return module

    @property
    def origins(self) -> tuple[int, ...]:
        """The source's block that each block is, by index."""
        return self.origin or tuple(range(len(self.structure.blocks)))

    @property
    def attentions(self) -> tuple[Attention, ...]:
        """Of the blocks that have one, in the order of the cache. Raises: UnsupportedError for a model without any."""
        found = attentions(self.config.get_text_config())
        return tuple(found[place] for place in self.blocks_without("no attention"))

    def blocks_without(self, kind: EditKind) -> list[int]:
        """The places of the blocks that no edit of a kind is in: of those that have a cache, say, in its order."""
        path = self.structure.blocks_path
        edited = {skeleton.segment_of(edit.path, path) for edit in self.edits if edit.kind == kind}
        return [place for place in range(len(self.structure.blocks)) if place not in edited]

    @cached_property
    def kv_tensors(self) -> tuple[dict[str, Tensor], ...]:
        """By layer, what its cache needs beside its spec. Raises: InputError where that is not stored."""
        return read_tensors(self.path, self.kv)

    @property
    def name(self) -> str:
        """The last part of the source."""
        return Path(self.source).name or self.source

    @property
    def vocabulary(self) -> int:
        """Token ids are below this; 0 where there are none."""
        if self.image is not None:
            return self.image.vocabulary
        return int(self.config.get_text_config().vocab_size)

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence that the model has positions for; 0 where it takes none."""
        if self.image is not None:
            return self.image.longest
        return positions(self.config.get_text_config())

    @property
    def source_bytes(self) -> int:
        """Bytes of the weight files as stored; from the shapes where there are no files."""
        if self.weights is not None:
            return self.weights.nbytes
        weights = sum(spec.source_bytes + spec.bias_bytes for spec in self.structure.layers.values())
        return weights + self.plain_bytes

    @cached_property
    def plain_shapes(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and stored dtype of every tensor that is no layer's."""
        state = self.skeleton().state_dict()
        default = config_dtype(self.config)
        names = [name for group in self.structure.plain.values() for name in group]
        return {
            name: (
                tuple(state[name].shape),
                self.weights.dtype(name) if self.weights else default,
            )
            for name in names
        }

    @property
    def plain_bytes(self) -> int:
        """Bytes of the tensors that are no layer's."""
        beside = 0 if self.image is None else self.image.kept_bytes
        return beside + sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in self.plain_shapes.values())

    def side_files(self) -> list[Path]:
        """Tokenizer and generation files beside the weights."""
        if self.image is not None:
            return [*self.image.side_files()]
        return [self.path / name for name in SIDE_FILES if (self.path / name).is_file()]

    @property
    def side_bytes(self) -> int:
        """Bytes of the side files."""
        return sum(path.stat().st_size for path in self.side_files())

    def tokenizer(self) -> Any:
        """The tokenizer, or None where the folder has none. Raises: InputError for a broken one."""
        return load_tokenizer(self.path)

    def layer(self, spec: LayerSpec) -> Layer:
        """One layer as stored."""
        return self.reader.layer(spec)

    def layers(self, segment: int) -> dict[str, Layer]:
        """All layers of a segment."""
        return {spec.name: self.layer(spec) for spec in self.structure.segment_layers(segment)}

    def plain(self, segment: int) -> dict[str, Tensor]:
        """The other stored tensors of a segment."""
        return self.reader.plain(self.structure.plain[segment])

    @property
    def as_dense(self) -> Model:
        """The same with plain weights where a format is a layout of plain numbers (`LayerSpec.as_dense`), for targets
        that have no form for it."""
        layers = {name: spec.as_dense for name, spec in self.structure.layers.items()}
        if layers == self.structure.layers:
            return self
        stored = dict(self.structure.layers)
        structure = replace(self.structure, layers=layers)
        return replace(self, structure=structure, weights=DenseReader(self.reader, stored))

    def release(self) -> None:
        """Let go of files that were read: their pages stop counting as memory, and what is read next opens them."""
        if self.weights is not None:
            self.weights.release()

    @property
    def reader(self) -> Reader:
        """Where the weights are read. Raises: UsageError where only a config was loaded."""
        if self.weights is None:
            raise UsageError(f"{self.source} has a config but no weights; only `plan` works without them.")
        return self.weights


def maker(task: Task, raw: Mapping[str, Any]) -> Callable[..., Any]:
    """What builds a task's module from a config.

    An encoder is the base of the architecture that was saved: that of BertForMaskedLM has no pooler, BertModel has one.
    """
    import transformers

    if task is Task.CAUSAL_LM:
        return transformers.AutoModelForCausalLM.from_config  # type: ignore[no-any-return]
    whole = getattr(transformers, architecture_of(raw), None)
    if whole is None or not hasattr(whole, "_from_config"):
        return transformers.AutoModel.from_config  # type: ignore[no-any-return]
    # `from_config` of the Auto classes is this very call; single classes have it under this name only
    return lambda config, **settings: whole._from_config(config, **settings).base_model


def architecture_of(raw: Mapping[str, Any]) -> str:
    """The first architecture that a config.json names, or "". Raises: InputError where it is no list of names."""
    names = raw.get("architectures") or [""]
    if not isinstance(names, list) or not isinstance(names[0], str):
        raise InputError(f"config.json: architectures={names!r} is not a list of names. Fetch or save it again.")
    return names[0]


def config_dtype(config: Any) -> torch.dtype:
    """The dtype a config says its weights are stored in."""
    dtype = getattr(config, "dtype", None)
    return dtype if isinstance(dtype, torch.dtype) else torch.float32
