"""drop_blocks: take out the blocks, or the attentions or feed-forwards, that the model misses least."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator

from compress.engine.ablation import Trials, part_cosines, run_cosines
from compress.engine.layer_stats import Stat
from compress.engine.modelpass import Stage
from compress.engine.reshape import ReshapePass
from compress.engine.stream import BlockStream
from compress.errors import CompressError, InputError, UnsupportedError, UsageError
from compress.models import depth
from compress.models.depth import BlockPart
from compress.models.edits import Shape
from compress.models.model import Model, Task
from compress.models.skeleton import OUTER
from compress.records import REMOVED, UNDECIDED, LayerResult

WHAT = {"block": "block", "attention": "attention", "mlp": "feed-forward"}


class DropBlocks(ReshapePass):
    """Depth pruning. Blocks, or one part of them, leave the model: what follows is numbered anew, with fewer caches,
    and faster by what is gone on every target.

    By `kl` or `perplexity` one leaves at a time, each time the one without which the model loses least on the
    calibration data, with those gone that were chosen before (SLEB, Song et al. 2024, arXiv 2402.09025); KL is taken
    against the model as the pass gets it, and needs no text that the model predicts well. Both hold the model in memory
    as a whole. By `cosine` those leave that turn the hidden states least, in one walk block by block (ShortGPT, Men et
    al. 2024, arXiv 2403.03853; for parts He et al. 2024, arXiv 2406.15786), which is cheap and often worse from a
    fourth of the blocks on.

    Models of whole blocks keep a plain config.json, which any loader reads; where only parts are gone it cannot tell of
    it, and targets that rely on it refuse. Whether a part can leave is found by running a block: all that it does must
    be to add to the hidden states.

    Settings: `count` how many leave (1), or `blocks` which, from 0, which needs no data; `what` of them: `block`,
    `attention` or `mlp`; `by` what they are chosen by; `contiguous` a run of neighbours is taken, by=cosine only;
    `keep` blocks that stay whatever the scores; `seed` decides between equal scores.
    """

    name: ClassVar[str] = "drop_blocks"
    any_dtype: ClassVar[bool] = False

    count: int | None = Field(default=None, ge=1)
    blocks: tuple[int, ...] = ()
    what: Literal["block", "attention", "mlp"] = "block"
    by: Literal["kl", "perplexity", "cosine"] = "kl"
    contiguous: bool = False
    keep: tuple[int, ...] = ()
    seed: int = 0

    @model_validator(mode="after")
    def _check(self) -> Self:
        beside = sorted({"count", "by", "contiguous", "keep", "seed"} & self.model_fields_set)
        if self.blocks and beside:
            raise UsageError(f"{self.name}: blocks says which ones leave, so {beside[0]} would do nothing. Keep one.")
        if "blocks" in self.model_fields_set and not self.blocks:
            raise UsageError(f"{self.name}: blocks=[] names none. Name blocks from 0 on, or give count.")
        for name in ("blocks", "keep"):
            given: tuple[int, ...] = getattr(self, name)
            twice = next((index for index in given if given.count(index) > 1), None)
            if twice is not None:
                raise UsageError(f"{self.name}: {name} names block {twice} more than once.")
        if self.contiguous and (self.by != "cosine" or self.what != "block"):
            raise UsageError(
                f"{self.name}: contiguous=true takes out a run of whole blocks by=cosine. Leave it out, or set "
                "by=cosine and what=block."
            )
        return self

    @property
    def wants(self) -> frozenset[Stat]:
        return frozenset() if self.blocks else frozenset({Stat.REFERENCE})

    @property
    def held_models(self) -> float:
        return 0.0 if self.blocks or self.by == "cosine" else 1.0

    def trials(self, blocks: int) -> tuple[float, float]:
        """Each is run from the block on that it leaves out, half of them on average."""
        if not self.held_models:
            return 0.0, 0.0
        tried = [blocks - step for step in range(self.leaving)]
        return sum(2 + each / 2 for each in tried), float(sum(tried))

    @property
    def undecided(self) -> str:
        if self.blocks:
            return ""
        what = f"which {self.leaving} {WHAT[self.what]}(s) leave"
        return f"{what} {UNDECIDED} (by={self.by}); the plan is of the last that can"

    @property
    def leaving(self) -> int:
        """How many blocks or parts leave."""
        return len(self.blocks) or self.count or 1

    def check(self, model: Model) -> None:
        if model.image is not None:
            raise UnsupportedError(
                f"{self.name}: {model.source} is no language model or encoder with a list of like blocks, so there are "
                "none to drop."
            )
        count = len(model.structure.blocks)
        for name in ("blocks", "keep"):
            unknown = next((index for index in getattr(self, name) if not 0 <= index < count), None)
            if unknown is not None:
                raise UsageError(f"{self.name}: {name} names block {unknown}; the model has 0 to {count - 1}.")
        if self.leaving >= count:
            raise UsageError(
                f"{self.name}: {self.leaving} of {count} blocks would leave. At least one must stay: at most "
                f"{count - 1} can."
            )
        if not self.blocks and self.by == "perplexity" and model.task is Task.ENCODER:
            raise UsageError(f"{self.name}: an encoder predicts no next token, so it has no perplexity. Take by=kl.")
        able = self.able(model)
        if not self.blocks and self.leaving > len(able):
            raise UsageError(
                f"{self.name}: {self.leaving} {WHAT[self.what]}(s) are to leave, but only {len(able)} may: keep names "
                f"{len(self.keep)} of {count} blocks, and parts that were dropped before are gone."
            )

    def able(self, model: Model) -> list[int]:
        """The blocks that may lose what is dropped."""
        places = range(len(model.structure.blocks)) if self.what == "block" else depth.with_part(model, self.what)
        return [place for place in places if place not in self.keep]

    def shape(self, model: Model) -> Shape:
        if self.blocks:
            return self.shape_without(model, sorted(self.blocks))
        if self.contiguous:
            return self.shape_without(model, self.runs(model)[-1])
        gone: list[int] = []
        for _ in range(self.leaving):
            order = [place for place in reversed(self.able(model)) if place not in gone]
            gone.append(self.first_that_can(model, gone, order))
        return self.shape_without(model, sorted(gone))

    def shape_without(self, model: Model, gone: Sequence[int]) -> Shape:
        try:
            if self.what == "block":
                kept = [place for place in range(len(model.structure.blocks)) if place not in gone]
                return depth.fewer_blocks(model, kept)
            return depth.without_parts(model, gone, self.what)
        except CompressError as error:
            raise type(error)(f"{self.name}: {error}") from error

    def runs(self, model: Model) -> list[list[int]]:
        """The runs of neighbours that may leave. Raises: UsageError for none."""
        able = self.able(model)
        runs = [list(range(first, first + self.leaving)) for first in able if first + self.leaving - 1 in able]
        found = [run for run in runs if set(run) <= set(able)]
        if not found:
            raise UsageError(f"{self.name}: no {self.leaving} neighbouring blocks are free of those that keep names.")
        return found

    def first_that_can(self, model: Model, gone: Sequence[int], order: Sequence[int]) -> int:
        """The first of some blocks that can leave beside those that are gone. Raises: what the last of them raised."""
        for place in order[:-1]:
            try:
                self.shape_without(model, sorted((*gone, place)))
            except UnsupportedError:
                continue
            return place
        self.shape_without(model, sorted((*gone, order[-1])))
        return order[-1]

    def parts(self, model: Model) -> dict[int, str]:
        """The modules that may leave, by their blocks, where parts do; with those of blocks that keep theirs."""
        if self.what == "block":
            return {}
        part: BlockPart = self.what
        module = model.skeleton()
        return {place: depth.part_path(module, model, place, part) for place in depth.with_part(model, part)}

    def apply(self, stage: Stage) -> None:
        started = time.monotonic()
        choice = _Choosing(self, stage).choose()
        shape = self.shape_without(stage.model, sorted(choice.gone))
        names = self.parts(stage.model) or dict(enumerate(stage.model.structure.blocks))
        made = stage.reshape(shape)
        for segment in made.structure.segments:
            stage.put(segment, *stage.taken(segment))
        seconds = (time.monotonic() - started) / len(choice.gone)
        becomes = {made.origins[new]: name for new, name in enumerate(made.structure.blocks)}
        for place, name in names.items():
            later = becomes.get(stage.model.origins[place], "")
            stage.results.append(_result(self, name, later if self.what == "block" else "", choice, place, seconds))


@dataclass
class _Choice:
    """Which blocks lose something, in the order in which they were chosen, and what is to be said of each block."""

    gone: list[int] = field(default_factory=list)
    said: dict[int, str] = field(default_factory=dict)


def _result(item: DropBlocks, name: str, later: str, choice: _Choice, place: int, seconds: float) -> LayerResult:
    """Of a block or part. Args: later: the name that a block has from here on."""
    said = choice.said.get(place, "")
    row = LayerResult(layer=name, users=(), pass_text=str(item), changed=place in choice.gone)
    if row.changed:
        return row.model_copy(update={"format": REMOVED, "notes": (f"dropped: {said}",), "seconds": seconds})
    stays = f"stays as {later}" if later else "stays"
    said = said or ("keep names it" if place in item.keep else "not among those that were named or could leave")
    return row.model_copy(update={"reason": f"{stays}: {said}"})


class _Choosing:
    """Chooses on the calibration data."""

    def __init__(self, item: DropBlocks, stage: Stage) -> None:
        self.item, self.stage, self.model = item, stage, stage.model
        count = len(stage.model.structure.blocks)
        self.ties = torch.randperm(count, generator=torch.Generator().manual_seed(item.seed)).tolist()
        self.choice = _Choice()

    def choose(self) -> _Choice:
        if self.item.blocks:
            return _Choice(list(self.item.blocks), dict.fromkeys(self.item.blocks, "named in the recipe"))
        if self.item.contiguous:
            self._run()
        elif self.item.by == "cosine":
            scores = self._cosines()
            for _ in range(self.item.leaving):
                self._step({place: score for place, score in scores.items() if place not in self.choice.gone})
        else:
            self._greedy()
        return self.choice

    def _step(self, scores: Mapping[int, float]) -> None:
        """Take the one of least score that can leave, and note what is to be said of all."""
        if math.inf in scores.values() and len(set(scores.values())) == 1:
            raise InputError(
                f"{self.item.name}: without any of {len(scores)} blocks the model puts out NaN or infinite values."
            )
        order = sorted(scores, key=lambda place: (scores[place], self.ties[place]))
        chosen = self.item.first_that_can(self.model, self.choice.gone, order)
        before = len(self.choice.gone)
        beside = f" beside the {before} chosen before" if before else ""
        without = "" if self.item.by == "cosine" else f" without it{beside}"
        for place in order:
            self.choice.said[place] = f"{self._told(scores[place])}{without}"
        for place in order[: order.index(chosen)]:
            self.choice.said[place] += ", but the config of the shorter model could not say so"
        self.choice.said[chosen] += f", the least of {len(order)}"
        self.choice.gone.append(chosen)

    def _told(self, score: float) -> str:
        if self.item.by == "perplexity":
            return f"perplexity {math.exp(min(score, 700.0)):.4g}"
        if self.item.by == "kl":
            encoder = self.model.task is Task.ENCODER
            return f"error {score:.3g} of the output" if encoder else f"KL {score:.4g} per token"
        return f"1 - cosine {score:.4g}"

    def _greedy(self) -> None:
        assert self.stage.calibration is not None and self.item.by != "cosine"
        trials = Trials(
            self.model,
            self.stage.calibration.batches(),
            device=self.stage.device,
            parts=self.item.parts(self.model) or None,
        )
        for number in range(self.item.leaving):
            title = f"Trying the model without each {WHAT[self.item.what]}, {number + 1} of {self.item.leaving}"
            left = [place for place in self.item.able(self.model) if place not in self.choice.gone]
            self._step(trials.losses(left, self.item.by, partial(self.stage.progress.tick, title)))
            trials.gone = set(self.choice.gone)

    def _stream(self) -> BlockStream:
        assert self.stage.calibration is not None
        stream = BlockStream(
            self.model, self.stage.calibration.batches(), device=self.stage.device, spill=self.stage.folder
        )
        stream.start(self.model.layers(OUTER))
        return stream

    def _cosines(self) -> dict[int, float]:
        able = self.item.able(self.model)
        if self.item.what == "block":
            found = dict(enumerate(run_cosines(self._stream(), 1, self.stage.progress.tick)))
        else:
            parts = self.item.parts(self.model)
            found = part_cosines(self._stream(), parts, self.item.what, self.stage.progress.tick)
        return {place: found[place] for place in able}

    def _run(self) -> None:
        """The run of neighbours between whose ends the hidden states turn least."""
        size = self.item.leaving
        scores = run_cosines(self._stream(), size, self.stage.progress.tick)
        runs = sorted(self.item.runs(self.model), key=lambda run: (scores[run[0]], self.ties[run[0]]))
        for run in runs:
            self.choice.said[run[0]] = f"{self._told(scores[run[0]])} over the {size} blocks from it on"
        for run in runs:
            try:
                self.item.shape_without(self.model, run)
            except UnsupportedError:
                if run is runs[-1]:
                    raise
                continue
            self.choice.gone = run
            least = self._told(scores[run[0]])
            for place in run:
                self.choice.said[place] = f"{least} over blocks {run[0]} to {run[-1]}, the least of {len(runs)} runs"
            return
