"""Tiny models made from seeds, and the text they are calibrated on. No network, no GPU."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")

ASSETS = Path(__file__).resolve().parents[2] / "shared" / "assets"


@pytest.fixture(scope="session")
def assets() -> Path:
    """The folder of real models, where it is there."""
    folder = Path(os.environ.get("COMPRESS_ASSETS", ASSETS))
    if not folder.is_dir():
        pytest.skip("the folder of real models is not here (COMPRESS_ASSETS names it)")
    return folder


def save_tokenizer(folder: Path) -> None:
    """A tokenizer of single bytes: 256 tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: place for place, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)


@pytest.fixture(scope="session")
def make_llama(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Build a small Llama with random weights; keyword arguments change its config."""

    def make(name: str = "tiny-llama", tokenizer: bool = True, dtype: str = "float32", **changes: Any) -> Path:
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        settings = {
            "vocab_size": 256,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 128,
            "tie_word_embeddings": True,
            "initializer_range": 0.2,
        }
        torch.manual_seed(0)
        folder = tmp_path_factory.mktemp("models") / name
        model = LlamaForCausalLM(LlamaConfig(**{**settings, **changes}))
        model.to(getattr(torch, dtype)).save_pretrained(folder)
        if tokenizer:
            save_tokenizer(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def save_random(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Save the model that a class makes of a config, with random weights of which none is alike or zero."""

    def save(name: str, config: Any, maker: str = "AutoModelForCausalLM") -> Path:
        import torch
        import transformers

        model = getattr(transformers, maker).from_config(config)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in model.parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(noise * 0.15 if parameter.ndim > 1 else parameter + noise * 0.1)
        folder = tmp_path_factory.mktemp("models") / name
        model.save_pretrained(folder)
        return folder

    return save


@pytest.fixture(scope="session")
def llama(make_llama: Callable[..., Path]) -> Path:
    """A 3-block Llama with tied embeddings and a byte tokenizer. Do not write into it."""
    return make_llama()


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 20,000 characters without a repeated window."""
    import random

    maker = random.Random(0)
    words = ["tree", "river", "stone", "the", "a", "runs", "over", "under", "blue", "and", "sees", "window"]
    path = tmp_path_factory.mktemp("data") / "text.txt"
    path.write_text(" ".join(maker.choice(words) for _ in range(4000)))
    return path


@pytest.fixture
def copy(llama: Path, tmp_path: Path) -> Path:
    """A model folder that a test may damage."""
    return Path(shutil.copytree(llama, tmp_path / "model"))
