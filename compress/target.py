"""What an export target offers to the engine: the interface that `compress.export.find` hands out.

The engine knows targets through these names only, so a new target is its folder and one line in a table.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from compress.errors import UnsupportedError, UsageError
from compress.honours import Honours

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from compress.hwprofiles import KernelSpeed, Profile, Runtime
    from compress.kv.spec import KvSpec
    from compress.layer import LayerSpec
    from compress.models.model import Model
    from compress.records import Bounds, Kernel


@dataclass(frozen=True)
class Refusal:
    """Why a target does not take a layer. usage: another setting of the recipe would do."""

    reason: str
    usage: bool = True


def granted(found: Runtime | Refusal, target: str, profile: Profile) -> Runtime:
    """The profile's runtime as a target's rules found it. Raises: UsageError where they refuse the profile."""
    if isinstance(found, Refusal):
        raise UsageError(f"The {target} target cannot export for profile {profile.id}: {found.reason}.")
    return found


Answer = TypeVar("Answer", bound="Choice")


def accepted(answers: Mapping[str, Answer | Refusal], what: str) -> dict[str, Answer]:
    """How each layer is stored, where a target takes them all.

    Args: answers: of `plan_layer`, by layer; what: cannot be done with one that it refuses, as in "exported".
    Raises: UsageError or UnsupportedError naming the first layer that is refused, with the reason.
    """
    found: dict[str, Answer] = {}
    for name, answer in answers.items():
        if isinstance(answer, Refusal):
            kind = UsageError if answer.usage else UnsupportedError
            raise kind(f"Layer {name} cannot be {what}: {answer.reason}.")
        found[name] = answer
    return found


@dataclass(frozen=True)
class Lowered:
    """What was written: layers per operator, layers left in float, and the loosest bounds of the lowerings used.

    deployed_bytes: of what the machine needs, where the folder also holds other forms of the same model.
    """

    folder: Path
    operators: dict[str, int]
    float_layers: tuple[str, ...]
    bounds: Bounds
    deployed_bytes: int | None = None

    @classmethod
    def of(
        cls,
        folder: Path,
        choices: Mapping[str, Choice],
        specs: Mapping[str, LayerSpec],
        bounds: Bounds,
        deployed_bytes: int | None = None,
    ) -> Lowered:
        """What was written, by the choices made for all layers."""
        operators = Counter(choice.operator for choice in choices.values())
        plain = tuple(name for name, spec in specs.items() if spec.format is None)
        return cls(folder, dict(sorted(operators.items())), plain, bounds, deployed_bytes)


class Choice(Protocol):
    """How a target stores and runs a layer."""

    @property
    def operator(self) -> str:
        """The runtime's own name of what runs."""
        ...

    @property
    def kernel(self) -> Kernel:
        """Whether the profile calls it fast."""
        ...

    @property
    def stored_bytes(self) -> int:
        """Of everything the layer adds to the files."""
        ...

    @property
    def note(self) -> str:
        """What to know about it; empty where nothing."""
        ...

    @property
    def rounds_inputs(self) -> bool:
        """Whether its kernel rounds inputs to 8 bits by itself, where the layer leaves them in float."""
        ...

    @property
    def decodes(self) -> bool:
        """Whether it is no faster than a weight in float, since one is made of the codes on the way: then fewer bytes
        are no reason to predict less time."""
        ...

    @property
    def speed(self) -> KernelSpeed | None:
        """What the profile measured of its kernel; none where it did not."""
        ...


class LogitsRunner(Protocol):
    """A runtime that computes logits: a `Session`, or less."""

    name: str

    def logits(self, ids: NDArray[Any]) -> NDArray[np.float32]:
        """Token ids (batch, length) int64 → (batch, length, vocabulary); images (batch, channels, h, w) float32 →
        (batch, classes)."""
        ...


class Session(Protocol):
    """A written folder, loaded in its runtime.

    It may also have `level` ("ran" where it is the runtime itself that reads the files, which is what counts where
    there is none; "built" where the runtime's compiler took them and their graph ran in another one; "checked" where
    only our own decoder did), `built_for`, the runtime that the files are for where it is not this one, and `notes`
    for the report.
    """

    name: str
    is_decoder: bool

    def logits(self, ids: NDArray[Any]) -> NDArray[np.float32]:
        """Token ids (batch, length) → logits (batch, length, vocabulary), or an encoder's hidden states; images
        (batch, channels, h, w) float32 → logits (batch, classes)."""
        ...

    def greedy(self, prompt: Sequence[int], count: int, stop: Sequence[int] = ()) -> list[int]:
        """At most `count` tokens after a prompt; ends after one of `stop`."""
        ...

    def call(self, ids: NDArray[Any], past: int) -> Callable[[], None]:
        """One call to be timed: ids (batch, length) after `past` cached tokens, or images."""
        ...


