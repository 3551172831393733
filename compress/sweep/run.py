"""Several recipes in one run: one baseline, many variants, one report with the front and a choice (design §8).

Each recipe is compressed by a worker of its own and may fail alone; quality and speed are then taken here, of all
beside the one baseline, when nothing else runs. `OUT.partial/` holds the variants, `work/` their journals and `stages/`
what recipes share that begin alike; whatever is killed, the same command goes on from there.
"""

from __future__ import annotations

import hashlib
import json

from compress.engine.disk import disk_errors
from compress.engine.workspace import Workspace
from compress.export import find as find_target
from compress.progress import Progress
from compress.sweep.bench import Bench
from compress.sweep.executor import Executor, Processes
from compress.sweep.finish import KEPT, write_sweep, write_variants
from compress.sweep.records import Sweep
from compress.sweep.setup import Setup, SweepRequest, prepare
from compress.target import require_tools

WRITTEN = "written"


def sweep(request: SweepRequest, progress: Progress | None = None, executor: Executor | None = None) -> Sweep:
    """Compress a model by every recipe, and compare.

    Returns the sweep's report; OUT/variants/NAME is each variant as `compress run` leaves it. A variant fails alone.
    Raises: CompressError where no variant is left, or for what concerns all of them; Interrupted, resumable.
    """
    progress = progress or Progress(quiet=True)
    runner = executor or Processes(quiet=progress.quiet)
    require_tools(find_target(request.profile.target), request.profile)
    setup = prepare(request)
    with Workspace(request.out, request.overwrite) as space:
        files = [name for each in request.recipes for name in (each.calibration.data, each.quality.data)]
        space.spare(request.model, request.data, *files)
        journal = space.open(setup.shared)
        with disk_errors(space.folder):
            key = _key(request, setup)
            if journal.get(WRITTEN) == key:  # killed on the way to the last rename
                found = Sweep.model_validate_json((space.folder / "report.json").read_text(encoding="utf8"))
            else:
                outcome = Bench(request, setup, space.folder, journal, progress, runner).work()
                reports = write_variants(space.folder, setup, outcome)
                found = write_sweep(space.folder, request, setup, outcome, reports)
                journal.add(WRITTEN, key)
            space.commit(KEPT)
    return found


def _key(request: SweepRequest, setup: Setup) -> str:
    """What a finished sweep depends on."""
    prints = [planned.fingerprint for planned in setup.planned.values()]
    content = [prints, list(setup.failures), request.limits.model_dump(mode="json"), request.budget_s]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
