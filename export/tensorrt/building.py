"""The engine beside a graph: by TensorRT-RTX ahead of time, or by TensorRT on the GPU that it is for.

When the model is exported, where this machine can; otherwise when its artifact is verified on one that can.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from compress.errors import ResourceError, UnsupportedError
from compress.export.onnx.files import GRAPH
from compress.export.tensorrt import builder, engine, flavours, gpu, record, timing_cache
from compress.export.tensorrt.flavours import FULL, RTX, Flavour
from compress.hwprofiles import Profile

ENGINE, LOG = "engine", "build.log"
STREAM_ABOVE = 0.8
"""Share of a GPU's memory from which on an engine may keep weights in the host's."""


def flavour_for(profile: Profile) -> Flavour | None:
    """What builds an engine for a profile on this machine: TensorRT-RTX where it offers the chip's SM, else TensorRT
    where it is installed beside that chip; else none."""
    if profile.gpu is None:
        return None
    if RTX.runtime in profile.runtimes and profile.gpu.sm in RTX.ahead:
        return RTX
    return FULL if not flavours.lacking(FULL, profile.gpu.sm) else None


def make(kept: record.Record, flavour: Flavour, folder: Path, into: Path, timing: Path | None = None) -> record.Record:
    """Build the engine of a folder's graph. Returns: the record of what was built.

    Args: kept: of the graph; into: the folder that gets `engines/…`, usually the same; timing: a timing cache to read
    and to write back [default: one in the user's cache folder], beside which the artifact keeps a copy of its own.
    Raises: as `builder.build`.
    """
    version = str(flavours.load_module(flavour).__version__)
    name = f"engines/{flavour.runtime}-{version}-sm{kept.sm}/{ENGINE}"
    path = into / name
    path.parent.mkdir(parents=True, exist_ok=True)
    device, streams = "", False
    cache: tuple[Path | None, Path] | None = None
    place = Path()
    if flavour.timing_cache:
        device = gpu.name()
        streams = kept.graph_bytes > STREAM_ABOVE * gpu.total_bytes()
        place = timing or timing_cache.automatic(version, kept.sm, device)
        before = folder / name
        cache = timing_cache.first(place, before.with_name(timing_cache.BESIDE)), path.with_name(timing_cache.BESIDE)
    made = builder.build(
        folder / GRAPH,
        kept.sm,
        kept.ranges,
        path,
        path.with_name(LOG),
        flavour,
        timing=cache,
        stream_weights=streams,
        sparse_weights=bool(kept.sparse),
    )
    if cache is not None and not (timing and made["timing_cache"] == builder.MISMATCH):  # that one is another's
        made |= _kept(cache[1], place)
    return kept.model_copy(
        update={
            "level": "built",
            "builder": f"{flavour.title} {version}",
            "engine": name,
            "engine_bytes": path.stat().st_size,
            "module": flavour.runtime,
            "version": version,
            "device": device,
            "settings": made,
        }
    )


def _kept(made: Path, place: Path) -> dict[str, str]:
    problem = timing_cache.keep(made.read_bytes(), place)
    return {"timing_cache_problem": problem} if problem else {}


def complete(folder: Path, timing: Path | None = None) -> bool:
    """Build what a folder lacks, if this machine is the one that can. Returns: whether files were added or replaced.

    Interrupted, it leaves the folder as it was. Raises: UnsupportedError where a timing cache was named, which only a
    build reads, and there is none to do here; ResourceError for a folder that cannot be written; as `make`.
    """
    kept = record.read(folder)
    problem = _no_build(kept, engine.misfit(kept))
    if problem and timing is not None:
        raise UnsupportedError(f"There is nothing to build, so no use for the timing cache {timing}: {problem}")
    if problem:
        return False
    try:
        # beside the artifact, so that what is done can be moved in at once
        scratch = Path(tempfile.mkdtemp(prefix=".compress-engine-", dir=folder.resolve().parent.parent))
    except OSError as error:
        raise ResourceError(f"{folder} cannot be written ({error.strerror}); an engine goes there.") from error
    try:
        made = make(kept, FULL, folder, scratch, timing)
        target = folder / Path(made.engine).parent
        target.parent.mkdir(exist_ok=True)
        shutil.rmtree(target, ignore_errors=True)
        (scratch / target.relative_to(folder)).replace(target)
        made.write(folder)
    except OSError as error:
        raise ResourceError(
            f"{folder} cannot be written ({error.strerror or error}), which an engine needs."
        ) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return True


def misfit(kept: record.Record) -> str:
    """Why a folder does not run on this machine as an engine, with what would help; empty where it does."""
    problem = engine.misfit(kept)
    if not problem:
        return ""
    unbuilt = _no_build(kept, problem)
    if not unbuilt:
        return f"{problem} `compress verify OUT` builds one that runs here."
    if not kept.engine:
        return f"{problem} {unbuilt}"
    is_other_version = not flavours.lacking(kept.flavour, kept.sm)
    return f"{problem} Install that version, or export the model again." if is_other_version else problem


def _no_build(kept: record.Record, problem: str) -> str:
    """Why TensorRT builds no engine here; empty where it does. problem: the engine's own, as `engine.misfit`."""
    if kept.module == RTX.runtime and kept.engine:
        return f"{kept.builder} built the engine ahead of time."
    if not problem:
        return f"the engine that {kept.builder} built runs here."
    lacking = flavours.lacking(FULL, kept.sm)
    return f"{lacking} Run `compress verify OUT` on a machine that has both." if lacking else ""
