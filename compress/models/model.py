"""`load`: a folder, a hub id or `file.py:callable` → `Model`, with everything but the weights in memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compress.errors import CompressError, InputError, UnsupportedError, UsageError
from compress.layer import Layer, LayerKind, LayerSpec
from compress.models import experts, skeleton
from compress.models.folder import SIDE_FILES, first_line, load_tokenizer, locate, parse_config, positions, read_config
from compress.models.image_model import ImageModule, open_images
from compress.models.image_source import ImageSource
from compress.models.onnx_folder import find_graph
from compress.models.reader import Reader
from compress.models.skeleton import Structure
from compress.models.user_module import is_reference, was_run
from compress.models.weights import Checkpoint, digest_files, find_files, index_checkpoint

HEADS = ("ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering", "ForMultipleChoice")
SUPPORTED = (
    "Supported: decoder language models, BERT-type encoders, image classifiers as file.py:callable, and model.onnx. "
    "Models of other kinds can be given as ONNX: `optimum-cli export onnx`, installed in an environment of its own."
)


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
    graph. It has no config.
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

    def skeleton(self, attention: str | None = None, mixture: str = experts.EACH) -> nn.Module:
        """A fresh module tree with parameters on `meta`. Args: see `skeleton.build`; a user's own has neither."""
        if self.image is not None:
            return self.image.skeleton()
        return skeleton.build(self.config, maker(self.task, self.raw_config), attention, mixture)

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
    whole = getattr(transformers, _architecture(raw), None)
    if whole is None or not hasattr(whole, "_from_config"):
        return transformers.AutoModel.from_config  # type: ignore[no-any-return]
    # `from_config` of the Auto classes is this very call; single classes have it under this name only
    return lambda config, **settings: whole._from_config(config, **settings).base_model


def _architecture(raw: Mapping[str, Any]) -> str:
    names = raw.get("architectures") or [""]
    if not isinstance(names, list) or not isinstance(names[0], str):
        raise InputError(f"config.json: architectures={names!r} is not a list of names. Fetch or save it again.")
    return names[0]


def config_dtype(config: Any) -> torch.dtype:
    """The dtype a config says its weights are stored in."""
    dtype = getattr(config, "dtype", None)
    return dtype if isinstance(dtype, torch.dtype) else torch.float32


def load(source: str | Path, *, revision: str | None = None, weights: bool = True) -> Model:
    """Open a model folder, a hub id, `file.py:callable` (an image classifier; the file is run), or `model.onnx` or the
    folder of an exporter that holds one.

    Args: revision: hub commit or branch; weights=False reads only config.json (for `plan`; a callable makes its weights
    all the same).
    Raises: UsageError (no such folder), InputError (malformed, unsafe), UnsupportedError (model family).
    """
    if is_reference(str(source)):
        return _of_module(str(source))
    graph = find_graph(source)
    if graph is not None:
        return _of_graph(str(source), graph)
    path = locate(str(source), revision, weights)
    raw = read_config(path)
    config = parse_config(path, raw)
    task = _task(config, raw)
    module = _build(config, maker(task, raw), raw)
    structure = skeleton.survey(module)
    if not weights:
        layers = {k: replace(v, source_dtype=config_dtype(config)) for k, v in structure.layers.items()}
        return Model(str(source), path, task, config, replace(structure, layers=layers), None, "", raw)
    files = find_files(path)
    checkpoint = index_checkpoint(files, module, structure.aliases)
    structure = replace(structure, layers={k: _with_dtype(v, checkpoint) for k, v in structure.layers.items()})
    made = Model(str(source), path, task, config, structure, checkpoint, digest_files(files), raw)
    return replace(made, warnings=_unused(checkpoint))


def _of_module(source: str, sha256: str = "") -> Model:
    found = open_images(source, sha256)
    return Model(
        source,
        found.image.factory.path.parent,
        Task.IMAGE,
        None,
        found.structure,
        found.reader,
        found.digest,
        warnings=found.notes,
        image=found.image,
    )


def _of_graph(source: str, path: Path) -> Model:
    from compress.models.onnx_model import open_onnx  # onnx is slow to import

    found = open_onnx(path)
    return Model(
        source,
        path.parent,
        _task_of(found.image),
        None,
        found.structure,
        found.reader,
        found.digest,
        warnings=found.notes,
        image=found.image,
    )


