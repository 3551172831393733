"""Labelled images from files: layouts, splits, leaks, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from compress.errors import CompressError, InputError, UnsupportedError, UsageError
from compress.inputs import images
from compress.inputs.datasets import calibrate, quality_windows, split
from compress.inputs.images import BATCH, Images
from compress.models.loading import load
from compress.models.model import Model


@pytest.fixture(scope="module")
def model(cnn: str) -> Model:
    return load(cnn)


def saved(path: Path, pixels: np.ndarray, labels: np.ndarray | None = None) -> Path:
    np.savez(path, images=pixels, labels=np.arange(len(pixels)) % 5 if labels is None else labels)
    return path


def random_pixels(count: int = 10, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 12, 12, 3), dtype=np.uint8)


def read(path: Path, model: Model) -> Images:
    found = quality_windows(model, path)
    assert isinstance(found, Images)
    return found


def test_channels_may_stand_first_or_last(model: Model, tmp_path: Path) -> None:
    pixels = random_pixels()
    last = read(saved(tmp_path / "last.npz", pixels), model)
    first = read(saved(tmp_path / "first.npz", pixels.transpose(0, 3, 1, 2)), model)
    assert torch.equal(last.pixels, first.pixels) and last.pixels.shape == (10, 3, 12, 12)
    assert last.digest == first.digest
    one = torch.from_numpy(pixels[3, 5, 7].astype(np.float32)) / 255
    expected = (one - torch.tensor([0.5, 0.4, 0.3])) / torch.tensor([0.2, 0.25, 0.3])
    assert torch.allclose(last.inputs(0)[3, :, 5, 7], expected)
    assert last.preprocessing == "(x / 255 - [0.5, 0.4, 0.3]) / [0.2, 0.25, 0.3]"


def test_floats_are_taken_as_the_model_takes_them(model: Model, tmp_path: Path) -> None:
    values = np.random.default_rng(0).normal(size=(6, 3, 12, 12))
    found = read(saved(tmp_path / "floats.npz", values), model)
    assert torch.equal(found.inputs(0), torch.from_numpy(values.astype(np.float32)))
    assert found.preprocessing == "none: stored as floats"


def test_batches_hold_every_image_in_order(model: Model, tmp_path: Path) -> None:
    found = read(saved(tmp_path / "many.npz", random_pixels(BATCH + 5)), model)
    assert [len(batch) for batch in found.batches()] == [BATCH, 5]
    assert torch.equal(torch.cat(found.batches()), found.preprocess(found.pixels))


def test_one_file_is_split_by_image_and_copies_stay_together(model: Model, tmp_path: Path) -> None:
    pixels = np.concatenate([random_pixels(30), random_pixels(30)])  # each image twice
    path = saved(tmp_path / "twice.npz", pixels)
    settings = {"quality_samples": None, "length": 512, "seed": 3}
    calibration, quality = split(model, path, samples=None, **settings)  # type: ignore[arg-type]
    assert isinstance(calibration.windows, Images) and isinstance(quality, Images)
    assert (len(calibration.windows), len(quality)) == (48, 12)
    assert not set(images.fingerprints(calibration.windows)) & set(images.fingerprints(quality))
    again = split(model, path, samples=None, **settings)  # type: ignore[arg-type]
    assert (again[0].windows.digest, again[1].digest) == (calibration.windows.digest, quality.digest)
    fewer = split(model, path, samples=7, quality_samples=4, length=512, seed=3)
    assert (len(fewer[0].windows), len(fewer[1])) == (7, 4)  # type: ignore[arg-type]
    assert calibration.summary()["images"] == 48 and "preprocessing" in calibration.summary()


def test_an_image_in_both_files_is_noticed(model: Model, tmp_path: Path) -> None:
    first = read(saved(tmp_path / "a.npz", random_pixels(6)), model)
    second = read(saved(tmp_path / "b.npz", np.concatenate([random_pixels(4, 1), random_pixels(6)[2:3]])), model)
    with pytest.raises(UsageError, match=r"1 of 5 quality images.*quality image 4"):
        images.check_disjoint(first, second)


def test_calibration_takes_512_images_unless_told_otherwise(model: Model, tmp_path: Path) -> None:
    path = saved(tmp_path / "many.npz", random_pixels(600))
    assert calibrate(model, path).summary()["images"] == 512
    assert calibrate(model, path, samples=20).summary()["images"] == 20


def test_a_folder_per_class_is_read_and_cropped_in_the_middle(model: Model, tmp_path: Path) -> None:
    picture = pytest.importorskip("PIL.Image", reason="pillow is not installed")
    for place, name in enumerate(("ant", "bee")):
        (tmp_path / name).mkdir()
        pixels = np.zeros((12, 24, 3), np.uint8)
        pixels[:, 6:18] = 100 + place
        picture.fromarray(pixels).save(tmp_path / name / "one.png")
    found = read(tmp_path, model)
    assert found.labels.tolist() == [0, 1]
    assert [int(image.min()) for image in found.pixels] == [100, 101]


def test_image_files_without_pillow_say_what_to_install(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "PIL", None)
    (tmp_path / "cats").mkdir()
    (tmp_path / "cats" / "one.png").touch()
    with pytest.raises(UnsupportedError, match="pip install pillow"):
        quality_windows(model, tmp_path)


@pytest.mark.parametrize(
    ("content", "kind", "words"),
    [
        ({"images": random_pixels(), "labels": np.arange(9)}, InputError, "10 images, but labels"),
        ({"images": random_pixels(), "labels": np.full(10, 5)}, InputError, "5 classes"),
        ({"images": random_pixels(), "labels": np.full(10, -1)}, InputError, "-1 to -1"),
        ({"images": random_pixels()[:, :11], "labels": np.zeros(10, int)}, InputError, r"takes .* \(3, 12, 12\)"),
        ({"images": random_pixels().astype(np.int32), "labels": np.zeros(10, int)}, InputError, "int32"),
        ({"images": random_pixels() * np.nan, "labels": np.zeros(10, int)}, InputError, "NaN"),
        ({"images": random_pixels()}, InputError, "no array 'labels'"),
        ({"images": np.array([{}], object), "labels": np.zeros(1, int)}, InputError, "without pickles"),
    ],
)
def test_malformed_images_are_refused_naming_why(
    model: Model, tmp_path: Path, content: dict[str, np.ndarray], kind: type[CompressError], words: str
) -> None:
    np.savez(tmp_path / "bad.npz", **content)
    with pytest.raises(kind, match=words):
        quality_windows(model, tmp_path / "bad.npz")


def test_data_that_are_no_images_are_refused(model: Model, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("words")
    (tmp_path / "torn.npz").write_bytes(b"PK\x03\x04 torn")
    with pytest.raises(UsageError, match="image classifier"):
        quality_windows(model, tmp_path / "text.txt")
    with pytest.raises(UsageError, match="No such data"):
        quality_windows(model, tmp_path / "gone.npz")
    with pytest.raises(InputError, match="cannot be read"):
        quality_windows(model, tmp_path / "torn.npz")
    with pytest.raises(UsageError, match="too few"):
        split(model, saved(tmp_path / "few.npz", random_pixels(4)), samples=2, quality_samples=2, length=2, seed=0)
