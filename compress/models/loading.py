"""`load`: a folder, a hub id or `file.py:callable` → `Model`, with everything but the weights in memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from compress.errors import CompressError, InputError, UnsupportedError
from compress.layer import LayerKind, LayerSpec
from compress.models import skeleton
from compress.models.edits import Edit, apply_edits, resized_images
from compress.models.folder import first_line, locate, parse_config, read_config
from compress.models.image_model import ImageModule, open_images
from compress.models.image_source import ImageSource, Opened
from compress.models.model import Model, Task, architecture_of, config_dtype, maker
from compress.models.onnx_folder import find_graph
from compress.models.user_module import is_reference, was_run
from compress.models.weight_files import digest_files, find_files
from compress.models.weights import Checkpoint, index_checkpoint

HEADS = ("ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering", "ForMultipleChoice")
SUPPORTED = (
    "Supported: decoder language models, BERT-type encoders, image classifiers as file.py:callable, and model.onnx. "
    "Models of other kinds can be given as ONNX: `optimum-cli export onnx`, installed in an environment of its own."
)


def load(
    source: str | Path, *, revision: str | None = None, weights: bool = True, edits: tuple[Edit, ...] = ()
) -> Model:
    """Open a model folder, a hub id, `file.py:callable` (an image classifier; the file is run), or `model.onnx` or the
    folder of an exporter that holds one.

    Args: revision: hub commit or branch; weights=False reads only config.json (for `plan`; a callable makes its weights
    all the same); edits: of a store's module tree.
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
    apply_edits(module, edits)
    structure = skeleton.survey(module)
    if not weights:
        layers = {k: replace(v, source_dtype=config_dtype(config)) for k, v in structure.layers.items()}
        return Model(str(source), path, task, config, replace(structure, layers=layers), None, "", raw, edits=edits)
    files = find_files(path)
    checkpoint = index_checkpoint(files, module, structure.aliases)
    structure = replace(structure, layers={k: _with_dtype(v, checkpoint) for k, v in structure.layers.items()})
    made = Model(str(source), path, task, config, structure, checkpoint, digest_files(files), raw)
    return replace(made, warnings=_unused(checkpoint))


def _of_module(source: str, sha256: str = "") -> Model:
    found = open_images(source, sha256)
    return _of_image(source, found.image.factory.path.parent, found)


def _of_graph(source: str, path: Path) -> Model:
    from compress.models.onnx_model import open_onnx  # onnx is slow to import

    return _of_image(source, path.parent, open_onnx(path))


def _of_image(source: str, folder: Path, found: Opened[ImageSource]) -> Model:
    image, task = found.image, _task_of(found.image)
    return Model(
        source, folder, task, None, found.structure, found.reader, found.digest, warnings=found.notes, image=image
    )


def _task_of(image: ImageSource) -> Task:
    if image.is_image:
        return Task.IMAGE if image.labelled else Task.OUTPUTS
    return Task.CLASSIFIER if image.labelled else Task.ARRAYS


def reopen(kept: Mapping[str, Any], folder: Path, edits: tuple[Edit, ...] = ()) -> Model:
    """The model of images whose weights a store holds: from the file that made it, or from the graph beside them.

    An artifact must not run code that its user never named, so the file must still be where it was, outside of the
    artifact, and unchanged. Args: kept: what `ImageSource.keep` gave; folder: the store; edits: of its module tree.
    Raises: InputError.
    """
    if "graph" in kept:
        return resized_images(_reopened_graph(kept, folder), edits)
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
    return resized_images(replace(found, path=folder), edits)


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
    name = architecture_of(raw) or config.model_type
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
    dtype = checkpoint.dtype(name)
    if not dtype.is_floating_point:
        raise UnsupportedError(
            f"{name} is stored in whole numbers ({dtype}): start from the model before it was quantized."
        )
    return replace(spec, source_dtype=dtype)


def _task(config: Any, raw: dict[str, Any]) -> Task:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES as MASKED

    architecture = architecture_of(raw)
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
