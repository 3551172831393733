"""Kills at any point of a replacement, and renames that fail."""

import errno
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from compress import manifest
from compress.engine import workspace
from compress.engine.workspace import Workspace
from compress.errors import UsageError
from helpers.workspaces import KEEP, Killed, begin, fill, names, whole


@contextmanager
def killed_at(monkeypatch: pytest.MonkeyPatch, step: int) -> Iterator[None]:
    """A kill just before the `step`-th change of the file system: no clean-up of ours can do any more."""
    count = 0

    def counted(name: str) -> Callable[..., object]:
        real = getattr(Path, name)

        def call(*args: object, **more: object) -> object:
            nonlocal count
            count += 1
            if count > step:
                raise Killed
            return real(*args, **more)

        return call

    with monkeypatch.context() as patch:
        for name in ("rename", "replace", "unlink", "rmdir", "mkdir", "write_text", "open"):
            patch.setattr(Path, name, counted(name))
        patch.setattr(workspace, "_remove", _remove_in_steps)
        yield


def _remove_in_steps(entry: Path) -> None:
    """As rmtree does it, but of calls that count."""
    if not entry.is_dir():
        entry.unlink()
        return
    for inner in sorted(entry.iterdir()):
        _remove_in_steps(inner)
    entry.rmdir()


def drop_lock(space: Workspace) -> None:
    """What the end of a process does to its lock."""
    if space._lock is not None:
        space._lock.close()


def test_a_kill_at_any_point_of_a_replacement_leaves_the_old_or_the_new_output_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    for step in range(60):
        out = tmp_path / f"{step}" / "out"
        begin(out, "old").commit(KEEP)
        space = begin(out, "new", overwrite=True)
        try:
            with killed_at(monkeypatch, step):
                space.commit(KEEP)
        except Killed:
            drop_lock(space)
        else:
            break
        with pytest.raises(UsageError, match="exists"), Workspace(out) as again:
            again.open({"model": "b"})
        seen.append(whole(out))
        assert not (out.parent / "out.replaced").exists()
        if seen[-1] == "new":
            assert names(out.parent) == ["out"]
            continue
        with Workspace(out, overwrite=True) as resumed:
            resumed.open({"model": "a"})
            if not (resumed.folder / manifest.NAME).exists():
                fill(resumed.folder, "new")
            resumed.commit(KEEP)
        assert whole(out) == "new" and names(out.parent) == ["out"]
    assert seen == sorted(seen, reverse=True) and {"old", "new"} == set(seen) and len(seen) > 8


def test_a_kill_at_any_point_of_the_settling_leaves_the_old_or_the_new_output_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for absent in (True, False):
        for step in range(60):
            out = tmp_path / f"{absent}{step}" / "out"
            fill(out.with_name("out.replaced"), "old")
            fill(out.with_name("out.partial") if absent else out, "new")
            first = Workspace(out, overwrite=True)
            with suppress(Killed), killed_at(monkeypatch, step):
                first.open({"model": "a"})
            drop_lock(first)
            with pytest.raises(UsageError, match="exists"), Workspace(out) as again:
                again.open({"model": "a"})
            assert whole(out) == ("old" if absent else "new")
            assert "out.replaced" not in names(out.parent)
            if first._journal is not None:
                break
        assert step > 3 and first._journal is not None


def test_what_is_left_of_a_deleted_output_is_never_restored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = tmp_path / "out.replaced"
    fill(old, "old")
    with pytest.raises(Killed), killed_at(monkeypatch, 2):
        workspace.discard(old)
    assert old.exists() and not (old / "model" / "weights").exists()
    with Workspace(tmp_path / "out") as space:
        space.open({"model": "a"})
        assert not (tmp_path / "out").exists() and not old.exists()


def test_a_rename_that_fails_puts_the_old_output_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begin(tmp_path / "out", "old").commit(KEEP)
    real = Path.rename

    def rename(self: Path, target: Path) -> Path:
        if self.name == "out.partial":
            raise OSError(errno.EIO, "broken")
        return real(self, target)

    with (
        pytest.raises(OSError, match="broken"),
        begin(tmp_path / "out", overwrite=True) as space,
        monkeypatch.context() as patch,
    ):
        patch.setattr(Path, "rename", rename)
        space.commit(KEEP)
    assert whole(tmp_path / "out") == "old"
