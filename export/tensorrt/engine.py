"""An engine on the GPU that it was built for, through the Python API that TensorRT 10, 11 and TensorRT-RTX share."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from compress.errors import InputError, ResourceError, UnsupportedError
from compress.export.onnx.slot_session import POSITION, STATE, pretended
from compress.export.tensorrt import flavours, gpu, slotted
from compress.export.tensorrt.builder import make_logger
from compress.export.tensorrt.record import Record, read
from compress.export.tensorrt.slotted import PAST, Slots
from compress.runtime import probing
from compress.runtime.greedy import Step, greedy
from compress.target import Placement

DTYPES = {
    "FLOAT": torch.float32,
    "HALF": torch.float16,
    "BF16": torch.bfloat16,
    "INT8": torch.int8,
    "INT32": torch.int32,
    "INT64": torch.int64,
    "BOOL": torch.bool,
    "UINT8": torch.uint8,
}
IMAGES = "images"


def misfit(kept: Record) -> str:
    """Why the engine of a folder does not run here; empty where it does. Engines are for one version of the library
    and one kind of GPU."""
    if not kept.engine:
        return "No engine was built."
    problem = flavours.lacking(kept.flavour, kept.sm)
    if problem:
        return problem
    version = str(flavours.load_module(kept.flavour).__version__)
    if version != kept.version:
        return f"{kept.engine} is for {kept.builder}; {version} is installed here."
    if kept.device and kept.device != gpu.name():
        return f"{kept.engine} was built on {kept.device}; the GPU here is {gpu.name()}."
    return ""


def lacks(kept: Record) -> tuple[str, ...]:
    """For the report, where a folder's engine does not run here: what this machine lacks for it."""
    problem = misfit(kept) if kept.engine else flavours.lacking(flavours.FULL, kept.sm)
    return (f"What this machine lacks for it: {problem}",) if problem else ()


