"""The files beside model.onnx that let onnxruntime-genai, optimum and transformers open the folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from compress.errors import InputError
from compress.export.onnx import grouped_codes
from compress.export.onnx.capture import cache_shapes
from compress.export.onnx.providers import GENAI
from compress.export.onnx.runtime import PORTABLE, SHARED
from compress.kv.static import static_format
from compress.models.model import Model, Task

GRAPH = PORTABLE
DATA = "model.onnx_data"
PREPROCESSING = "preprocessing.json"
# onnxruntime-genai allocates a shared cache of max_length at the start; models may have positions for 131,072
SHARED_LENGTH = 4096

# model types that onnxruntime-genai 0.18 knows by name; any other decoder of this form is its generic `decoder`
_GENAI_TYPES = frozenset(
    {
        "llama",
        "mistral",
        "qwen2",
        "qwen3",
        "phi",
        "phi3",
        "gemma",
        "gemma2",
        "gemma3_text",
        "smollm3",
        "granite",
        "olmo",
    }
)


def write(model: Model, folder: Path, shared: bool) -> None:
    """config.json, generation_config.json, tokenizer files, and genai_config.json for a decoder; for an image
    classifier how its inputs are made. shared: whether there is a graph whose cache is one buffer."""
    if model.image is not None:
        text = json.dumps(model.image.described(), indent=2, sort_keys=True) + "\n"
        (folder / PREPROCESSING).write_text(text, encoding="utf8")
        for path in model.side_files():
            shutil.copyfile(path, folder / path.name)
        return
    config = {key: value for key, value in model.raw_config.items() if key != "quantization_config"}
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf8")
    for path in model.side_files():
        shutil.copyfile(path, folder / path.name)
    _rename_tokenizer_class(folder / "tokenizer_config.json")
    (folder / GENAI).unlink(missing_ok=True)
    # a cache that drops tokens, that has scales with each token or layers of several types is none that genai has
    if model.task is Task.CAUSAL_LM and (not model.kv or (shared and grouped_codes.one_type(model.kv))):
        text = json.dumps(genai_config(model, shared), indent=2) + "\n"
        (folder / GENAI).write_text(text, encoding="utf8")


def _rename_tokenizer_class(path: Path) -> None:
    """transformers 4, which optimum's runtime classes use, knows version 5's generic tokenizer by its older name."""
    content = _read_object(path)
    if content.get("tokenizer_class") == "TokenizersBackend":
        content["tokenizer_class"] = "PreTrainedTokenizerFast"
        path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf8")


def _read_object(path: Path) -> dict[str, Any]:
    """A JSON object, empty where there is no such file. Raises: InputError."""
    try:
        content = json.loads(path.read_text(encoding="utf8")) if path.is_file() else {}
    except ValueError as error:
        raise InputError(f"{path} is not JSON ({error}). Fetch or save it again, or remove it.") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} holds a {type(content).__name__}, not an object. Fetch or save it again.")
    return content


def genai_config(model: Model, shared: bool) -> dict[str, Any]:
    """What onnxruntime-genai needs to run the graph with a shared cache, or else the concatenating one."""
    config = model.config.get_text_config()
    shapes = cache_shapes(model)
    kv_heads, head_size = shapes[0]  # this runtime knows one size for all blocks
    tokens = _special_tokens(model)
    context = int(getattr(config, "max_position_embeddings", None) or 2048)
    decoder = {
        "session_options": {"provider_options": []},
        "filename": SHARED if shared else GRAPH,
        "head_size": head_size // 2 if _packed(model) else head_size,  # it allocates by this, in the graph's type
        "hidden_size": int(config.hidden_size),
        "num_attention_heads": int(config.num_attention_heads),
        "num_hidden_layers": len(shapes),
        "num_key_value_heads": kv_heads,
        "inputs": {
            "input_ids": "input_ids",
            "attention_mask": "attention_mask",
            "past_key_names": "past_key_values.%d.key",
            "past_value_names": "past_key_values.%d.value",
        },
        "outputs": {
            "logits": "logits",
            "present_key_names": "present.%d.key",
            "present_value_names": "present.%d.value",
        },
    }
    kind = str(config.model_type)
    return {
        "model": {
            "type": kind if kind in _GENAI_TYPES else "decoder",
            "bos_token_id": _first(tokens["bos"], 0),
            "eos_token_id": tokens["eos"] if isinstance(tokens["eos"], list) else _first(tokens["eos"], 0),
            "pad_token_id": _first(tokens["pad"], _first(tokens["eos"], 0)),
            "vocab_size": int(config.vocab_size),
            "context_length": context,
            "decoder": decoder,
        },
        "search": {
            "do_sample": False,
            "early_stopping": True,
            "max_length": min(context, SHARED_LENGTH) if shared else context,
            "min_length": 0,
            "num_beams": 1,
            "num_return_sequences": 1,
            "past_present_share_buffer": shared,
            "repetition_penalty": 1.0,
            "temperature": 1.0,
            "top_k": 1,
            "top_p": 1.0,
        },
    }


def _packed(model: Model) -> bool:
    """Whether keys and values are two to a byte."""
    return bool(model.kv) and static_format(model.kv[0].keys).bits == 4


def _special_tokens(model: Model) -> dict[str, Any]:
    """bos, eos and pad as generation_config.json gives them, which may list several ends, else as config.json does."""
    given = _read_object(model.path / "generation_config.json")
    config = model.config.get_text_config()
    names = ("bos", "eos", "pad")
    found = {name: given.get(f"{name}_token_id") for name in names}
    return {name: getattr(config, f"{name}_token_id", None) if found[name] is None else found[name] for name in names}


def _first(value: Any, default: int) -> int:
    """One token id where several may be listed."""
    first = value[0] if isinstance(value, list) and value else value
    return int(first) if isinstance(first, int) else default
