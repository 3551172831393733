"""`OUT.partial/`: lock, fingerprint, journal, and the renames that make an output complete or absent (design §3).

Beside an output `OUT` there may be, and only while a run works or after one was killed: `OUT.partial.lock`;
`OUT.partial/`, what is unfinished; `OUT.replaced/`, the output that --overwrite is about to replace. `Workspace.open`
settles what a kill left of the last one.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import IO

from compress import manifest
from compress.engine.disk import disk_errors
from compress.engine.journal import Journal
from compress.errors import CompressError, Interrupted, ResourceError, UsageError
from compress.files import read_json, sync_file, write_text

FINGERPRINT = "fingerprint.json"
JOURNAL = "journal.jsonl"
DISCARDED = "discarded-by-compress"
# Values of a fingerprint up to this length are told; digests are not worth reading.
LONGEST_TOLD = 60


class Workspace:
    """The staging folder of one output. As a context: abandons it on a user's error, and lets go of the lock.

    Raises: UsageError for an output that has no name of its own, such as `.` or `/`.
    """

    def __init__(self, out: Path, overwrite: bool = False) -> None:
        if out.name in ("", ".."):
            raise UsageError(f"-o {out} has no name of its own. Name a folder, such as -o {out / 'compressed'}.")
        self.out = out
        self.folder = out.with_name(out.name + ".partial")
        self.replaced = out.with_name(out.name + ".replaced")
        self.overwrite = overwrite
        self._lock_path = out.with_name(out.name + ".partial.lock")
        self._lock: IO[str] | None = None
        self._journal: Journal | None = None
        self._removable = False

    def __enter__(self) -> Workspace:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, CompressError) and not isinstance(error, Interrupted):
            self.abandon()
        self.close()

    def open(self, fingerprint: Mapping[str, str]) -> Journal:
        """Make or resume the staging folder.

        Raises: UsageError when the output exists and may not be replaced, another run holds the lock, or the folder
        belongs to a different run; ResourceError when the place cannot be written.
        """
        with disk_errors(self.folder):
            _make_parent(self.out)
            self._take_lock()
            self._settle()
            if reason := self._refusal():
                advice = "Move it away" if self.overwrite else "Add --overwrite to replace it once the new one is done"
                raise UsageError(f"{reason} {advice}, or give another -o.")
            self._prepare(fingerprint)
            self._journal = Journal(self.folder / JOURNAL)
        return self._journal

    def spare(self, *sources: object) -> None:
        """Raises: UsageError where one of these, which may be None or no path, would go with a replaced output."""
        out = os.path.realpath(self.out)  # which, unlike `resolve`, bears a ring of links
        for text in [str(source) for source in sources if source is not None] if self.overwrite else ():
            for path in (Path(text), Path(text.partition(":")[0])):  # such as net.py:make
                if path.exists() and Path(out) in Path(os.path.realpath(path)).parents:
                    raise UsageError(
                        f"{path} lies in {self.out}, which --overwrite deletes. Copy it elsewhere, or give another -o."
                    )

    def _take_lock(self) -> None:
        """Lock a file beside the folder, which itself is renamed before the work is over."""
        while True:
            try:
                lock = self._lock_path.open("a")
            except FileNotFoundError as error:  # /proc and its like hold no files of ours
                raise ResourceError(f"{self.out.parent} cannot be written. Give an -o that can.") from error
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                lock.close()
                raise UsageError(f"Another run is writing {self.out}. Wait for it, or give another -o.") from error
            except OSError as error:
                lock.close()
                raise ResourceError(
                    f"{self.out.parent} is on a file system that locks no files ({error.strerror}): two runs could "
                    "write the same output. Give an -o on another one."
                ) from error
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(lock.fileno()), self._lock_path.stat()):
                    self._lock = lock
                    return
            lock.close()  # the run that held it has removed this file since it was opened: it locks nothing any more

    def _settle(self) -> None:
        """Undo a replacement that was killed before its last rename; finish one that was killed after it."""
        self._restore()
        if _is_leftover(self.replaced) and (is_artifact(self.out) or not os.path.lexists(self.out)):
            discard(self.replaced)

    def _restore(self) -> None:
        if is_artifact(self.replaced) and not os.path.lexists(self.out):
            self.replaced.rename(self.out)

    def _refusal(self) -> str:
        """Why the output may not be put in its place, or ''."""
        if not os.path.lexists(self.out) or (self.overwrite and _is_empty(self.out)):
            return ""
        if not self.overwrite:
            return f"{self.out} exists."
        if not is_artifact(self.out):
            return f"{self.out} is no folder with a {manifest.NAME} of compress, so --overwrite does not replace it."
        if os.path.lexists(self.replaced):
            return f"{self.replaced}, which compress did not make, is in the way of --overwrite."
        return ""

    def _prepare(self, fingerprint: Mapping[str, str]) -> None:
        path = self.folder / FINGERPRINT
        if path.is_file():
            self._compare(_read_fingerprint(path), fingerprint)
            self._removable = True
            return
        if os.path.lexists(self.folder):
            if not _is_leftover(self.folder):
                raise UsageError(f"{self.folder} holds no unfinished run. Move it away, or give another -o.")
            discard(self.folder)
        self.folder.mkdir()
        self._removable = True
        write_text(path, json.dumps(dict(fingerprint), indent=1, sort_keys=True) + "\n")

    def _compare(self, before: Mapping[str, str], now: Mapping[str, str]) -> None:
        changed = [key for key in sorted({*before, *now}) if before.get(key) != now.get(key)]
        if not changed:
            return
        told = [(key, before.get(key, "absent"), now.get(key, "absent")) for key in changed]
        short = [f"{key} was {old}, is {new}" for key, old, new in told if max(len(old), len(new)) <= LONGEST_TOLD]
        raise UsageError(
            f"{self.folder} holds an unfinished run that differs in: {', '.join(changed)}"
            f"{' (' + '; '.join(short) + ')' if short else ''}. "
            f"Repeat the same command to resume it, or remove {self.folder} to start anew."
        )

    def abandon(self) -> None:
        """Remove the staging folder where nothing in it is worth a resume, so that it blocks no other run."""
        if self._removable and not (self._journal and self._journal.steps):
            with suppress(OSError):  # the error that ended the run is the one to tell
                discard(self.folder)

    def commit(self, keep: tuple[str, ...]) -> None:
        """Sync everything named in `keep`, drop the rest, rename to the output.

        Raises: UsageError when an output that may not be replaced has appeared; the result then stays in the folder.
        """
        self._removable = False
        for entry in sorted(self.folder.iterdir()):
            if entry.name not in (*keep, JOURNAL, FINGERPRINT):
                _remove(entry)
        for path in sorted(self.folder.rglob("*")):
            sync_file(path)
        if reason := self._refusal():
            raise UsageError(
                f"{reason} It was not so when this run began. The finished result is kept in {self.folder}. "
                f"Move {self.out} away{'' if self.overwrite else ' or add --overwrite'}, then repeat the command."
            )
        for name in (JOURNAL, FINGERPRINT):
            (self.folder / name).unlink(missing_ok=True)
        sync_file(self.folder)
        self._swap()
        self.close()

    def _swap(self) -> None:
        replaces = is_artifact(self.out)
        if replaces:
            self.out.rename(self.replaced)
        self.folder.rename(self.out)  # an empty folder gives way to it
        sync_file(self.out.parent)
        if replaces:
            discard(self.replaced)

    def close(self) -> None:
        """Let go of the lock."""
        if self._lock is None:
            return
        with suppress(OSError):  # as in `abandon`; the next run settles what stays
            self._restore()
            self._lock_path.unlink()  # while it is held; `_take_lock` sees that it is gone
        self._lock.close()
        self._lock = None


def is_artifact(folder: Path) -> bool:
    """Whether it is a folder, no link, with a manifest of ours: a whole output."""
    try:
        content = read_json(folder / manifest.NAME)
    except (OSError, ValueError):
        return False
    return not folder.is_symlink() and isinstance(content, dict) and {"schema_version", "files"} <= content.keys()


def _read_fingerprint(path: Path) -> dict[str, str]:
    """What an unfinished run depends on; nothing where the file says nothing, so that it is taken for another run."""
    try:
        found = read_json(path)
    except ValueError:
        return {}
    return {str(key): str(value) for key, value in found.items()} if isinstance(found, dict) else {}


def discard(folder: Path) -> None:
    """Delete a folder of ours. A kill on the way leaves what `_is_leftover` knows and `is_artifact` does not."""
    mark = folder / DISCARDED
    for name in (FINGERPRINT, manifest.NAME):
        if (folder / name).exists():
            (folder / name).replace(mark)
    for entry in folder.iterdir():
        if entry != mark:
            _remove(entry)
    mark.unlink(missing_ok=True)
    folder.rmdir()


def _is_leftover(folder: Path) -> bool:
    """Whether a folder that holds no unfinished run is ours to delete: an output, or the rest of one, or empty."""
    begun = any((folder / name).is_file() for name in (DISCARDED, f"{FINGERPRINT}.tmp"))
    return is_artifact(folder) or _is_empty(folder) or (begun and not folder.is_symlink())


def _is_empty(folder: Path) -> bool:
    return not folder.is_symlink() and folder.is_dir() and not any(folder.iterdir())


def _remove(entry: Path) -> None:
    if entry.is_dir() and not entry.is_symlink():
        shutil.rmtree(entry)
    else:
        entry.unlink()


def _make_parent(path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:  # what mkdir says of a parent that is a file
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path.parent)) from error
