"""Running an exported folder in ONNX Runtime. Imports numpy and onnxruntime only, so that a child process which
measures memory (`python -m compress.export.onnx.deployed FOLDER`) measures the runtime, not us."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from compress.errors import InputError, UnsupportedError
from compress.export.onnx import providers
from compress.export.onnx.cache import Cache, Concatenated, Shared
from compress.models.onnx_interface import GIVEN, Interface
from compress.runtime import probing
from compress.runtime.greedy import greedy

Ids = NDArray[np.int64]
PORTABLE, SHARED, SLOTS, ROUNDED = "model.onnx", "model_gqa.onnx", "model_slots.onnx", "model_kv.onnx"
"""The graphs of a folder. The second has GroupQueryAttention, whose cache may be one buffer; not all models can. The
third is there instead where the model's cache drops tokens (slots.py). The fourth is there where the cache keeps all
tokens in codes (growing.py): then the second, if it is there, has codes too."""
PAST, PRESENT = "past_key_values.", "present."
FACTS = "compress.cache"
"""Metadata of a graph whose growing cache is in codes: JSON, each layer's KvSpec."""
REASON = "compress.no_shared_cache"
"""Metadata of the portable graph: why there is no other."""
WIDE = "compress.float32"
"""Metadata of a graph: why it computes in float32 although its profile says float16."""
_TYPES: dict[str, Any] = {"float": np.float32, "float16": np.float16, "int8": np.int8, "uint8": np.uint8}
"""Of caches."""


def preferred(folder: Path) -> str:
    """The graph that is measured and used here, where a folder has two.

    pycoder in INT4, one thread, paired: decode 1.44 times as fast after 128 tokens, 1.53 after 900, 1.18 at batch 4;
    INT8 1.17, 1.28, 1.09; prefill alike.
    """
    return next((name for name in (SHARED, ROUNDED) if (folder / name).is_file()), PORTABLE)


class Session:
    """A graph of a folder, loaded with all graph optimizations on the CPU.

    Its threads wait busily inside a call only (onnxruntime's default also between calls): two sessions that are timed
    in turn, or torch beside one, would fight for the cores. A trial on two cores: the baseline against itself spread
    over 0.83 to 1.51 before, 0.97 to 1.05 so.

    Args: threads for one operator; exact: switch the kernels' own rounding of activations off (MatMulNBits at accuracy
    level 0), slow but the graph's exact arithmetic; provider: by default the one that the folder names (providers.py);
    a machine without it checks the graph on the CPU, which `level` and `notes` say; graph: PORTABLE or SHARED;
    profile_to: how the file begins that the runtime's profiler writes, which slows every call.
    Raises: UnsupportedError when onnxruntime is missing or places the graph elsewhere, InputError when the file does
    not load.
    """

    def __init__(
        self,
        folder: Path,
        threads: int,
        *,
        exact: bool = False,
        provider: str | None = None,
        graph: str = PORTABLE,
        profile_to: Path | None = None,
    ) -> None:
        ort = load_onnxruntime()
        options = _options(ort, threads, profile_to)
        self.folder, self.graph, self.shares_cache = folder, graph, graph == SHARED
        content: str | bytes = str(folder / graph)
        if exact:
            content = _exact_graph(folder / graph)
            options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
        asked = [(provider, {})] if provider else providers.wanted(folder)
        missing = asked[0][0] if not provider and not providers.usable(asked[0][0]) else ""
        placed: providers.Providers = [(providers.CPU, {})] if missing else asked
        started = time.perf_counter()
        self.session = _load(ort, content, options, placed, folder / graph)
        self.load_s = time.perf_counter() - started
        providers.check(self.session, placed[0][0])
        self.name = f"onnxruntime {ort.__version__} {placed[0][0].removesuffix('ExecutionProvider')}"
        self.level = "checked" if missing else "ran"
        self.built_for = f"onnxruntime {missing.removesuffix('ExecutionProvider')}" if missing else self.name
        self.threads = threads
        types = {item.name: item.type for item in self.session.get_inputs()}
        names = list(types)
        outputs = {item.name: item.shape for item in self.session.get_outputs()}
        self.outputs = list(outputs)
        self.cache_names = [name for name in names if name.startswith(PAST)]
        self.cache_types = {
            name: _TYPES[types[name].removeprefix("tensor(").removesuffix(")")] for name in self.cache_names
        }
        self.device = "cuda" if placed[0][0] == providers.CUDA else "cpu"  # where a shared cache lies
        # heads and head size stand at the outputs; the inputs leave them open (see target.py)
        present = {name: outputs[name.replace(PAST, PRESENT)] for name in self.cache_names}
        self.cache_shapes = {name: (int(shape[1]), int(shape[3])) for name, shape in present.items()}
        facts = self.session.get_modelmeta().custom_metadata_map
        self.interface = Interface.read(facts[GIVEN]) if GIVEN in facts else None
        self.takes_images = names[0] == "images" or self.interface is not None
        self.image_input = names[0]
        self.image_shape = tuple(self.session.get_inputs()[0].shape[1:]) if self.takes_images else ()
        if self.interface is not None:  # of texts of any length none: they are tried with tokens
            self.image_shape = () if self.interface.is_text and self.interface.length else self.interface.shape
        self.is_decoder = self.outputs[0] == "logits" and not self.takes_images
        self.notes = _notes(facts, missing)

    def feeds(self, ids: NDArray[Any], past: int = 0) -> dict[str, NDArray[Any]]:
        """Inputs for ids (batch, length) after `past` cached tokens, whose keys and values are zero; or for images."""
        if self.interface is not None:
            return self.interface.split(self._rows(ids))
        if self.takes_images:
            return {self.image_input: ids}
        batch, length = ids.shape
        feeds: dict[str, NDArray[Any]] = {"input_ids": ids, "attention_mask": np.ones((batch, past + length), np.int64)}
        for name, (heads, size) in self.cache_shapes.items():
            feeds[name] = np.zeros((batch, heads, past, size), self.cache_types[name])
        return feeds

    def _rows(self, ids: NDArray[Any]) -> NDArray[np.float32]:
        """Of tokens (batch, length), which a text's rows are made of; rows as they are."""
        assert self.interface is not None
        return self.interface.of_tokens(ids) if ids.dtype == np.int64 else ids

    def logits(self, ids: NDArray[Any]) -> NDArray[np.float32]:
        """The first output for ids (batch, length): logits (batch, length, vocabulary), or hidden states; for images
        (batch, channels, h, w) logits (batch, classes), or all outputs of each in a row (`Interface.rows`)."""
        if self.interface is not None:
            return self.interface.rows(lambda inputs: self.session.run(None, inputs), self._rows(ids))
        result: NDArray[np.float32] = self.session.run([self.outputs[0]], self.feeds(ids))[0]
        return result

    def greedy(self, prompt: Sequence[int], count: int, stop: Sequence[int] = ()) -> list[int]:
        """At most `count` tokens after a prompt, the most likely one each time; ends after one of `stop`."""
        cache = self.cache(1, len(prompt) + count)
        return greedy(lambda ids, mask: cache.run(ids, mask)[0, -1], prompt, count, stop)

    def cache(self, batch: int, length: int) -> Cache:
        """An empty cache for rows of about `length` tokens in all."""
        return Shared(self, batch, length) if self.shares_cache else Concatenated(self)

    def cache_use(self) -> tuple[int, int]:
        """Tokens of a sequence as long as the model reads, at most `LONG`, and bytes of its keys and values."""
        tokens = min(probing.LONG, _positions(self.folder))
        each = (a * b * np.dtype(self.cache_types[name]).itemsize for name, (a, b) in self.cache_shapes.items())
        return tokens, tokens * sum(each)

    def call(self, ids: NDArray[Any], past: int) -> Callable[[], None]:
        """One timed call: ids (batch, length) after `past` cached tokens, all outputs computed."""
        if self.interface is not None and self.interface.batch not in (0, len(ids)):

            def again() -> None:
                self.logits(ids)

            return again
        feeds = self.feeds(ids, past)
        if not self.shares_cache:
            return lambda: self.session.run(None, feeds) and None
        cache = Shared(self, len(ids), past + ids.shape[1])
        cache.bind(ids, feeds["attention_mask"])
        return cache.again


