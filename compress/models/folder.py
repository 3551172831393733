"""A model's folder: where it is, its config and tokenizer. Nothing in it is run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compress import manifest
from compress.errors import InputError, UnsupportedError, UsageError
from compress.files import read_json

SIDE_FILES = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
)


def locate(source: str, revision: str | None, weights: bool = True) -> Path:
    """A folder given by path, or fetched by hub id (weights=False: without its weights). Raises: UsageError."""
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        if path.suffix == ".py":
            raise UsageError(
                f"{source} is a Python file. Name the function in it that makes the model: {source}:FUNCTION. "
                "A language model is given as the folder that holds config.json and *.safetensors."
            )
        raise UsageError(f"{source} is a file. Give the folder that holds config.json and *.safetensors.")
    if source.startswith((".", "/", "~")) or source.count("/") != 1:
        raise UsageError(f"No such folder: {source}. Give a folder that save_pretrained wrote, or a hub id 'org/name'.")
    return _download(source, revision, weights)


def _download(source: str, revision: str | None, weights: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = ["config.json", *SIDE_FILES]
    patterns += ["*.safetensors", "model.safetensors.index.json"] if weights else []
    try:  # a pattern's star also matches a slash; only files at the top count
        return Path(snapshot_download(source, revision=revision, allow_patterns=patterns, ignore_patterns=["*/*"]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise UsageError(
            f"'{source}' is no folder here, and could not be fetched from the hub ({first_line(error)}). "
            "Check the name and the network, or give a local folder."
        ) from error


def read_config(path: Path) -> dict[str, Any]:
    """config.json as a dict. Raises: UsageError when it is missing, InputError when it is malformed or asks for code to
    be run."""
    file = path / "config.json"
    if not file.is_file():
        raise UsageError(f"{path} has no config.json. Give a folder that save_pretrained wrote.{_inside(path)}")
    raw = read_object(file, "Fetch or save it again.")
    refuse_code(file, raw)
    _check_depth(file, raw)
    quantized = raw.get("quantization_config")
    if quantized is not None:
        method = str(quantized.get("quant_method", "unknown")) if isinstance(quantized, dict) else "unknown"
        raise UnsupportedError(f"{path} is already quantized ({method}). Start from the uncompressed model.")
    return raw


def _inside(path: Path) -> str:
    """Which folder of it was meant, or where an artifact's model is."""
    if (path / manifest.NAME).is_file():
        return " This is what `compress run` made: start from the model that it was made from."
    found = sorted({*path.glob("*/config.json"), *path.glob("snapshots/*/config.json")})  # the hub's cache has these
    return f" Did you mean {found[0].parent}?" if found else ""


def read_object(path: Path, advice: str) -> dict[str, Any]:
    """A file that holds one JSON object. Raises: InputError, which ends with the advice."""
    try:
        found = read_json(path)
    except (ValueError, OSError) as error:
        raise InputError(f"{path} is not JSON ({error}). {advice}") from error
    if not isinstance(found, dict):
        raise InputError(f"{path} holds a {type(found).__name__}, not an object. {advice}")
    return found


CODE_KEYS = ("auto_map", "trust_remote_code", "custom_pipelines")
MOST_LAYERS = 10_000


def refuse_code(file: Path, content: Any) -> None:
    """Raises: InputError where a config or tokenizer asks for code of its own to be run: a class, or a hub's kernel."""
    for where in _remote_code(content):
        raise InputError(
            f"{file} asks for code of its own to be run ('{where}'). That is not done. Supported are the "
            "architectures that transformers ships; remove the key if the model is one of them."
        )


def _remote_code(content: Any) -> list[str]:
    """Paths of the keys that do. A stack, since a file may be nested deeper than calls may."""
    found, waiting = list[str](), [("", content)]
    while waiting:
        path, value = waiting.pop()
        if isinstance(value, Mapping):
            found += [f"{path}{key}" for key in value if key in CODE_KEYS]
            waiting += [(f"{path}{key}.", item) for key, item in value.items()]
        elif isinstance(value, list):
            waiting += [(path, item) for item in value]
        elif isinstance(value, str) and "/" in value and "_implementation" in path:  # attention by org/name
            found.append(path.rstrip("."))
    return found


def _check_depth(file: Path, raw: Mapping[str, Any]) -> None:
    """A file of a few bytes may ask for layers without end. Raises: InputError."""
    parts = [raw, *(value for value in raw.values() if isinstance(value, Mapping))]
    for key, value in (item for part in parts for item in part.items()):
        if "layer" in key and type(value) is int and abs(value) > MOST_LAYERS:
            raise InputError(f"{file}: {key} is {str(value)[:40]}; models of up to {MOST_LAYERS:,} layers are read.")


def parse_config(path: Path, raw: dict[str, Any]) -> Any:
    """transformers' config object. Raises: InputError for a model type that it does not know."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # config classes check their fields with errors of many kinds
        kind = raw.get("model_type", "missing")
        raise InputError(
            f"{path / 'config.json'}: model_type '{kind}' cannot be built by this transformers "
            f"({first_line(error)}). Check the file, or update transformers."
        ) from error


def first_line(error: Exception) -> str:
    """What an error of another library says, in one line."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def load_tokenizer(path: Path) -> Any:
    """The tokenizer of a folder, None where it has none. Raises: InputError for one that is broken or asks for code."""
    if not any((path / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")):
        return None
    from transformers import AutoTokenizer

    config = path / "tokenizer_config.json"
    try:
        refuse_code(config, read_json(config) if config.is_file() else {})
        return AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except InputError:
        raise
    except Exception as error:  # tokenizer libraries raise bare Exception
        raise InputError(f"The tokenizer in {path} cannot be loaded ({error}). Fetch or save it again.") from error


# their position ids begin after the padding token's id
OFFSET_POSITIONS = {
    *("roberta", "xlm-roberta", "xlm-roberta-xl", "roberta-prelayernorm", "camembert", "mpnet", "longformer", "xmod"),
    *("data2vec-text", "ibert", "lilt"),
}


def positions(config: Any) -> int:
    """Tokens of the longest sequence by a text model's config; a million where it sets no limit."""
    rows = int(getattr(config, "max_position_embeddings", None) or 1 << 20)
    if getattr(config, "model_type", "") not in OFFSET_POSITIONS:
        return rows
    padding = getattr(config, "pad_token_id", None)
    return rows - (1 if padding is None else int(padding)) - 1
