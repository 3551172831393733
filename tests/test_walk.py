"""What a walk carries beside the stream of the model as it becomes."""

import weakref
from pathlib import Path

import pytest
from torch import Tensor

import compress
from compress.engine.image_stream import ImageStream
from compress.engine.layer_stats import Stat
from compress.engine.walk import Walk
from compress.inputs.datasets import calibrate
from compress.layer import Layer
from compress.models.model import Model
from compress.models.skeleton import OUTER
from compress.passes import Gptq
from compress.pipeline import Pipeline


def test_an_image_model_is_not_run_for_a_reference_that_nobody_reads(
    cnn: str, images_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = compress.load(cnn)
    calibration = calibrate(model, images_file, samples=32)
    [batch] = calibration.batches()
    call, streams, calls = ImageStream.call, set(), []

    def counted(stream: ImageStream, index: int, images: Tensor) -> Tensor:
        streams.add(stream)
        calls.append(images)
        return call(stream, index, images)

    monkeypatch.setattr(ImageStream, "call", counted)
    gptq = Gptq(format="int4(channel)")
    assert Stat.CROSS in gptq.wants
    Pipeline(gptq).run(model, calibration)
    assert len(calls) == 2 and all(images is batch or images.equal(batch) for images in calls)  # statistics, output
    assert [stream.targets for stream in streams] == [[]]


def test_the_embedding_takes_no_memory_while_blocks_are_compressed(
    llama: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = compress.load(llama)
    data = calibrate(model, text_file, samples=4, length=16)
    layers, block, seen, alive = Model.layers, Walk._block, list[weakref.ref[Layer]](), list[object]()

    def noted(one: Model, segment: int) -> dict[str, Layer]:
        found = layers(one, segment)
        seen.extend(weakref.ref(layer) for layer in found.values() if segment == OUTER)
        return found

    def counted(walk: Walk, index: int) -> None:
        assert walk.stream is not None
        alive.append(walk.stream.module.get_submodule("model.embed_tokens").weight.device.type)
        alive.append([layer.name for ref in seen if (layer := ref()) is not None])
        block(walk, index)

    monkeypatch.setattr(Model, "layers", noted)
    monkeypatch.setattr(Walk, "_block", counted)
    made = Pipeline.parse("gptq(format=int4(group=16))").run(model, data).model
    assert seen and alive == ["meta", []] * len(model.structure.blocks)
    for name in (spec.name for spec in model.structure.segment_layers(OUTER)):
        found, wanted = (each.layer(each.structure.layers[name]).float_weight() for each in (made, model))
        assert found.equal(wanted)
