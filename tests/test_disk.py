"""A disk that is full, or takes no file so large: what is told, and that no scrap is left."""

from __future__ import annotations

import errno
import resource
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import SafetensorError

import compress
from compress import files
from compress.engine import segment_files
from compress.engine.disk import disk_errors
from compress.errors import ResourceError
from compress.export.checkpoint.writer import ShardWriter
from compress.pipeline import Pipeline


def files_in(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob("*") if path.is_file()]


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """No file of this process may grow beyond a size."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_block_larger_than_files_may_be_is_a_resource_error_and_leaves_no_scrap(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match=r"cannot be written \(File too large\)"), largest_file(8192):
        Pipeline.parse("rtn").run(compress.load(llama), folder=tmp_path / "m")
    assert not files_in(tmp_path / "m")


def test_a_text_that_cannot_be_written_whole_leaves_no_scrap(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="File too large"), largest_file(8192):
        files.write_text(tmp_path / "journal", "x" * 20_000)
    assert not files_in(tmp_path)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", folder], capture_output=True, check=False
    )
    if made.returncode:
        pytest.skip("only root may mount a small file system")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_full_disk_while_a_block_is_written_is_a_resource_error(small_disk: Path) -> None:
    plain = {"x": torch.zeros(1_000_000)}
    with pytest.raises(ResourceError, match="No space left"), disk_errors(small_disk):
        segment_files.write_segment(small_disk, 0, {}, plain)
    assert not files_in(small_disk)


@pytest.mark.parametrize(
    ("text", "raised"),
    [
        ("Error while serializing: I/O error: No space left on device (os error 28)", errno.ENOSPC),
        ("Error while serializing: I/O error: Read-only file system (os error 30)", errno.EROFS),
        ("Error while serializing: something new", None),
    ],
)
def test_the_librarys_errors_of_the_disk_are_told_as_such(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, raised: int | None
) -> None:
    def save_file(*_args: object, **_more: object) -> None:
        raise SafetensorError(text)

    monkeypatch.setattr(segment_files, "save_file", save_file)
    with pytest.raises(OSError if raised else ResourceError, match=r"block-0000\.safetensors") as caught:
        segment_files.write_segment(tmp_path, 0, {}, {})
    assert getattr(caught.value, "errno", None) == raised


def test_scraps_of_a_write_that_was_killed_are_removed_by_the_next(tmp_path: Path) -> None:
    (tmp_path / ".tmpAbCdEf").write_text("x")
    segment_files.write_segment(tmp_path, 0, {}, {"x": torch.zeros(2)})
    assert files_in(tmp_path) == ["block-0000.safetensors"]


def test_a_full_disk_below_temporary_files_is_told_with_its_place(
    small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(small_disk))
    for write in (lambda path: path.write_bytes(bytes(1_000_000)), lambda path: np.zeros(250_000, "f4").tofile(path)):
        with pytest.raises(OSError, match=f"No space left.*{small_disk}/compress-"), files.scratch_folder() as folder:
            write(folder / "x")
    assert not files_in(small_disk)


def test_a_full_disk_while_a_checkpoint_is_written_has_the_systems_error(small_disk: Path) -> None:
    writer = ShardWriter(small_disk)
    writer.add({"x": torch.zeros(1_000_000)})
    with pytest.raises(OSError, match="No space left") as caught:
        writer.finish()
    assert caught.value.errno == errno.ENOSPC


def test_a_full_disk_while_a_folder_is_copied_is_one_error_with_its_number(small_disk: Path, tmp_path: Path) -> None:
    (tmp_path / "model" / "inner").mkdir(parents=True)
    for name in ("a", "inner/b"):
        (tmp_path / "model" / name).write_bytes(bytes(200_000))
    with (
        pytest.raises(ResourceError, match=f"No space left while writing {small_disk}/out"),
        disk_errors(small_disk / "out"),
    ):
        files.copy_folder(tmp_path / "model", small_disk / "out")
    files.copy_folder(tmp_path / "model", tmp_path / "copy")
    assert files_in(tmp_path / "copy") == files_in(tmp_path / "model")
