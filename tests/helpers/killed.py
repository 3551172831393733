"""A command killed again and again, in forks of one process so that torch is imported once.

    python killed.py CAPTURES OUT EVERY ARGUMENT...

The first run is killed at file operation number EVERY, the next at 2 · EVERY and so on, every other one a moment later,
amid what it writes. Prints the number of kills once a run ends by itself.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

WRITES = os.O_WRONLY | os.O_RDWR
CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate"}


def kill_at(number: int, place: str, delay_s: float) -> None:
    """SIGKILL before this process's file operation of a number below a place, or SIGALRM, as deadly, soon after it."""
    left = number

    def see(event: str, given: tuple[Any, ...]) -> None:
        nonlocal left
        if event not in CHANGES and not (event == "open" and given[2] & WRITES):
            return
        if not str(given[0]).startswith(place):
            return
        left -= 1
        if left == 0 and delay_s:
            signal.setitimer(signal.ITIMER_REAL, delay_s)
        elif left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(see)


def main(captures: Path, out: Path, every: int, given: list[str]) -> int:
    """Returns the exit code of the run that ended."""
    sys.path.insert(0, str(Path(__file__).parents[1]))
    import compress.run  # noqa: F401
    from compress import manifest
    from compress.__main__ import main as command
    from helpers.captures import capture_once

    capture_once(captures)
    maker, kills = random.Random(7), 0
    while True:
        delay_s = maker.uniform(0.0001, 0.01) if kills % 2 else 0.0
        child = os.fork()
        if child == 0:
            kill_at(every * (kills + 1), str(out), delay_s)
            os._exit(command(given))
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if code >= 0:
            print(kills)
            return code
        kills += 1
        if out.exists():  # it was killed after its last rename
            manifest.check_files(out)
            shutil.rmtree(out)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4:]))