class EngineSession:
    """See compress.target.Session: the engine itself, so that what agrees here is what will be deployed.

    Inputs and outputs lie in the GPU's memory, the cache stays there between calls. `load_s`: seconds to read the
    engine and make what runs it. Raises: InputError where the engine does not load, ResourceError where the GPU has no
    room for it.

    Args: plain: makes what stands for the same model without what slots lose (the graph on the CPU).
    """

    level = "ran"

    def __init__(self, folder: Path, kept: Record, plain: Callable[[], Any] | None = None) -> None:
        self._plain = plain
        self._log: list[str] = []
        self._trt = trt = flavours.load_module(kept.flavour)
        self._free_bytes, started = gpu.free_bytes(), time.perf_counter()
        self._logger = make_logger(trt, self._log)  # TensorRT keeps no reference of its own
        self._runtime = trt.Runtime(self._logger)
        self._engine = self._runtime.deserialize_cuda_engine((folder / kept.engine).read_bytes())
        if self._engine is None:
            raise InputError(f"{kept.builder} cannot load {folder / kept.engine} ({self._reason()}). Build it again.")
        if self._engine.streamable_weights_size:
            self._engine.weight_streaming_budget_v2 = self._engine.get_weight_streaming_automatic_budget()
        self._context = self._engine.create_execution_context()
        if self._context is None:
            raise ResourceError(f"{gpu.name()} has no room to run {folder / kept.engine} ({self._reason()}).")
        self.load_s = time.perf_counter() - started
        self._buffers, self._profile, self._bindings = gpu.Buffers(), -1, 0
        self._spare = self._buffers.zeros((256,), torch.uint8)
        names = [self._engine.get_tensor_name(place) for place in range(self._engine.num_io_tensors)]
        kinds = {name: self._engine.get_tensor_mode(name) for name in names}
        self._inputs = [name for name in names if kinds[name] == trt.TensorIOMode.INPUT]
        self._outputs = [name for name in names if kinds[name] == trt.TensorIOMode.OUTPUT]
        self._cache = [name for name in self._inputs if name.startswith((PAST, STATE))]
        self.slots: Slots | None = slotted.slots_of(kept.ranges)
        # by profile: input → smallest and largest shape
        self._ranges = [self._range(place) for place in range(self._engine.num_optimization_profiles)]
        shape = self._engine.get_tensor_shape(IMAGES)[1:] if IMAGES in self._inputs else ()
        self.image_shape = tuple(int(size) for size in shape)  # (channels, h, w); empty for token ids
        self.main = next(name for name in self._outputs if not slotted.is_after(name))
        self.is_decoder = self.main == "logits" and not self.image_shape
        self.name = f"{kept.builder} on {gpu.name()}"
        self.placement = Placement(kept.builder, gpu.name(), 1, f"{folder.name}/{kept.engine}")
        self.notes = (*kept.built, f"The engine ran on {gpu.name()}.")

    @property
    def plain(self) -> Any:
        """See the argument; without slots the engine itself. What says how far it got is the engine's: slots are
        compared with it (`Target.compare_graphs`)."""
        if self.slots is None or self._plain is None:
            return self
        found = self._plain()
        found.level, found.built_for, found.notes = self.level, self.name, self.notes
        return found

    @property
    def most_rows(self) -> int:
        """Rows that it takes at once."""
        return max(int(ranges[self._inputs[0]][1][0]) for ranges in self._ranges)

    def peak_memory(self) -> int:
        """Bytes of the GPU's memory that were taken since before the engine was loaded, by whatever program. What calls
        took is kept for the next ones, so this is the most so far."""
        return max(0, self._free_bytes - gpu.free_bytes())

    def _reason(self) -> str:
        return self._log[-1] if self._log else "it does not say why"

    def _range(self, profile: int) -> dict[str, tuple[list[int], list[int]]]:
        found = {}
        for name in self._inputs:
            low, _, high = self._engine.get_tensor_profile_shape(name, profile)
            found[name] = list(low), list(high)
        return found

    def logits(self, ids: NDArray[Any]) -> NDArray[np.float32]:
        """See compress.target.Session. More rows than the engine takes at once go through it in turn; slots read token
        by token."""
        parts = [ids[start : start + self.most_rows] for start in range(0, len(ids), self.most_rows)]
        if self.slots is not None:
            return np.concatenate([slotted.one_by_one(self, part) for part in parts])
        return np.concatenate([self.host(self.run(self._feeds(part))[self.main]) for part in parts])

    def greedy(self, prompt: Sequence[int], count: int, stop: Sequence[int] = ()) -> list[int]:
        """See compress.target.Session."""
        return greedy(continuing(self), prompt, count, stop)

    def call(self, ids: NDArray[Any], past: int) -> Callable[[], None]:
        """See compress.target.Session: the engine alone, from inputs that lie in the GPU's memory to outputs there; it
        returns when the GPU is done. The cache of `past` tokens is zero. Raises: as `run`."""
        if self.slots is not None and ids.shape[1] > self.slots.chunk:
            return self._in_turn(ids, past)
        feeds = self._feeds(ids, past)
        found = self._bind(feeds)
        binding = self._bindings

        def once() -> None:
            nonlocal binding
            if binding != self._bindings:  # something else ran meanwhile
                self._bind(feeds, found)
                binding = self._bindings
            self._execute()

        return once

    def _in_turn(self, ids: NDArray[Any], past: int) -> Callable[[], None]:
        """`call` of more tokens than slots take at once, piece by piece, each with the slots that the last one left."""
        assert self.slots is not None
        mask, empty = np.ones((len(ids), past + ids.shape[1]), np.int64), self.empty_cache(len(ids), past)
        starts = range(0, ids.shape[1], self.slots.chunk)
        ends = [min(start + self.slots.chunk, ids.shape[1]) for start in starts]
        pieces = [self.tokens(ids[:, a:b], mask[:, : past + b]) for a, b in zip(starts, ends, strict=True)]

        def all_pieces() -> None:
            cache = empty
            for tokens in pieces:
                cache = slotted.present(self.run({**tokens, **cache}), cache)

        return all_pieces

    def tokens(self, ids: NDArray[np.int64], mask: NDArray[np.int64]) -> dict[str, Tensor]:
        """Inputs but for the cache: ids (batch, length), mask (batch, past + length)."""
        return self._put(slotted.inputs_of(ids, mask, self.slots))

    def empty_cache(self, rows: int, past: int = 0) -> dict[str, Tensor]:
        """Keys and values of so many tokens, all zero."""
        found = {}
        for name in self._cache:
            shape = rows, *(int(size) for size in self._engine.get_tensor_shape(name)[1:])
            if name.endswith(POSITION):
                found[name] = self._buffers.put(pretended(shape, past))
            else:
                shape = shape if self.slots is not None else (*shape[:2], past, shape[3])
                found[name] = self._buffers.zeros(shape, self._dtype(name))
        return found

    def host(self, values: Tensor) -> NDArray[np.float32]:
        """A copy in this machine's memory."""
        found: NDArray[np.float32] = values.float().cpu().numpy()
        return found

    def _put(self, values: Mapping[str, NDArray[Any]]) -> dict[str, Tensor]:
        return {name: self._buffers.put(np.ascontiguousarray(value)) for name, value in values.items()}

    def _feeds(self, ids: NDArray[Any], past: int = 0) -> dict[str, Tensor]:
        if self.image_shape:
            return self._put({IMAGES: ids})
        batch, length = ids.shape
        return self.tokens(ids, np.ones((batch, past + length), np.int64)) | self.empty_cache(batch, past)

    def _dtype(self, name: str) -> torch.dtype:
        return DTYPES[self._engine.get_tensor_dtype(name).name]

    def run(self, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """One call: inputs → outputs, all on the GPU. Raises: UnsupportedError for shapes that the engine does not
        take; ResourceError where it fails."""
        found = self._bind(feeds)
        self._execute()
        return found

    def _bind(self, feeds: Mapping[str, Tensor], found: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Tell the engine shapes and places. found: where its outputs go [default: new ones]. The caller keeps both
        alive until the call is done."""
        self._select(feeds)
        self._bindings += 1
        for name, value in feeds.items():
            self._demand(self._context.set_input_shape(name, tuple(value.shape)), f"the shape of {name}")
            self._demand(self._context.set_tensor_address(name, self._address(value)), f"the place of {name}")
        unknown = self._context.infer_shapes()
        self._demand(not unknown, f"what it was given: {', '.join(unknown)} lacks")
        outputs = self._new_outputs() if found is None else found
        for name, value in outputs.items():
            self._demand(self._context.set_tensor_address(name, self._address(value)), f"the place of {name}")
        return outputs

    def _new_outputs(self) -> dict[str, Tensor]:
        found = {}
        for name in self._outputs:
            shape = tuple(int(size) for size in self._context.get_tensor_shape(name))
            found[name] = self._buffers.empty(shape, self._dtype(name))
        return found

    def _execute(self) -> None:
        self._demand(self._context.execute_async_v3(self._buffers.stream), "the call")
        self._buffers.wait()

    def _address(self, value: Tensor) -> int:
        """Tensors without elements, as a cache of no tokens, have none; TensorRT wants one of each."""
        return value.data_ptr() or self._spare.data_ptr()

    def _select(self, feeds: Mapping[str, Tensor]) -> None:
        """The optimization profile whose ranges hold the shapes."""
        shapes = {name: tuple(value.shape) for name, value in feeds.items()}
        fits = [place for place, ranges in enumerate(self._ranges) if _holds(ranges, shapes)]
        if not fits:
            told = ", ".join(f"{name} {'x'.join(map(str, shape))}" for name, shape in shapes.items())
            raise UnsupportedError(f"The engine has no range of shapes for {told}; tensorrt.json tells those it has.")
        if self._profile not in fits:
            self._demand(self._context.set_optimization_profile_async(fits[0], self._buffers.stream), "its ranges")
            self._buffers.wait()
            self._profile = fits[0]

    def _demand(self, done: bool, what: str) -> None:
        if not done:
            raise ResourceError(f"{self.name} did not accept {what} ({self._reason()}).")


def _holds(ranges: Mapping[str, tuple[list[int], list[int]]], shapes: Mapping[str, Sequence[int]]) -> bool:
    for name, shape in shapes.items():
        low, high = ranges[name]
        if len(shape) != len(low) or any(not a <= size <= b for a, size, b in zip(low, shape, high, strict=True)):
            return False
    return True


def continuing(session: Any) -> Step:
    """Steps of one row through a session of this folder; the cache stays wherever the session computes."""
    held = session.empty_cache(1)

    def step(ids: NDArray[np.int64], mask: NDArray[np.int64]) -> Any:
        for found in slotted.read(session, ids, mask, held):
            last = found[0, -1]
        return last

    return step


def _probed(folder: Path, _: int) -> EngineSession:
    """What `Target.probe_command` loads."""
    return EngineSession(folder, read(folder))


if __name__ == "__main__":
    probing.main(_probed)
