"""Running an exported folder in OpenVINO on the CPU. Imports numpy and openvino only, so that a child process which
measures memory (`python -m compress.export.openvino.runtime FOLDER`) measures the runtime, not us."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from compress import extras
from compress.errors import InputError, UnsupportedError
from compress.export.openvino.signal_stack import kept_signal_stack
from compress.runtime import probing
from compress.runtime.greedy import greedy

EXTRA = "openvino"
GRAPH, DATA = "openvino_model.xml", "openvino_model.bin"
DEVICE = "CPU"
PRODUCTS = frozenset({"MatMul", "FullyConnected", "Convolution", "FullyConnectedCompressed"})
"""Of OpenVINO's executed graph: what multiplies by weights, or activations by each other."""


class Session:
    """A folder's model, compiled for the CPU in float32 where nothing is quantized: by itself OpenVINO would take
    bfloat16 on processors that have it, which is another model.

    Args: threads of a call; exact: switch its own rounding of the inputs of 4-bit and 8-bit weights off; counts: have
    every call count what its operators take, which slows it.
    Raises: UnsupportedError when openvino is missing or runs elsewhere, InputError when the files do not load.
    """

    def __init__(self, folder: Path, threads: int, *, exact: bool = False, counts: bool = False) -> None:
        ov = load_openvino()
        settings: dict[str, Any] = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": "f32",
            "INFERENCE_NUM_THREADS": threads,
            "ENABLE_CPU_PINNING": False,  # two sessions that are timed in turn would be pinned to the same cores
        }
        if counts:
            settings["PERF_COUNT"] = True
        if exact:
            settings["DYNAMIC_QUANTIZATION_GROUP_SIZE"] = 0
        if not (folder / GRAPH).is_file():
            raise InputError(f"{folder / GRAPH} is missing. Export the model again.")
        started = time.perf_counter()
        try:
            with kept_signal_stack():
                self.compiled = ov.Core().compile_model(str(folder / GRAPH), DEVICE, settings)
        except RuntimeError as error:
            reason = " ".join(str(error).split())
            raise InputError(f"openvino {version()} cannot load {folder / GRAPH} ({reason}).") from error
        self.load_s = time.perf_counter() - started
        self.devices = [str(name) for name in self.compiled.get_property("EXECUTION_DEVICES")]
        if self.devices != [DEVICE]:
            raise UnsupportedError(f"openvino runs {folder / GRAPH} on {', '.join(self.devices)}, not on {DEVICE}.")
        self.name = f"openvino {version()} {DEVICE}"
        self.threads = int(self.compiled.get_property("INFERENCE_NUM_THREADS"))
        self._request = self.compiled.create_infer_request()
        inputs = {item.any_name: item for item in self.compiled.inputs}
        self.outputs = [item.any_name for item in self.compiled.outputs]
        self.cache_shapes = {
            name: (item.partial_shape[1].get_length(), item.partial_shape[3].get_length())
            for name, item in inputs.items()
            if name.startswith("past_key_values.")
        }
        self.takes_images = "images" in inputs
        self.image_shape = (
            tuple(size.get_length() for size in inputs["images"].partial_shape[1:]) if self.takes_images else ()
        )
        self.is_decoder = "logits" in self.outputs and not self.takes_images

    @property
    def kernels(self) -> Counter[str]:
        """Types in which products really run, read back from the compiled model: {"i8": 12, "f32": 3}."""
        return kernels(self.compiled)

    @property
    def notes(self) -> tuple[str, ...]:
        """For the report."""
        found = ", ".join(f"{count} in {kind}" for kind, count in sorted(self.kernels.items()))
        return (f"products as OpenVINO runs them: {found}",)

    def feeds(self, ids: NDArray[Any], past: int = 0) -> dict[str, NDArray[Any]]:
        """Inputs for ids (batch, length) after `past` cached tokens, whose keys and values are zero; or for images."""
        if self.takes_images:
            return {"images": ids}
        batch, length = ids.shape
        mask = np.ones((batch, past + length), np.int64)
        return {"input_ids": ids, "attention_mask": mask, **self.empty_cache(batch, past)}

    def empty_cache(self, rows: int, past: int = 0) -> dict[str, NDArray[Any]]:
        """Keys and values of so many tokens, all zero."""
        shapes = self.cache_shapes.items()
        return {name: np.zeros((rows, heads, past, size), np.float32) for name, (heads, size) in shapes}

    def run(self, feeds: dict[str, NDArray[Any]]) -> dict[str, NDArray[np.float32]]:
        """Every output by name; memory of the runtime, which the next call writes again."""
        self._request.infer(feeds, share_inputs=True)
        return {name: self._request.get_output_tensor(place).data for place, name in enumerate(self.outputs)}

    def counters(self) -> list[Any]:
        """What each node of the last call took, of a session that counts."""
        return list(self._request.get_profiling_info())

    def logits(self, ids: NDArray[Any]) -> NDArray[np.float32]:
        """See compress.target.Session."""
        return np.array(next(iter(self.run(self.feeds(ids)).values())))

    def greedy(self, prompt: Sequence[int], count: int, stop: Sequence[int] = ()) -> list[int]:
        """See compress.target.Session."""
        held = self.empty_cache(1)

        def step(ids: NDArray[np.int64], mask: NDArray[np.int64]) -> Any:
            nonlocal held
            found = self.run({"input_ids": ids, "attention_mask": mask, **held})
            held = self.present(found)
            return found["logits"][0, -1]

        return greedy(step, prompt, count, stop)

    def present(self, found: dict[str, NDArray[np.float32]]) -> dict[str, NDArray[Any]]:
        """What a call put out for the cache, as the next call's inputs."""
        return {name: np.array(found[name.replace("past_key_values.", "present.")]) for name in self.cache_shapes}

    def call(self, ids: NDArray[Any], past: int) -> Callable[[], None]:
        """See compress.target.Session."""
        feeds = self.feeds(ids, past)
        return lambda: self._request.infer(feeds, share_inputs=True) and None


def kernels(compiled: Any) -> Counter[str]:
    """See Session.kernels."""
    found: Counter[str] = Counter()
    for node in compiled.get_runtime_model().get_ordered_ops():
        told = {
            key: str(value.astype(str))
            for key, value in node.get_rt_info().items()
            if key in ("layerType", "runtimePrecision")
        }
        if told.get("layerType") in PRODUCTS:
            found[told["runtimePrecision"]] += 1
    return found


def load_openvino() -> Any:
    """The openvino module. Raises: UnsupportedError naming the extra to install."""
    return extras.load("openvino", "OpenVINO", EXTRA)


def version() -> str:
    """`2026.4.1`, without the build that the module adds."""
    return str(load_openvino().__version__).split("-")[0]


if __name__ == "__main__":
    probing.main(Session)
