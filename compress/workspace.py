"""`OUT.partial/`: lock, fingerprint, journal, and the rename that makes an output complete or absent (design §3)."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from compress.errors import ResourceError, UsageError
from compress.store import sync_file, write_text


class Journal:
    """What is finished, one JSON line each, synced: step name → data. A torn last line counts as not written."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.steps: dict[str, Any] = {}
        whole = 0
        if path.is_file():
            for line in path.read_bytes().splitlines(keepends=True):
                try:
                    entry = json.loads(line) if line.endswith(b"\n") else None
                except ValueError:
                    entry = None
                if entry is None:
                    break
                self.steps[entry["step"]] = entry["data"]
                whole += len(line)
            os.truncate(path, whole)

    def __contains__(self, step: str) -> bool:
        return step in self.steps

    def get(self, step: str) -> Any:
        """The data of a finished step, or None."""
        return self.steps.get(step)

    def add(self, step: str, data: Any = None) -> None:
        """Note a step as finished."""
        with self.path.open("a", encoding="utf8") as stream:
            stream.write(json.dumps({"step": step, "data": data}) + "\n")
            stream.flush()
            os.fsync(stream.fileno())
        self.steps[step] = data


class Workspace:
    """The staging folder of one output."""

    def __init__(self, out: Path, overwrite: bool = False) -> None:
        self.out = out
        self.folder = out.with_name(out.name + ".partial")
        self.overwrite = overwrite
        self._lock: IO[str] | None = None

    def open(self, fingerprint: Mapping[str, str]) -> Journal:
        """Make or resume the staging folder.

        Raises: UsageError when the output exists, another run holds the lock, or the folder belongs to a different
        run; ResourceError when the place cannot be written.
        """
        if self.out.exists() and not self.overwrite:
            raise UsageError(
                f"{self.out} exists. Give another -o, or --overwrite to replace it once the new one is done."
            )
        with disk_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            self._take_lock()
        path = self.folder / "fingerprint.json"
        if path.is_file():
            self._compare(json.loads(path.read_text(encoding="utf8")), fingerprint)
        else:
            with disk_errors(self.folder):
                write_text(path, json.dumps(dict(fingerprint), indent=1, sort_keys=True) + "\n")
        return Journal(self.folder / "journal.jsonl")

    def _take_lock(self) -> None:
        self._lock = (self.folder / "lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._lock.close()
            raise UsageError(f"Another run is writing {self.out}. Wait for it, or give another -o.") from error

    def _compare(self, before: Mapping[str, str], now: Mapping[str, str]) -> None:
        changed = [key for key in sorted({*before, *now}) if before.get(key) != now.get(key)]
        if not changed:
            return
        first = changed[0]
        raise UsageError(
            f"{self.folder} holds an unfinished run that differs in: {', '.join(changed)} "
            f"({first} was {before.get(first, 'absent')!s:.80}, is {now.get(first, 'absent')!s:.80}). "
            f"Repeat the same command to resume it, or remove {self.folder} to start anew."
        )

    def commit(self, keep: tuple[str, ...]) -> None:
        """Sync everything named in `keep`, drop the rest, rename to the output."""
        for entry in sorted(self.folder.iterdir()):
            if entry.name not in keep:
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        for path in sorted(self.folder.rglob("*")):
            sync_file(path)
        sync_file(self.folder)
        old = None
        if self.out.exists():
            old = self.out.with_name(self.out.name + ".replaced")
            self.out.rename(old)
        self.folder.rename(self.out)
        sync_file(self.out.parent)
        if old is not None:
            shutil.rmtree(old)
        self.close()

    def close(self) -> None:
        """Let go of the lock."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None


@contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Turn a full or read-only disk into a ResourceError; what was finished stays for a resume."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ResourceError(
                f"No space left while writing {folder}. Free some, then repeat the command: finished work is kept."
            ) from error
        if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR):
            raise ResourceError(f"{folder} cannot be written ({error.strerror}). Give an -o that can.") from error
        raise


def require_space(folder: Path, needed: int) -> None:
    """Raises: ResourceError when a file system has less than `needed` bytes (plus 5 %) free."""
    existing = folder
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    if free < needed * 1.05:
        raise ResourceError(
            f"{existing} has {free / 1e6:.0f} MB free; this run needs about {needed * 1.05 / 1e6:.0f} MB. "
            "Free some, or give an -o on another disk."
        )
