"""What lies beside an ONNX model: the folder that an exporter (optimum, transformers.js) wrote. Nothing in it is run.

config.json says what the model is, its vocabulary and positions; preprocessing.json (ours) or preprocessor_config.json
(transformers') how pixels enter it; a tokenizer turns texts into its inputs.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from typing import Any

from compress.errors import InputError, UnsupportedError, UsageError
from compress.files import read_json
from compress.models.folder import OFFSET_POSITIONS, SIDE_FILES
from compress.models.user_module import Preprocess, normalising

GRAPH = "model.onnx"
PREPROCESSING = "preprocessing.json"
"""Beside a model: `mean` and `std` per channel of pixels from 0 to 1, as an exported folder has it."""
PROCESSOR = "preprocessor_config.json"
_PARTS = ("decoder_model.onnx", "decoder_model_merged.onnx", "decoder_with_past_model.onnx")
_CLASSIFIERS = ("ForSequenceClassification", "ForImageClassification", "ForAudioClassification")
_DECODERS = ("ForCausalLM", "LMHeadModel")
_INSTEAD = "Compress the PyTorch checkpoint that it was exported from: compress run FOLDER, with its *.safetensors."


@dataclass(frozen=True)
class Beside:
    """config: of config.json, empty where there is none; image: (channels, h, w) by the configs, () where they say
    none; longest: tokens that the model has positions for, 0 where that is not known."""

    folder: Path
    config: dict[str, Any] = field(default_factory=dict, repr=False)
    processor: dict[str, Any] = field(default_factory=dict, repr=False)

    @property
    def architecture(self) -> str:
        """The first of the config's; empty where it names none."""
        names = self.config.get("architectures")
        return names[0] if isinstance(names, list) and names and isinstance(names[0], str) else ""

    @property
    def is_classifier(self) -> bool:
        """Whether the config names a head of classes."""
        return self.architecture.endswith(_CLASSIFIERS)

    @property
    def vocabulary(self) -> int:
        """Token ids are below it; 0 where that is not known."""
        return self._number("vocab_size")

    @property
    def longest(self) -> int:
        """Tokens of the longest text; 0 where that is not known."""
        rows, kind = self._number("max_position_embeddings"), self.config.get("model_type")
        if not rows or kind not in OFFSET_POSITIONS:
            return rows
        padding = self.config.get("pad_token_id")
        return max(1, rows - (padding if isinstance(padding, int) else 1) - 1)

    @property
    def image(self) -> tuple[int, ...]:
        """(channels, h, w) of an image."""
        sizes = (self.processor.get(name) for name in ("crop_size", "size"))
        found: Any = next((size for size in (self.config.get("image_size"), *sizes) if size), None)
        if isinstance(found, dict):
            found = [found.get("height", found.get("shortest_edge")), found.get("width", found.get("shortest_edge"))]
        height, width = found if isinstance(found, list) and len(found) == 2 else (found, found)
        shape: tuple[Any, ...] = (self.config.get("num_channels", 3), height, width)
        return tuple(int(size) for size in shape) if all(type(size) is int and size > 0 for size in shape) else ()

    def _number(self, name: str) -> int:
        value = self.config.get(name)
        return value if type(value) is int and value > 0 else 0

    def side_files(self) -> list[Path]:
        """Config and tokenizer, for whoever turns texts into inputs."""
        return [self.folder / name for name in ("config.json", *SIDE_FILES) if (self.folder / name).is_file()]


def find_graph(source: str | Path) -> Path | None:
    """The ONNX model that a source names: the file itself, or that of an exporter's folder; None for anything else.

    Raises: UnsupportedError for a folder whose model lies in several graphs; UsageError where it is not said which.
    """
    path = Path(source).expanduser()
    if path.suffix == ".onnx":
        return path
    if not path.is_dir() or any(path.glob("*.safetensors")) or any(path.glob("*.safetensors.index.json")):
        return None
    names = sorted(file.name for file in path.glob("*.onnx"))
    parts = [name for name in names if name in _PARTS or name == "encoder_model.onnx"]
    if "encoder_model.onnx" in parts or "vision_encoder.onnx" in names:
        raise UnsupportedError(
            f"{path} holds {', '.join(names)}: an encoder-decoder or multi-modal model in several graphs, which is "
            "not supported. Supported are folders with one model.onnx: encoders, classifiers, images or audio."
        )
    if parts:
        raise UnsupportedError(f"{path} holds {', '.join(parts)}, a decoder. {_INSTEAD}")
    if GRAPH in names or len(names) == 1:
        return path / (GRAPH if GRAPH in names else names[0])
    if names:
        raise UsageError(f"{path} holds {', '.join(names)} and no {GRAPH}. Name one of them: {path / names[0]}.")
    return None