@dataclass(frozen=True)
class Placement:
    """Where a loaded folder really runs, read back from its runtime. file: what was loaded, below the artifact."""

    runtime: str
    provider: str
    threads: int
    file: str


class Runner(Protocol):
    """Batches of any lengths through a loaded folder. It holds the cache of one batch at a time."""

    @property
    def placement(self) -> Placement:
        """Read back from the runtime."""
        ...

    def start(self, ids: NDArray[np.int64], mask: NDArray[np.int64]) -> NDArray[np.float32]:
        """Begin a batch: ids and mask (batch, length), padded on the left → logits (batch, vocabulary) of the last."""
        ...

    def step(self, tokens: NDArray[np.int64], alive: NDArray[np.bool_]) -> NDArray[np.float32]:
        """One more token per row (batch,) → its logits (batch, vocabulary); those of rows not alive mean nothing, and
        such a row takes up no position."""
        ...

    def hidden(self, ids: NDArray[np.int64], mask: NDArray[np.int64]) -> NDArray[np.float32]:
        """An encoder's hidden states (batch, length, hidden) for ids and mask padded on the right."""
        ...


class Target(Protocol):
    """The module of a target.

    It may also have `TAKES_GRAPHS`, whether it takes models that were given as ONNX, `TAKES_EDITS`, whether it takes
    those of a shape that config.json does not tell (`Model.edits`), `predict_deployed_bytes`, as `predict_bytes` of
    what the machine needs where that is not the whole folder, `predict_parts`, its bytes by the name of each form of
    the model that it holds, `plan_together(specs)`, the refusals (by layer) of what it does not take side by side,
    `takes_caches(specs, profile)`, the refusal of `KvSpec`s or none, `profile_operators(folder, threads, bind)`, what
    the runtime's profiler tells (compress.speed.operators), `runner(session, folder)`, the `Runner` of a session,
    without which an artifact can be measured but not used here, `misfit(folder)`, why a folder does not run on this
    machine, `ON_GPU`, whether its sessions compute on one, `complete(folder, timing_cache)`, which adds what only this
    machine can build and says whether it did, `deployed_bytes(folder)`, of what the machine needs then, and
    `compare_graphs(session, exact, ids, limit, room)`, where a folder holds the model more than once: whether what
    `session` does not run agrees with what it does, and notes for the report.
    """

    @property
    def RUNTIME(self) -> str:  # noqa: N802 (a constant of the module)
        """The runtime's name in hardware profiles."""
        ...

    @property
    def HONOURS(self) -> Honours:  # noqa: N802
        """What of a layer it writes, by any of its ways; `plan_layers` refuses what is not declared."""
        ...

    @property
    def FOLDER(self) -> str:  # noqa: N802
        """Where in an artifact its files are."""
        ...

    def plan_layer(self, spec: LayerSpec, profile: Profile) -> Choice | Refusal:
        """How a layer would be stored; the same function decides in `plan` and in `write`."""
        ...

    def predict_bytes(self, specs: Iterable[LayerSpec], model: Model, profile: Profile) -> int:
        """Bytes of the folder that `write` would make, without the weights."""
        ...

    def capture(self, model: Model, profile: Profile) -> bytes:
        """What `write` takes as `graph`: of the model's structure alone (empty where the target needs none)."""
        ...

    def write(self, model: Model, profile: Profile, folder: Path, graph: bytes | None = None) -> Lowered:
        """Write the folder. Raises: UsageError, UnsupportedError naming a layer that cannot be stored."""
        ...

    def session(self, folder: Path, threads: int, exact: bool = False) -> Session:
        """Load a folder; exact: with the kernels' own rounding of activations off. Raises: InputError."""
        ...

    def probe_command(self, folder: Path, threads: int, prompt: int, tokens: int) -> list[str]:
        """A command that loads a folder, reads and decodes, and prints JSON: load_s, peak_memory_bytes and, where it is
        known, first_call_s."""
        ...


DENSE = "stored dense, zeros and all: this target has no form for sparse weights, so it is no smaller or faster"


