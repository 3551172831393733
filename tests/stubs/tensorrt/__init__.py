"""A stand-in for TensorRT's Python module, for tests on machines without a GPU.

It has no name that the real bindings lack (tests/data/tensorrt_api.json), and refuses what they refuse: no GPU,
networks without types from the graph on 10.x, a timing cache or an engine of another device, shapes outside the ranges,
tensors without a place. What it computes is computed by ONNX Runtime. Environment: STUB_TENSORRT, the version;
STUB_GPU, the device's name (empty: there is none); STUB_SHIFT, added to every float output.
"""

import ctypes
import inspect
import json
import os
from enum import IntEnum
from pathlib import Path

import numpy as np
import onnx
import onnxruntime

__version__ = os.environ["STUB_TENSORRT"]
_TABLE = json.loads((Path(__file__).parents[2] / "data" / "tensorrt_api.json").read_text())
_REAL = next(classes for name, classes in _TABLE.items() if name == f"tensorrt {__version__}")
_SHARED = {"STRONGLY_TYPED": 0 if __version__ >= "11" else 1, "PREFER_JIT_PYTHON_PLUGINS": 2}


def _device():
    return os.environ.get("STUB_GPU", "")


def _enum(name):
    members = [each for each in _REAL[name] if each.isupper() or each[0].isupper()]
    return IntEnum(name, {each: _SHARED.get(each, place + 3) for place, each in enumerate(members)})


BuilderFlag, DataType = _enum("BuilderFlag"), _enum("DataType")
HardwareCompatibilityLevel, TensorIOMode = _enum("HardwareCompatibilityLevel"), _enum("TensorIOMode")
NetworkDefinitionCreationFlag = _enum("NetworkDefinitionCreationFlag")
Severity = IntEnum("Severity", "INTERNAL_ERROR ERROR WARNING INFO VERBOSE", start=0)
_KINDS = {"FLOAT": np.float32, "HALF": np.float16, "INT64": np.int64, "INT32": np.int32}


def _as_real(kind):
    """Check every public name and its parameters against the bindings of this version; what that lacks is removed."""
    real = _REAL[kind.__name__]
    for name in [each for each in vars(kind) if not each.startswith("_")]:
        if name not in real:
            assert any(name in classes[kind.__name__] for classes in _TABLE.values()), f"{kind.__name__}.{name}"
            delattr(kind, name)
        elif inspect.isfunction(vars(kind)[name]):
            taken = list(inspect.signature(vars(kind)[name]).parameters)[1:]
            assert real[name] is not None and len(taken) <= len(real[name]), f"{kind.__name__}.{name}{taken}"
    return kind


@_as_real
class ILogger:
    Severity = Severity

    def __init__(self):
        pass


class Logger(ILogger):
    ERROR = Severity.ERROR

    def __init__(self, min_severity):
        self._lines = []

    def log(self, severity, msg):
        self._lines.append(msg)


@_as_real
class IHostMemory(bytes):
    @property
    def nbytes(self):
        return len(self)


class Network:
    def __init__(self, typed):
        self.typed, self.model = typed, None


@_as_real
class OnnxParser:
    def __init__(self, network, logger):
        self._network = network

    num_errors = 0

    def parse_from_file(self, model):
        self._network.model = onnx.load(model)
        return True


@_as_real
class ITimingCache:
    def __init__(self, content):
        self._content = content

    def serialize(self):
        return IHostMemory(json.dumps(self._content, sort_keys=True).encode())


@_as_real
class IOptimizationProfile:
    def __init__(self):
        self._shapes = {}

    def set_shape(self, input, min, opt, max):
        assert all(a <= b <= c for a, b, c in zip(min, opt, max, strict=True)), input
        self._shapes[input] = [list(min), list(opt), list(max)]


@_as_real
class IBuilderConfig:
    def __init__(self):
        self._profiles, self._cache, self._flags = [], None, {BuilderFlag.TF32}
        self.builder_optimization_level = 3
        self.hardware_compatibility_level = HardwareCompatibilityLevel.NONE

    @property
    def num_optimization_profiles(self):
        return len(self._profiles)

    def set_flag(self, flag):
        self._flags.add(flag)

    def get_flag(self, flag):
        return flag in self._flags

    def add_optimization_profile(self, profile):
        self._profiles.append(profile._shapes)
        return len(self._profiles) - 1

    def create_timing_cache(self, serialized_timing_cache):
        if not serialized_timing_cache:
            return ITimingCache({"version": __version__, "device": _device(), "timed": []})
        try:
            return ITimingCache(json.loads(bytes(serialized_timing_cache)))
        except ValueError:
            return None

    def set_timing_cache(self, cache, ignore_mismatch):
        fits = (cache._content["version"], cache._content["device"]) == (__version__, _device())
        if fits or ignore_mismatch:
            self._cache = cache
        return fits or ignore_mismatch

    def get_timing_cache(self):
        return self._cache


