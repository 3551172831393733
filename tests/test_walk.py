"""What a walk carries beside the stream of the model as it becomes."""

from pathlib import Path

import pytest
from torch import Tensor

import compress
from compress.collect import Stat
from compress.data import calibrate
from compress.image_stream import ImageStream
from compress.passes import Gptq
from compress.pipeline import Pipeline


def test_an_image_model_is_not_run_for_a_reference_that_nobody_reads(
    cnn: str, images_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = compress.load(cnn)
    calibration = calibrate(model, images_file, samples=32)
    [batch] = calibration.batches()
    logits, streams, calls = ImageStream._logits, set(), []

    def counted(stream: ImageStream, images: Tensor) -> Tensor:
        streams.add(stream)
        calls.append(images)
        return logits(stream, images)

    monkeypatch.setattr(ImageStream, "_logits", counted)
    gptq = Gptq(format="int4(channel)")
    assert Stat.CROSS in gptq.wants
    Pipeline(gptq).run(model, calibration)
    assert len(calls) == 2 and all(images is batch or images.equal(batch) for images in calls)  # statistics, output
    assert [stream.targets for stream in streams] == [[]]