def as_dense(spec: LayerSpec, answer: Answer | Refusal, note: str = DENSE) -> Answer | Refusal:
    """A target's answer to `spec.as_dense`, with a note where that is another layer: its layout of plain numbers is
    not written."""
    if isinstance(answer, Refusal) or spec.as_dense is spec:
        return answer
    told: Any = answer
    noted: Answer = replace(told, note="; ".join(filter(None, (answer.note, note))), decodes=True)
    return noted


def require_tools(target: Target, profile: Profile) -> None:
    """Before anything expensive: what a target needs on this machine to write for a profile, if it says so by a
    function of this name. Raises: UnsupportedError naming the extra to install."""
    check: Callable[[Profile], None] | None = getattr(target, "require_tools", None)
    if check is not None:
        check(profile)


def write_baseline(target: Target, model: Model, profile: Profile, folder: Path, graph: bytes | None = None) -> Lowered:
    """Write the uncompressed model to compare with, by the target's own function of this name if it has one: where what
    is deployed takes long to build, the comparison may do without it."""
    write: Callable[..., Lowered] = getattr(target, "write_baseline", target.write)
    return write(model, profile, folder, graph)


def timed_here(target: Target, profile: Profile) -> bool:
    """Whether its sessions run what will be deployed, so that their speed means something: what the target's function
    of this name says, if it has one."""
    found: Callable[[Profile], bool] | None = getattr(target, "timed_here", None)
    return found is None or found(profile)


def misfit(target: Target, folder: Path) -> str:
    """Why a written folder does not run on this machine, and what would help, by the target's function of this name;
    empty where it does, or where the target has none."""
    found: Callable[[Path], str] | None = getattr(target, "misfit", None)
    return found(folder) if found is not None else ""


def require_graphs(target: Target, model: Model, profile: Profile) -> None:
    """Raises: UnsupportedError for a model that was given as ONNX where the target takes none (`TAKES_GRAPHS`), or that
    config.json does not describe where the target's readers go by it alone (`TAKES_EDITS`)."""
    if model.image is not None and model.image.graph and not getattr(target, "TAKES_GRAPHS", False):
        raise UnsupportedError(
            f"{model.source} is an ONNX graph, which is exported for the target onnx only. Profile {profile.id} is for "
            f"{profile.target}; add --target onnx, or give the model that the graph was made from."
        )
    if model.edits and not getattr(target, "TAKES_EDITS", False):
        first = model.edits[0]
        raise UnsupportedError(
            f"The target {profile.target} writes folders whose readers build a model by its config.json, and that "
            f"cannot say what {len(model.edits)} module(s) have become: {first.path} ({first.kind}). Change all blocks "
            "alike (drop_blocks of whole blocks, one width for all), or export for onnx."
        )


def require_caches(target: Target, specs: Sequence[KvSpec], profile: Profile) -> None:
    """Raises: UsageError or UnsupportedError for a model whose cache is compressed as the target does not take it."""
    if not specs:
        return
    require_any_cache(target, profile)
    refusal: Refusal | None = target.takes_caches(specs, profile)  # type: ignore[attr-defined]
    if refusal is not None:
        raise (UsageError if refusal.usage else UnsupportedError)(_no_cache(refusal.reason, profile))


def require_any_cache(target: Target, profile: Profile) -> None:
    """Raises: UnsupportedError where the target takes no compressed cache at all."""
    if not hasattr(target, "takes_caches"):
        reason = "its runtime keeps a cache of its own, which cannot be compressed yet"
        raise UnsupportedError(_no_cache(reason, profile))


def _no_cache(reason: str, profile: Profile) -> str:
    ours = "Give --target native, which runs the model in torch with such a cache, or leave the pass out."
    return f"Target {profile.target} does not take the cache that the recipe describes: {reason}. {ours}"


def honoured(spec: LayerSpec, answer: Answer | Refusal, honours: Honours, who: str = "this target") -> Answer | Refusal:
    """The answer, or the refusal of a layer that asks for what is not declared. who: would take it and drop that."""
    lacking = "" if isinstance(answer, Refusal) else honours.lacking(spec)
    if not lacking:
        return answer
    return Refusal(f"{who} does not write {lacking}; leave out the pass that sets it, or give another target")


def plan_layers(target: Target, specs: Mapping[str, LayerSpec], profile: Profile) -> dict[str, Choice | Refusal]:
    """How a target would store each layer of a model, alone and beside the others."""
    found = {name: honoured(spec, target.plan_layer(spec, profile), target.HONOURS) for name, spec in specs.items()}
    together: Callable[..., dict[str, Refusal]] | None = getattr(target, "plan_together", None)
    if together is None or any(isinstance(answer, Refusal) for answer in found.values()):
        return found
    return {**found, **together(specs)}
