"""Outputs of a line of text, and a kill."""

from pathlib import Path

from compress import manifest
from compress.engine.workspace import Workspace

KEEP = (manifest.NAME, "model")


class Killed(BaseException):
    """Stands for a kill -9: nothing of ours catches it."""


def fill(folder: Path, content: str) -> None:
    """A whole artifact of one file."""
    (folder / "model").mkdir(parents=True)
    (folder / "model" / "weights").write_text(content)
    manifest.write(folder, {}, KEEP)


def whole(folder: Path) -> str:
    """The content of an artifact that is complete and holds nothing else."""
    manifest.check_files(folder)
    assert sorted(path.name for path in folder.iterdir()) == sorted(KEEP)
    return (folder / "model" / "weights").read_text()


def begin(out: Path, content: str = "new", overwrite: bool = False) -> Workspace:
    space = Workspace(out, overwrite)
    space.open({"model": "a"}).add("block")
    (space.folder / "scratch").mkdir()
    fill(space.folder, content)
    return space


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())