def _two_of_four(graph):
    """The products of a graph with a weight that has, of every four rows that are summed up, two that are zero."""
    weights = {each.name: onnx.numpy_helper.to_array(each) for each in graph.initializer}
    found = []
    for node in graph.node:
        if node.op_type == "Cast" and node.input[0] in weights:
            weights[node.output[0]] = weights[node.input[0]]
        weight = weights.get(node.input[1]) if node.op_type == "MatMul" else None
        if weight is not None and weight.ndim == 2 and len(weight) % 4 == 0:
            runs = weight.reshape(len(weight) // 4, 4, -1) != 0
            found += [node.name] if runs.sum(1).max() <= 2 else []
    return found


@_as_real
class Builder:
    def __init__(self, logger):
        if not _device():
            logger.log(Severity.ERROR, "CUDA initialization failure with error: 35")
            raise TypeError("pybind11::init(): factory function returned nullptr")
        self._logger = logger

    def create_network(self, flags):
        return Network(__version__ >= "11" or bool(flags & 1 << int(NetworkDefinitionCreationFlag.STRONGLY_TYPED)))

    def create_builder_config(self):
        return IBuilderConfig()

    def create_optimization_profile(self):
        return IOptimizationProfile()

    def build_serialized_network(self, network, config):
        if not network.typed:
            self._logger.log(Severity.ERROR, "a graph with types of its own in a weakly typed network")
            return None
        if config._cache is not None:
            timed = config._cache._content["timed"]
            new = sorted({node.op_type for node in network.model.graph.node} - set(timed))
            timed += new
            self._logger.log(Severity.WARNING, f"timed {len(new)} kernels")
        if config.get_flag(BuilderFlag.SPARSE_WEIGHTS):
            sparse = _two_of_four(network.model.graph)
            names = ", ".join(sparse)
            log = self._logger.log
            log(Severity.INFO, f"(Sparsity) Found {len(sparse)} layer(s) eligible to use sparse tactics: {names}")
            log(Severity.INFO, f"(Sparsity) Chose {len(sparse)} layer(s) using sparse tactics: {names}")
        streams = config.get_flag(BuilderFlag.WEIGHT_STREAMING)
        head = {"version": __version__, "device": _device(), "profiles": config._profiles, "streams": streams}
        return IHostMemory(json.dumps(head).encode() + b"\n" + network.model.SerializeToString())


@_as_real
class Runtime:
    def __init__(self, logger):
        self._logger = logger

    def deserialize_cuda_engine(self, serialized_engine):
        head, _, content = bytes(serialized_engine).partition(b"\n")
        found = json.loads(head)
        if (found["version"], found["device"]) != (__version__, _device()):
            self._logger.log(Severity.ERROR, "the engine plan file is not compatible with this version or device")
            return None
        return ICudaEngine(found["profiles"], content, found["streams"])


@_as_real
class ICudaEngine:
    weight_streaming_budget_v2 = 0

    def __init__(self, profiles, content, streams):
        self.streamable_weights_size = len(content) if streams else 0
        graph = onnx.load_from_string(content).graph
        options = onnxruntime.SessionOptions()
        options.add_session_config_entry("session.disable_quant_qdq", "1")
        self._session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        self._profiles, self._values = profiles, {each.name: each for each in (*graph.input, *graph.output)}
        self._ins = [each.name for each in graph.input]

    @property
    def num_optimization_profiles(self):
        return len(self._profiles)

    @property
    def num_io_tensors(self):
        return len(self._values)

    def get_tensor_name(self, index):
        return list(self._values)[index]

    def get_tensor_mode(self, name):
        return TensorIOMode.INPUT if name in self._ins else TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name):
        number = self._values[name].type.tensor_type.elem_type
        return DataType[{"FLOAT16": "HALF"}.get(kind := onnx.TensorProto.DataType.Name(number), kind)]

    def get_tensor_shape(self, name):
        return tuple(each.dim_value or -1 for each in self._values[name].type.tensor_type.shape.dim)

    def get_tensor_profile_shape(self, name, profile_index):
        return self._profiles[profile_index][name]

    def get_weight_streaming_automatic_budget(self):
        return 1

    def create_execution_context(self):
        assert bool(self.streamable_weights_size) == bool(self.weight_streaming_budget_v2)
        return IExecutionContext(self)


@_as_real
class IExecutionContext:
    def __init__(self, engine):
        self._engine, self._shapes, self._places, self._ranges = engine, {}, {}, None

    def set_optimization_profile_async(self, profile_index, stream_handle):
        self._ranges, self._shapes = self._engine._profiles[profile_index], {}
        return isinstance(stream_handle, int)

    def set_input_shape(self, name, shape):
        low, _, high = self._ranges[name]
        self._shapes[name] = tuple(shape)
        return all(a <= size <= b for a, size, b in zip(low, shape, high, strict=True))

    def set_tensor_address(self, name, memory):
        self._places[name] = memory
        return memory != 0

    def infer_shapes(self):
        missing = [name for name in self._engine._ins if name not in self._shapes]
        if not missing:
            self._found, self._is_fresh = self._compute(), True
        return missing

    def _compute(self):
        feeds = {}
        for name in self._engine._ins:
            kind, shape = self._kind(name), self._shapes[name]
            size = int(np.prod(shape)) * np.dtype(kind).itemsize
            feeds[name] = np.frombuffer(ctypes.string_at(self._places[name], size), kind).reshape(shape)
        outputs = [name for name in self._engine._values if name not in self._engine._ins]
        return dict(zip(outputs, self._engine._session.run(outputs, feeds), strict=True))

    def _kind(self, name):
        return _KINDS[self._engine.get_tensor_dtype(name).name]

    def get_tensor_shape(self, name):
        return self._found[name].shape

    def execute_async_v3(self, stream_handle):
        self._found = self._found if self._is_fresh else self._compute()
        self._is_fresh = False
        for name, values in self._found.items():
            told = np.ascontiguousarray(values + np.array(float(os.environ.get("STUB_SHIFT", 0)), values.dtype))
            ctypes.memmove(self._places[name], told.ctypes.data, told.nbytes)
        return True