def _positions(folder: Path) -> int:
    """Tokens of the longest sequence, by config.json; many where it sets no limit."""
    config = json.loads((folder / "config.json").read_text(encoding="utf8"))
    return int((config.get("text_config") or config).get("max_position_embeddings") or probing.LONG)


def _load(ort: Any, content: str | bytes, options: Any, placed: providers.Providers, path: Path) -> Any:
    try:
        return ort.InferenceSession(content, options, providers=placed)
    except Exception as error:  # onnxruntime raises its own kinds, which share no base but Exception
        raise InputError(f"onnxruntime {ort.__version__} cannot load {path} ({error}).") from error


def _notes(facts: Mapping[str, str], missing: str) -> tuple[str, ...]:
    """What to know of a graph by what stands in it. missing: the provider it is for, where this machine lacks that."""
    reason, wide = facts.get(REASON), facts.get(WIDE)
    return (
        *((f"no {SHARED}: {reason}",) if reason else ()),
        *((f"the graph computes in float32, not in float16: {wide}",) if wide else ()),
        *((providers.note(missing),) if missing else ()),
    )


def _options(ort: Any, threads: int, profile_to: Path | None) -> Any:
    """See Session."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if profile_to is not None:
        options.enable_profiling, options.profile_file_prefix = True, str(profile_to)
    return options


def _exact_graph(path: Path) -> bytes:
    """The graph without its weights, every accuracy level at 0."""
    import onnx

    document = onnx.load(str(path), load_external_data=False)
    for node in document.graph.node:
        for attribute in node.attribute:
            if attribute.name == "accuracy_level":
                attribute.i = 0
    return bytes(document.SerializeToString())


def load_onnxruntime() -> Any:
    """The onnxruntime module. Raises: UnsupportedError naming what to install."""
    try:
        import onnxruntime
    except ImportError as error:
        raise UnsupportedError(
            "onnxruntime is not installed. Install exactly one of onnxruntime-gpu and onnxruntime."
        ) from error
    return onnxruntime
