"""Convolutions in ONNX Runtime against the model in torch, and what the graph holds of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from compress import hwprofiles
from compress.errors import UnsupportedError
from compress.export import find
from compress.export.onnx import conv
from compress.export.onnx.runtime import Session
from compress.export.onnx.target import capture, plan_layer, write
from compress.formats import parse_format
from compress.layer import LayerKind, LayerSpec
from compress.models.loading import load
from compress.models.model import Model
from compress.models.placing import whole_module
from compress.pipeline import Pipeline
from compress.quality.image_evaluate import probe_images
from compress.quality.verification import verify_export
from compress.target import Refusal

PROFILE = hwprofiles.load("cpu-x86-avx512-vnni")


@pytest.fixture(scope="module")
def model(cnn: str) -> Model:
    return load(cnn)


@pytest.fixture(scope="module")
def graph(model: Model) -> bytes:
    return capture(model, PROFILE)


def test_the_placeholder_carries_the_geometry_of_every_convolution(model: Model, graph: bytes) -> None:
    found = {}
    for node in onnx.load_from_string(graph).graph.node:
        if node.op_type == "Conv":
            assert node.domain == "compress"
            given = {item.name: onnx.helper.get_attribute_value(item) for item in node.attribute}
            layer = given.pop("layer").decode()
            found[layer] = tuple(given[name] for name in sorted(given))
    one, none = [1, 1], [0, 0, 0, 0]
    assert found == {  # dilations, group, kernel, pads, strides
        "stem.0": (one, 1, [3, 3], [1, 1, 1, 1], one),
        "depth": (one, 8, [3, 3], [1, 1, 1, 1], [2, 2]),
        "point": (one, 1, [1, 1], none, one),
        "grouped": ([2, 2], 4, [3, 3], [2, 2, 2, 2], one),
        "twice": (one, 1, [2, 2], [0, 0, 1, 1], one),
    }


@pytest.mark.parametrize(
    "module",
    [
        nn.Conv2d(3, 4, 3),
        nn.Conv2d(3, 4, (3, 2), stride=(2, 3), padding=(1, 0), dilation=(1, 2)),
        nn.Conv2d(4, 8, 3, groups=2, padding="valid", stride=2),
        nn.Conv2d(4, 4, (2, 5), padding="same", dilation=(3, 1), groups=4),
    ],
)
def test_the_shape_of_an_output_is_the_one_that_torch_gives(module: nn.Conv2d) -> None:
    values = torch.zeros(2, module.in_channels, 13, 17)
    assert conv.output_shape(module, values) == tuple(module(values).shape)


def test_an_image_without_a_batch_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="batch, channels"):
        conv.output_shape(nn.Conv2d(3, 4, 3), torch.zeros(3, 8, 8))


@pytest.mark.parametrize("batch", [1, 5])
def test_the_baseline_computes_what_the_users_module_does(
    model: Model, graph: bytes, tmp_path: Path, batch: int
) -> None:
    write(model, PROFILE, tmp_path, graph)
    images = probe_images(model)[:batch]
    assert model.image is not None
    with torch.no_grad():
        expected = model.image.factory.build()(images).numpy()
    assert np.allclose(Session(tmp_path, 1).logits(images.numpy()), expected, rtol=1e-3, atol=1e-3)


FORMATS = [
    "int8(channel)",
    "int4(channel)",
    "int5(tensor)",
    "int4(group=16)",
    "int3(group=7, asymmetric)",
    "int8(group=9)",
]


@pytest.mark.parametrize("text", FORMATS)
def test_integer_weights_of_convolutions_agree_and_take_the_bytes_that_were_told(
    model: Model, graph: bytes, tmp_path: Path, text: str
) -> None:
    made = Pipeline.parse(f"rtn(format={text}, targets=[kind:conv])").run(model).model
    lowered = write(made, PROFILE, tmp_path, graph)
    assert lowered.operators == {"Cast+Mul+Conv": 5, "MatMul": 1}
    found = verify_export(made, tmp_path, PROFILE, probe_images(made), lowered.bounds)
    assert found.agrees and found.max_relative_difference < 1e-4 and found.positions == 512
    assert found.greedy_tokens == ()
    weights = onnx.load(str(tmp_path / "model.onnx")).graph.initializer
    stored = {
        name: sum(_nbytes(each) for each in weights if each.name.startswith((f"{name}.weight", f"{name}.bias")))
        for name in made.structure.layers
    }
    for name, spec in made.structure.layers.items():
        choice = plan_layer(spec, PROFILE)
        assert not isinstance(choice, Refusal) and choice.stored_bytes == stored[name], name
        assert choice.kernel == ("works" if spec.kind is LayerKind.CONV else "fast")


def _nbytes(tensor: onnx.TensorProto) -> int:
    return len(onnx.numpy_helper.to_array(tensor).tobytes()) if not _is_narrow(tensor) else len(tensor.raw_data)


def _is_narrow(tensor: onnx.TensorProto) -> bool:
    return tensor.data_type in (onnx.TensorProto.INT4, onnx.TensorProto.UINT4)


def test_the_runtime_decodes_when_it_loads_and_not_on_every_call(model: Model, graph: bytes, tmp_path: Path) -> None:
    made = Pipeline.parse("rtn(format=int4(group=16), targets=[kind:conv])").run(model).model
    write(made, PROFILE, tmp_path, graph)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), options, providers=["CPUExecutionProvider"])
    left = {node.op_type for node in onnx.load(str(tmp_path / "optimized.onnx"), load_external_data=False).graph.node}
    assert "Conv" in left or "FusedConv" in left
    assert not left & {"Cast", "Mul", "Slice", "DequantizeLinear"}


def test_formats_and_inputs_that_no_convolution_takes_are_refused(model: Model) -> None:
    spec = model.structure.layers["point"]
    other = plan_layer(replace(spec, format=parse_format("fp8_e4m3(channel)")), PROFILE)
    assert isinstance(other, Refusal) and "integer grids" in other.reason
    from compress.layer import ActSpec

    dynamic = replace(spec, format=parse_format("int8(channel)"), act=ActSpec(parse_format("int8(tensor, asymmetric)")))
    refused = plan_layer(dynamic, PROFILE)
    assert isinstance(refused, Refusal) and "conv" in refused.reason


def test_the_prediction_is_close_to_what_is_written(model: Model, graph: bytes, tmp_path: Path) -> None:
    lowered = write(model, PROFILE, tmp_path, graph)
    target = find("onnx")
    predicted = target.predict_bytes(model.structure.layers.values(), model, PROFILE)
    assert sum(path.stat().st_size for path in lowered.folder.iterdir()) == pytest.approx(predicted, rel=0.1)


def test_a_session_says_that_it_takes_images_and_times_them(model: Model, graph: bytes, tmp_path: Path) -> None:
    write(model, PROFILE, tmp_path, graph)
    session = Session(tmp_path, 1)
    assert session.takes_images and not session.is_decoder
    assert session.call(np.zeros((3, 3, 12, 12), np.float32), 0)() is None
    kept = (tmp_path / "preprocessing.json").read_text()
    assert '"mean": [' in kept and '"classes": 5' in kept


def test_half_precision_weights_stay_half_on_disk(tmp_path: Path) -> None:
    path = tmp_path / "half.py"
    path.write_text(
        "import torch\nfrom torch import nn\n\n\ndef make():\n    torch.manual_seed(0)\n"
        "    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 3)).half()\n\n\n"
        "def sample_inputs(batch=2):\n    return torch.randn(batch, 3, 8, 8)\n"
    )
    made = load(f"{path}:make")
    lowered = write(made, PROFILE, tmp_path / "onnx")
    kinds = {tensor.data_type for tensor in onnx.load(str(tmp_path / "onnx" / "model.onnx")).graph.initializer}
    assert onnx.TensorProto.FLOAT16 in kinds and onnx.TensorProto.FLOAT not in kinds
    assert verify_export(made, lowered.folder, PROFILE, probe_images(made), lowered.bounds).agrees
    assert whole_module(made)(torch.zeros(1, 3, 8, 8)).dtype == torch.float32


def test_a_weight_is_seen_as_stored() -> None:
    spec = LayerSpec("c", LayerKind.CONV, (8, 36), ("c",), kernel=(4, 3, 3), groups=2)
    assert conv.weight_shape(spec) == (8, 4, 3, 3)