def read_beside(path: Path) -> Beside:
    """What the files beside a model say. Raises: InputError for a malformed one."""
    folder = path.parent
    return Beside(folder, _object(folder / "config.json"), _object(folder / PROCESSOR))


def refuse_decoders(inputs: Iterable[str], outputs: Iterable[str], beside: Beside, path: Path) -> None:
    """Raises: UnsupportedError for what generates: text with a cache, from another text, or about an image."""
    caches = [name for name in (*inputs, *outputs) if "past_key_values" in name or name.startswith("present")]
    what = f"{path} ({beside.architecture})" if beside.architecture else str(path)
    if beside.config.get("is_encoder_decoder") is True or "decoder_input_ids" in inputs:
        raise UnsupportedError(
            f"{what} is an encoder-decoder, which is not supported. Supported are encoders, classifiers, and models of "
            "images or audio; decoders from their PyTorch checkpoint."
        )
    if "vision_config" in beside.config and "text_config" in beside.config:
        raise UnsupportedError(
            f"{what} is a vision-language model, which is not supported. Export the part that takes images alone."
        )
    if caches or beside.architecture.endswith(_DECODERS):
        told = f", whose cache is {caches[0]} and {len(caches) - 1} more" if caches else ""
        raise UnsupportedError(f"{what} is a decoder language model{told}. {_INSTEAD}")


def read_preprocessing(beside: Beside, channels: int) -> tuple[Preprocess, tuple[str, ...]]:
    """How pixels enter a model of images, with a remark where nothing says it. Raises: InputError."""
    own = beside.folder / PREPROCESSING
    if own.is_file():
        found = _object(own)
        return _normalised(own, found.get("mean"), found.get("std"), channels), ()
    theirs = beside.processor
    factor = theirs.get("rescale_factor", 1 / 255)
    if theirs.get("do_rescale", True) is False or not isinstance(factor, float) or abs(255 * factor - 1) > 1e-3:
        raise UnsupportedError(
            f"{beside.folder / PROCESSOR} does not take pixels from 0 to 1 (rescale_factor {factor}). Write a "
            f"{PREPROCESSING} beside it with mean and std of pixels from 0 to 1."
        )
    if theirs.get("do_normalize", True) is not False and theirs.get("image_mean") is not None:
        return _normalised(beside.folder / PROCESSOR, theirs["image_mean"], theirs.get("image_std"), channels), ()
    if theirs:
        return Preprocess("x / 255"), ()
    note = (
        f"No {PREPROCESSING} beside the model: pixels (uint8) enter it as x / 255. If it takes others, "
        "write one with mean and std per channel, such as "
        '{"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}.'
    )
    return Preprocess("x / 255"), (note,)


def _normalised(path: Path, means: Any, deviations: Any, channels: int) -> Preprocess:
    try:
        mean, std = (tuple(float(figure) for figure in figures) for figures in (means, deviations))
    except (ValueError, TypeError) as error:
        raise InputError(
            f"{path}: mean is {str(means)[:60]}, std is {str(deviations)[:60]}. Wanted: lists of {channels} number(s) "
            'each, such as {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}.'
        ) from error
    if not mean and not std:
        return Preprocess("x / 255")
    if {len(mean), len(std)} != {channels} or min(std) <= 0 or not all(map(isfinite, (*mean, *std))):
        raise InputError(f"{path}: mean {mean}, std {std}; {channels} figure(s) each are wanted, std above 0.")
    return normalising(mean, std)


def _object(path: Path) -> dict[str, Any]:
    """A JSON object, empty where there is no such file. Raises: InputError."""
    if not path.is_file():
        return {}
    try:
        content = read_json(path)
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is malformed ({error}). Fetch or write it again.") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} holds a {type(content).__name__}, not an object. Fetch or write it again.")
    return content
