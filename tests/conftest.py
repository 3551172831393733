"""Tiny models made from seeds, and the text they are calibrated on. No network, no GPU."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from helpers.captures import capture_once
from helpers.runs import Done, arguments, command

WORKER = os.environ.get("PYTEST_XDIST_WORKER", "")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

if WORKER and hasattr(os, "sched_setaffinity"):
    # a core for each of those that test side by side: runtimes take as many threads as there are cores for them, and
    # their idle ones would keep the others' cores busy
    _cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {_cores[int(WORKER.removeprefix("gw")) % len(_cores)]})

SLOW_S = 90

_config: list[pytest.Config] = []


def pytest_configure(config: pytest.Config) -> None:
    """Keep it for the reports, which come without it."""
    _config[:] = [config]


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Name a test that fails, or takes long, at once: a run that is cut off has told of it then."""
    terminal = None if WORKER else _config[0].pluginmanager.getplugin("terminalreporter")
    if terminal is None:
        return
    if report.failed:
        last = (report.longreprtext.strip().splitlines() or [""])[-1]
        terminal.write_line(f"\nFAILED {report.nodeid} ({report.when}): {last}")
    elif report.duration > SLOW_S:
        terminal.write_line(f"\nSLOW {report.nodeid} ({report.when}): {report.duration:.0f} s")


ASSETS = Path(__file__).resolve().parents[2] / "shared" / "assets"


@pytest.fixture(scope="session")
def assets() -> Path:
    """The folder of real models, where it is there."""
    folder = Path(os.environ.get("COMPRESS_ASSETS") or ASSETS)
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
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One for all processes that run these tests together."""
    own = tmp_path_factory.getbasetemp()
    return own.parent if WORKER else own


@pytest.fixture(scope="session")
def captures(shared_folder: Path) -> Path:
    """The folder of what was captured. From here on each structure is traced once."""
    folder = shared_folder / "captures"
    capture_once(folder)
    return folder


@pytest.fixture(scope="session")
def make_llama(tmp_path_factory: pytest.TempPathFactory, captures: Path) -> Callable[..., Path]:
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
def save_random(tmp_path_factory: pytest.TempPathFactory, captures: Path) -> Callable[..., Path]:
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


@pytest.fixture(scope="session")
def make_artifact(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """An artifact as a user may copy it: manifest.json and exported folders of an uncompressed model, without its
    store, for a profile that any machine fits."""

    def make(source: Path | str, *targets: str) -> Path:
        import compress
        from compress import hwprofiles, manifest
        from compress.export import find

        model, profile = compress.load(source), hwprofiles.load("cpu-x86-avx512-vnni")
        anywhere = profile.detect.model_copy(update={"architecture": ("x86_64", "aarch64")})
        profile = profile.model_copy(update={"isa": (), "detect": anywhere, "target": targets[0]})
        out = tmp_path_factory.mktemp("artifacts") / "out"
        for name in targets:
            find(name).write(model, profile, out / find(name).FOLDER)
        facts = {"task": str(model.task), "profile": profile.model_dump(mode="json")}
        manifest.write(out, facts, [find(name).FOLDER for name in targets])
        return out

    return make


@pytest.fixture(scope="session")
def lm_out(make_artifact: Callable[..., Path], llama: Path) -> Path:
    """The 3-block Llama as an artifact with two engines. Do not write into it."""
    return make_artifact(llama, "onnx", "checkpoint")


@pytest.fixture(scope="session")
def one_block(make_llama: Callable[..., Path]) -> Path:
    """The smallest of them. Do not write into it."""
    return make_llama("one-block", num_hidden_layers=1)


@pytest.fixture(scope="session")
def two_blocks(make_llama: Callable[..., Path]) -> Path:
    """What the command's tests compress. Do not write into it."""
    return make_llama("two-blocks", num_hidden_layers=2)


@pytest.fixture(scope="session")
def finished(two_blocks: Path, text_file: Path, shared_folder: Path) -> tuple[Path, Done]:
    """One run of the real command, for all processes that run these tests. Do not write into it."""
    folder = shared_folder / "finished"
    folder.mkdir(exist_ok=True)
    told = folder / "told.json"
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not told.is_file():
            done = command(*arguments(two_blocks, text_file, folder / "out"), "--json")
            told.write_text(json.dumps([done.args, done.returncode, done.stdout, done.stderr]))
    return folder / "out", subprocess.CompletedProcess(*json.loads(told.read_text()))


@pytest.fixture
def copy(llama: Path, tmp_path: Path) -> Path:
    """A model folder that a test may damage."""
    return Path(shutil.copytree(llama, tmp_path / "model"))


CNN = '''
"""A small classifier of 12x12 images: a stem, a depthwise and a grouped convolution, a residual, five classes."""

import torch
from torch import nn
from torch.nn import functional as F

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.depth = nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=8)
        self.after_depth = nn.BatchNorm2d(8)
        self.point = nn.Conv2d(8, 16, (1, 1), bias=False)
        self.after_point = nn.BatchNorm2d(16)
        self.grouped = nn.Conv2d(16, 16, 3, padding="same", dilation=2, groups=4, bias=False)
        self.after_grouped = nn.BatchNorm2d(16)
        self.twice = nn.Conv2d(16, 16, 2, padding="same")
        self.kept = nn.BatchNorm2d(16)
        self.last = nn.BatchNorm2d(16)
        self.head = nn.Linear(16 * 6 * 6, 5)

    def forward(self, x):
        x = self.stem(x)
        x = F.relu(self.after_point(self.point(F.relu(self.after_depth(self.depth(x))))))
        x = F.relu(self.after_grouped(self.grouped(x)) + x)
        y = self.twice(x)
        x = self.last(self.kept(y) + y)
        return self.head(x.flatten(1))


def net():
    made, maker = Net(), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in made.state_dict().items():
            if tensor.is_floating_point():
                noise = torch.rand(tensor.shape, generator=maker)
                spread = 6 if tensor.ndim > 1 else 1
                tensor.copy_(noise + 0.5 if "var" in name or name.endswith("weight") and tensor.ndim == 1
                             else (noise - 0.5) * spread / max(1, tensor[0].numel()) ** 0.5)
    return made


def sample_inputs(batch=2):
    return (torch.randn(batch, 3, 12, 12, generator=torch.Generator().manual_seed(0)),)
'''


@pytest.fixture(scope="session")
def cnn(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A small classifier as `file.py:callable`. Do not write beside it."""
    path = tmp_path_factory.mktemp("code") / "tiny_cnn.py"
    path.write_text(CNN)
    return f"{path}:net"


@pytest.fixture(scope="session")
def images_file(cnn: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """80 random images (uint8, channels last), of which the classifier gets about 90 % right."""
    import numpy as np
    import torch

    import compress
    from compress.models.placing import whole_module

    maker = np.random.default_rng(0)
    pixels = maker.integers(0, 256, (80, 12, 12, 3), dtype=np.uint8)
    model = compress.load(cnn)
    assert model.image is not None
    with torch.no_grad():
        logits = whole_module(model)(model.image.preprocess(torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy())))
    labels = np.where(maker.random(80) < 0.9, logits.argmax(-1).numpy(), maker.integers(0, 5, 80))
    path = tmp_path_factory.mktemp("data") / "images.npz"
    np.savez(path, images=pixels, labels=labels)
    return path
