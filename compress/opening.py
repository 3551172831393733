"""`compress.load`: a model to compress, or an artifact in the runtime that this machine has for it.

Of an artifact only manifest.json and one exported folder (onnx/, checkpoint/, …) are read: a copy of these is enough.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from compress import hwprofiles, manifest
from compress.artifact import Artifact, open_artifact
from compress.errors import InputError, UnsupportedError, UsageError, nearest
from compress.export import TARGETS
from compress.export import find as find_target
from compress.hwprofiles import Profile
from compress.inputs.array_input import ArrayInput
from compress.inputs.pictures import ImageInput
from compress.inputs.prompts import read_reader
from compress.models import loading
from compress.models.model import Model, Task
from compress.runtime.engine import Engine
from compress.speed.measure import thread_count
from compress.target import Runner, Session, Target, misfit


def load(
    source: str | Path,
    *,
    revision: str | None = None,
    weights: bool = True,
    engine: str | None = None,
    threads: int | None = None,
    anyway: bool = False,
) -> Model | Engine:
    """A model to compress, from a folder, a hub id or `file.py:callable`; or an artifact to use, from its folder.

    Args: revision, weights: of a model; see `compress.models.loading.load`. engine, threads, anyway: of an artifact;
    see `open_engine`. Raises: as these; UsageError for an argument of the other kind.
    """
    if not is_artifact(source):
        if engine is not None or threads is not None or anyway:
            raise UsageError(
                f"{source} is no artifact (it has no {manifest.NAME}): engine, threads and anyway are of one."
            )
        return loading.load(source, revision=revision, weights=weights)
    if revision is not None or not weights:
        raise UsageError(f"{source} is an artifact of `compress run`: revision and weights=False are of models.")
    return open_engine(source, engine=engine, threads=threads, anyway=anyway)


def is_artifact(source: str | Path) -> bool:
    """Whether it is a folder that `compress run` or `compress export` wrote, and no model's."""
    path = Path(source)
    return (path / manifest.NAME).is_file() and not (path / "config.json").exists()


def open_engine(
    folder: str | Path, *, engine: str | None = None, threads: int | None = None, anyway: bool = False
) -> Engine:
    """An artifact in the first of its exported folders that runs here: its profile's own, then any other.

    Args: engine: the name of one, "onnx" or "checkpoint"; threads: instead of the profile's; anyway: also where the
    profile is of another kind of machine (it may be slow, or not run).
    Raises: UsageError for no artifact, UnsupportedError where none of its folders runs here (with the reason for each),
    InputError for a damaged one.
    """
    artifact = open_artifact(folder)
    try:
        task = Task(artifact.facts.get("task", ""))
    except ValueError as error:
        raise InputError(f"{artifact.folder / manifest.NAME} does not say what the model does ({error}).") from error
    if threads is not None and threads < 1:
        raise UsageError(f"threads={threads}: allowed are numbers from 1.")
    profile, refused = artifact.profile, list[str]()
    for name, target in _candidates(artifact, profile, engine):
        manifest.check_files(artifact.folder, keep=(target.FOLDER,))
        try:
            return _opened(artifact, profile, target, task, threads, anyway, refused)
        except UnsupportedError as error:
            refused.append(f"{name}: {error}")
    if refused:
        raise UnsupportedError(f"{artifact.folder} does not run here. {' '.join(refused)}")
    raise UnsupportedError(
        f"{artifact.folder} holds no exported folder for {profile.id} that could run here. Write one from its model: "
        f"compress export {artifact.folder} -o another-folder"
    )


def _candidates(artifact: Artifact, profile: Profile, engine: str | None) -> Iterator[tuple[str, Target]]:
    """Folder and target of what the artifact holds, the profile's own first. Raises: UsageError."""
    tops, found = {name.split("/")[0] for name in artifact.facts["files"]}, list[str]()
    for name in dict.fromkeys((profile.target, *TARGETS)):
        target = find_target(name)
        folder = target.FOLDER
        if folder in found or folder not in tops or not (artifact.folder / folder).is_dir():
            continue
        found.append(folder)
        if engine in (None, folder):
            yield folder, target
    if engine is not None and engine not in found:
        raise UsageError(f"{artifact.folder} has no engine '{engine}'.{nearest(engine, found)}")


def _opened(
    artifact: Artifact,
    profile: Profile,
    target: Target,
    task: Task,
    threads: int | None,
    anyway: bool,
    refused: Sequence[str],
) -> Engine:
    """Load one folder. Raises: UnsupportedError where it does not run here, InputError."""
    folder, notes = artifact.folder / target.FOLDER, [*refused]
    unfit = _misfit(profile, target, folder)
    if unfit and not anyway:
        raise UnsupportedError(unfit + f" Export it for this one: compress export {artifact.folder} -o another-folder.")
    notes += [unfit] if unfit else []
    runner_of: Callable[[Session, Path], Runner] | None = getattr(target, "runner", None)
    if runner_of is None:
        raise UnsupportedError(
            f"It is for {target.RUNTIME} on {profile.name}; this version of compress builds and checks it, but does "
            "not run it. Load it there with that runtime."
        )
    session = target.session(folder, threads or thread_count(profile))
    notes += getattr(session, "notes", ())
    runner = runner_of(session, folder)
    wanted = profile.runtimes[target.RUNTIME].provider if target.RUNTIME in profile.runtimes else ""
    provider = wanted.removesuffix("ExecutionProvider")
    if not anyway and provider != wanted and not runner.placement.provider.startswith(provider):
        raise UnsupportedError(f"It runs on {runner.placement.provider} here, not on {wanted} as {profile.id} says.")
    is_image, is_array = task in (Task.IMAGE, Task.OUTPUTS), task in (Task.CLASSIFIER, Task.ARRAYS)
    return Engine(
        artifact.folder,
        task,
        tuple(notes),
        session,
        runner,
        None if task.takes_rows else read_reader(folder),
        ImageInput.read(folder) if is_image else None,
        ArrayInput.read(folder) if is_array else None,
    )


def _misfit(profile: Profile, target: Target, folder: Path) -> str:
    """Why a folder does not run here by what its target says, or why this machine is not of the profile's kind; empty
    where it is, or where the profile does not say how this target runs (torch decodes a checkpoint anywhere)."""
    problem = misfit(target, folder)
    if problem:
        return f"It was made for {profile.name}: {problem}"
    if target.RUNTIME not in profile.runtimes:
        return ""
    facts = hwprofiles.machine()
    flags, here = set(facts.get("flags", "").split()), facts.get("architecture", "unknown")
    if profile.detect is not None and here not in profile.detect.architecture:
        return f"It was made for {profile.id} ({' or '.join(profile.detect.architecture)}); this machine is {here}."
    missing = [flag for flag in profile.isa if flag not in flags]
    return f"It was made for {profile.id}; this machine lacks {', '.join(missing)}." if missing else ""
