"""Whether a runtime computes what the in-memory model does, teacher-forced (design §2, "Agreement")."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from compress.errors import InputError, UsageError
from compress.export import find as find_target
from compress.hwprofiles import Profile
from compress.inputs.datasets import Samples
from compress.inputs.images import BATCH
from compress.inputs.windows import Windows
from compress.models.model import Model
from compress.progress import Progress
from compress.quality.evaluate import stream_logits
from compress.quality.image_evaluate import probe_images, probe_positions, probe_steps
from compress.quality.outputs import farthest
from compress.records import Bounds, Verification
from compress.speed.measure import thread_count
from compress.target import LogitsRunner

EXACT_BOUND = 1e-3
EXACT_AGREEMENT = 0.999
MIN_POSITIONS = 512
PROBE_BYTES = 1 << 29  # of images that are held to compare an export with its model
GREEDY_TOKENS = 64
PROMPT_TOKENS = 16


def verify_export(
    model: Model, folder: Path, profile: Profile, ids: Tensor, bounds: Bounds, progress: Progress | None = None
) -> Verification:
    """Load an exported folder in its runtime, run it, and compare it with the in-memory model.

    Args: ids (N, length) int64, taken as `verification_ids` does, or images (N, channels, h, w); bounds: what its
    lowerings publish.
    Raises: CompressError when the runtime does not load it.
    """
    target, threads, ids = find_target(profile.target), thread_count(profile), verification_ids(model, ids)
    progress = progress or Progress(quiet=True)
    progress.begin("Loading the artifact, to compare it with its model")
    session = target.session(folder, threads)
    exact = target.session(folder, threads, exact=True)
    # what a compressed cache loses is no error of the export: the quality figures tell it
    found = agreement(getattr(session, "plain", session), model, ids, bounds, exact, progress)
    if not session.is_decoder:
        return found
    compare = getattr(target, "compare_graphs", None)
    if compare is not None:
        progress.begin("Comparing the artifact's graphs with each other")
        limit = max(bounds.exact, EXACT_BOUND)
        same, notes = compare(session, exact, ids.numpy(), limit, model.longest)
        found = found.model_copy(update={"agrees": found.agrees and same, "notes": (*found.notes, *notes)})
    progress.begin("Continuing a prompt")
    prompt = ids[0, : max(1, min(PROMPT_TOKENS, model.longest - 1))].tolist()
    tokens = session.greedy(prompt, min(GREEDY_TOKENS, model.longest - len(prompt)))
    return found.model_copy(update={"greedy_tokens": tuple(tokens)})


def verification_ids(model: Model, ids: Tensor) -> Tensor:
    """As many of the windows (N, length) as hold 512 tokens, none longer than the model reads.

    Where there are too few, windows of random tokens (seeded, below the vocabulary) are added. Of its own result it
    is the same again. Images: see `probe_images`.
    """
    if model.image is not None:
        return probe_images(model, ids)
    ids = ids[:, : model.longest]
    length = ids.shape[1]
    rows = -(-MIN_POSITIONS // length)
    missing = max(0, rows - ids.shape[0])
    drawn = torch.randint(0, model.vocabulary, (missing, length), generator=torch.Generator().manual_seed(0))
    return torch.cat([ids[:rows], drawn])


def verification_inputs(samples: Samples) -> Tensor:
    """What an export is compared with its model by: token ids (N, length), or as many images as that takes."""
    if isinstance(samples, Windows):
        return samples.ids
    room = max(1, PROBE_BYTES // (4 * samples.pixels[0].numel()))
    first = [samples.inputs(start) for start in range(0, min(len(samples), MIN_POSITIONS, room), BATCH)]
    return torch.cat(first)


def kept_inputs(model: Model, samples: Samples) -> list[list[int]]:
    """What a manifest keeps for `verify`: the token ids; of images nothing, for which noise serves."""
    return verification_ids(model, samples.ids).tolist() if isinstance(samples, Windows) else []


def read_inputs(model: Model, kept: list[list[int]]) -> Tensor:
    """What `kept_inputs` gave, as `verify_export` takes it. Raises: InputError for other tokens than the model has."""
    if model.image is not None:
        return probe_images(model)
    try:
        ids = torch.tensor(kept, dtype=torch.int64)
        is_known = ids.ndim == 2 and int(ids.min()) >= 0 and int(ids.max()) < model.vocabulary
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise InputError(
            f"The tokens that the manifest keeps are no lists of ids ({error}). Export it again."
        ) from error
    if not is_known or ids.shape[1] > model.longest:
        raise InputError("The tokens that the manifest keeps do not fit its model. Export it again.")
    return ids


def agreement(
    runner: LogitsRunner,
    compressed: Model,
    ids: Tensor,
    bounds: Bounds,
    exact: LogitsRunner | None = None,
    progress: Progress | None = None,
) -> Verification:
    """Compare a runtime with the in-memory model, teacher-forced (design §2, "Agreement").

    The largest logit difference must be within the bound. That the top token is the same wherever its margin exceeds
    twice that difference follows by arithmetic, and is told, not asked. What can fail beside the bound is the top
    token of the exact graph: the same at 99.9 % of the positions whose margin exceeds the exact bound itself.

    Args: ids (N, length) int64, or images (N, channels, h, w); bounds: what the export's lowerings publish; exact: the
    same graph with the kernels' own rounding of activations off, which tells a wrong lowering from a coarse kernel.
    Raises: UsageError for fewer than 512 positions.
    """
    positions = ids.numel() if compressed.image is None else probe_positions(compressed, ids)
    if positions < MIN_POSITIONS:
        raise UsageError(
            f"{positions} positions are too few to compare {runner.name} with the model. Give {MIN_POSITIONS}."
        )
    row = tuple(ids.shape[1:])
    shipped, alone = _comparison(compressed, row), _comparison(compressed, row)
    for one, expected in _steps(compressed, ids, progress or Progress(quiet=True)):
        shipped.add(torch.from_numpy(runner.logits(one)).reshape(expected.shape), expected)
        if exact is not None:
            alone.add(torch.from_numpy(exact.logits(one)).reshape(expected.shape), expected)
    limit, exact_limit = max(bounds.shipped, EXACT_BOUND), max(bounds.exact, EXACT_BOUND)
    decided, share = shipped.decided(2 * shipped.widest)
    agrees, exact_share = shipped.relative <= limit, None
    if exact is not None:
        exact_share = alone.decided(exact_limit * alone.scale)[1]
        agrees = agrees and alone.relative <= exact_limit and exact_share >= EXACT_AGREEMENT
    return Verification(
        level=getattr(runner, "level", "ran"),
        runtime=getattr(runner, "built_for", runner.name),
        agrees=agrees,
        positions=shipped.positions,
        max_relative_difference=shipped.relative,
        bound=limit,
        exact_relative_difference=alone.relative if exact is not None else None,
        exact_bound=exact_limit,
        exact_top1_agreement=exact_share,
        top1_agreement=shipped.same / shipped.positions,
        decided_positions=decided,
        decided_agreement=share,
        notes=tuple(getattr(runner, "notes", ())),
    )


def _steps(model: Model, ids: Tensor, progress: Progress) -> Iterator[tuple[NDArray[Any], Tensor]]:
    """What a runner is given at a time, and the model's own output for it, (positions, outputs)."""
    if model.image is not None:
        count = -(-len(ids) // BATCH)
        found: Iterable[tuple[NDArray[Any], Tensor]] = probe_steps(model, ids)
    else:
        count = len(ids)
        logits = stream_logits(model, ids, progress=progress)
        found = ((ids[place].numpy()[None], expected) for place, expected in enumerate(logits))
    for done, pair in enumerate(found):
        progress.tick("Comparing the artifact with its model", done, count)
        yield pair
    progress.tick("Comparing the artifact with its model", count, count)


class _Comparison:
    """Running figures of one runner against the model."""

    def __init__(self) -> None:
        self.widest, self.scale, self.positions, self.same = 0.0, 0.0, 0, 0
        self._margins: list[Tensor] = []
        self._hits: list[Tensor] = []

    def add(self, found: Tensor, expected: Tensor) -> None:
        """One window: both (length, vocabulary) float32."""
        widest = float((found - expected).abs().max())
        # a plain max would drop a NaN
        self.widest = max(self.widest, widest if math.isfinite(widest) else math.inf)
        self.scale = max(self.scale, float(expected.abs().max()))
        top = expected.topk(min(2, expected.shape[-1]), -1)
        self._margins.append(top.values[:, 0] - top.values[:, -1])
        self._hits.append(found.argmax(-1) == top.indices[:, 0])
        self.positions += expected.shape[0]
        self.same += int(self._hits[-1].sum())

    @property
    def relative(self) -> float:
        """Largest logit difference as a share of the largest logit; infinite where the runner put out NaN."""
        return self.widest / (self.scale or 1.0)

    def decided(self, margin: float) -> tuple[int, float]:
        """Positions whose margin exceeds `margin`, and the share of them with the same top."""
        clear = torch.cat(self._margins) > margin
        hits = torch.cat(self._hits)[clear]
        return int(clear.sum()), float(hits.float().mean()) if hits.numel() else 1.0


class _OutputComparison(_Comparison):
    """Of outputs that are no classes: norms of whole outputs. The largest of a hundred thousand boxes' differences says
    how far one tail reaches, not whether the graph is right."""

    def __init__(self, sizes: Sequence[int]) -> None:
        super().__init__()
        self._sizes, self._largest = sizes, 0.0

    def add(self, found: Tensor, expected: Tensor) -> None:
        super().add(found, expected)
        self._largest = max(self._largest, farthest(expected, found, self._sizes))

    @property
    def relative(self) -> float:
        """The norm of an output's difference as a share of its norm, largest over outputs and samples."""
        return self._largest


def _comparison(model: Model, row: tuple[int, ...]) -> _Comparison:
    if model.image is None or model.task.has_classes:
        return _Comparison()
    return _OutputComparison(model.image.sizes(row))
