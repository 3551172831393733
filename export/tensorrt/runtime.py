"""The graph of an engine in ONNX Runtime on the CPU: what can be known of its numbers without the chip.

The same graph, with its types and its rounding; only FP4 weights and bfloat16, for which ONNX Runtime has no kernels,
are float32 with the same numbers (widened.py). Speed here says nothing of the engine, so nothing is timed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from compress.errors import InputError, UnsupportedError
from compress.export.onnx.files import GRAPH
from compress.export.onnx.providers import CPU
from compress.export.onnx.runtime import load_onnxruntime
from compress.export.onnx.slot_session import POSITION, STATE, pretended
from compress.export.tensorrt import slotted
from compress.export.tensorrt.engine import continuing, lacks
from compress.export.tensorrt.record import Record
from compress.export.tensorrt.slotted import PAST
from compress.runtime.greedy import greedy
from compress.target import Placement

MISTAKEN = ["ReluQuantRewrite"]
"""It drops a Relu in front of a QuantizeLinear to FP8, which has negative numbers (onnxruntime 1.31.1)."""
TYPES = {"tensor(float16)": np.float16, "tensor(float)": np.float32, "tensor(int8)": np.int8}


class Session:
    """See compress.target.Session. `built_for` names the engine's runtime, `name` what computes here.

    Args: whole: `logits` reads rows at once, so that slots, where the cache is slots, drop and round nothing of them.
    Raises: InputError when the graph does not load.
    """

    most_rows = 1 << 30

    def __init__(self, folder: Path, kept: Record, threads: int, *, whole: bool = False) -> None:
        self.record, self._folder, self._threads, self._whole = kept, folder, threads, whole
        self.slots = slotted.slots_of(kept.ranges)
        ort = load_onnxruntime()
        options = ort.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        options.log_severity_level = 3
        # its own fusions of Q/DQ round otherwise than the graph says
        options.add_session_config_entry("session.disable_quant_qdq", "1")
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
        try:
            graph = readable(folder)
            self._session = ort.InferenceSession(graph, options, providers=[CPU], disabled_optimizers=MISTAKEN)
        except Exception as error:  # onnx and onnxruntime raise kinds of their own
            raise InputError(f"onnxruntime {ort.__version__} cannot load {folder / GRAPH} ({error}).") from error
        self.level, self.built_for = self.record.level, self.record.runtime
        self.notes = (*self.record.notes, *lacks(self.record))
        self.name = f"onnxruntime {ort.__version__} CPU, the engine's graph"
        self._outputs = [item.name for item in self._session.get_outputs()]
        inputs = self._session.get_inputs()
        self._cache = {
            item.name: ([0 if isinstance(size, str) else int(size) for size in item.shape[1:]], item.type)
            for item in inputs
            if item.name.startswith((PAST, STATE))
        }
        self._images = inputs[0].name == "images"
        self.main = self._outputs[0]
        self.placement = Placement(f"onnxruntime {ort.__version__}", "CPU", threads, f"{folder.name}/{GRAPH}")
        self.is_decoder = self.main == "logits" and not self._images

    @property
    def plain(self) -> Session:
        """The same model, without what slots lose."""
        return Session(self._folder, self.record, self._threads, whole=True) if self.slots is not None else self

    def tokens(self, ids: NDArray[np.int64], mask: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
        """See EngineSession."""
        return dict(slotted.inputs_of(ids, mask, self.slots))

    def empty_cache(self, rows: int) -> dict[str, NDArray[Any]]:
        """See EngineSession."""
        return {
            name: pretended((rows, *shape), 0) if name.endswith(POSITION) else np.zeros((rows, *shape), TYPES[kind])
            for name, (shape, kind) in self._cache.items()
        }

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Inputs → outputs by name."""
        return dict(zip(self._outputs, self._session.run(self._outputs, dict(feeds)), strict=True))

    def host(self, values: NDArray[np.float32]) -> NDArray[np.float32]:
        """They are there already."""
        return values

    def _feeds(self, ids: NDArray[Any]) -> dict[str, NDArray[Any]]:
        if self._images:
            return {"images": ids}
        return self.tokens(ids, np.ones(ids.shape, np.int64)) | self.empty_cache(len(ids))

    def logits(self, ids: NDArray[Any]) -> NDArray[np.float32]:
        """See compress.target.Session. Slots read token by token, unless `whole`."""
        if self.slots is not None and not self._whole:
            return slotted.one_by_one(self, ids)
        found: NDArray[np.float32] = self._session.run([self.main], self._feeds(ids))[0]
        return found

    def greedy(self, prompt: Sequence[int], count: int, stop: Sequence[int] = ()) -> list[int]:
        """See compress.target.Session."""
        return greedy(continuing(self), prompt, count, stop)

    def call(self, ids: NDArray[Any], past: int) -> Callable[[], None]:
        """Raises: UnsupportedError; a time here would be mistaken for the engine's."""
        raise not_timed(self.record.runtime)


def not_timed(runtime: str) -> UnsupportedError:
    """Why there is no figure of speed."""
    return UnsupportedError(f"An engine of {runtime} cannot be timed on this machine: it runs on that chip only.")


def readable(folder: Path) -> bytes:
    """The graph without its weights, for ONNX Runtime: FP4 weights and bfloat16 as the numbers that they stand for."""
    import onnx

    from compress.export.tensorrt.rounded import spell_out
    from compress.export.tensorrt.widened import decode_fp4, widen_bfloat16

    document = onnx.load(str(folder / GRAPH), load_external_data=False)
    spell_out(document)
    decode_fp4(document, folder)
    widen_bfloat16(document, folder)
    return bytes(document.SerializeToString())