def _task_of(image: ImageSource) -> Task:
    if image.is_image:
        return Task.IMAGE if image.labelled else Task.OUTPUTS
    return Task.CLASSIFIER if image.labelled else Task.ARRAYS


def reopen(kept: Mapping[str, Any], folder: Path) -> Model:
    """The model of images whose weights a store holds: from the file that made it, or from the graph beside them.

    An artifact must not run code that its user never named, so the file must still be where it was, outside of the
    artifact, and unchanged. Args: kept: what `ImageSource.keep` gave; folder: the store.
    Raises: InputError.
    """
    if "graph" in kept:
        return _reopened_graph(kept, folder)
    try:
        path, name, sha256 = Path(kept["file"]), str(kept["callable"]), str(kept["sha256"])
        folded = [tuple(pair) for pair in kept["folded"]]
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{folder}: structure.json names its module badly ({error!r}).") from error
    is_inside = not path.is_absolute() or path.resolve().is_relative_to(folder.resolve().parent)
    if not sha256 or (is_inside and not was_run(path, sha256)):
        raise InputError(
            f"{folder}: structure.json names {path} as its code. It came with the model, so it is not run."
        )
    if not path.is_file():
        raise InputError(f"{folder} needs {path}, the file that its module was made by. Put it back there.")
    found = _of_module(f"{path}:{name}", sha256)
    assert isinstance(found.image, ImageModule)
    if [*found.image.folded] != folded:
        raise InputError(f"{folder}: {path}:{name} makes another module than it did: other BatchNorms can be folded.")
    return replace(found, path=folder)


def _reopened_graph(kept: Mapping[str, Any], folder: Path) -> Model:
    from compress.models.onnx_model import reopen_onnx

    image, structure = reopen_onnx(kept, folder)
    return Model(str(folder), folder, _task_of(image), None, structure, None, "", image=image)


def _unused(checkpoint: Checkpoint) -> tuple[str, ...]:
    """A remark on stored tensors that the module has no place for; what is recomputed (buffers) is no loss."""
    lost = [name for name in checkpoint.unused if not name.endswith(("inv_freq", "position_ids", "masked_bias"))]
    if not lost:
        return ()
    return (f"{len(lost)} tensor(s) of the checkpoint belong to no part of this model and are left out: {lost[0]} …",)


def _build(config: Any, make: Callable[..., Any], raw: Mapping[str, Any]) -> nn.Module:
    """The module, refused where transformers cannot build it or it does not take token ids."""
    name = _architecture(raw) or config.model_type
    try:
        module = skeleton.build(config, make)
    except CompressError:
        raise
    except (ValueError, ImportError, AttributeError) as error:
        raise UnsupportedError(f"{name}: transformers cannot build this model ({first_line(error)}).") from error
    except Exception as error:  # a config's values fail in many ways once a module is built of them
        raise InputError(f"{name}: no module can be built of config.json ({first_line(error)}). Check it.") from error
    taken = getattr(module, "main_input_name", "input_ids")
    if taken != "input_ids":
        raise UnsupportedError(f"{name} takes {taken}, not token ids. {SUPPORTED}")
    return module


def _with_dtype(spec: LayerSpec, checkpoint: Checkpoint) -> LayerSpec:
    name = spec.name.rpartition(".")[0] if spec.kind is LayerKind.EXPERT else f"{spec.name}.weight"
    return replace(spec, source_dtype=checkpoint.dtype(name))


def _task(config: Any, raw: dict[str, Any]) -> Task:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES as MASKED

    architecture = _architecture(raw)
    if getattr(config, "is_encoder_decoder", False) or "vision_config" in raw or "audio_config" in raw:
        name = architecture or config.model_type
        raise UnsupportedError(f"{name}: encoder-decoder and multi-modal models are not supported. {SUPPORTED}")
    if architecture.endswith(HEADS):
        raise UnsupportedError(
            f"{architecture}: its task head would be lost, which this version cannot carry. {SUPPORTED}"
        )
    if architecture:
        return Task.CAUSAL_LM if architecture == CAUSAL.get(config.model_type) else Task.ENCODER
    is_decoder = config.model_type in CAUSAL and config.model_type not in MASKED
    return Task.CAUSAL_LM if is_decoder else Task.ENCODER
