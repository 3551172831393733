"""What a model loses with each of its blocks, or parts of them: by cosine on one walk, or by leaving them out in turn.

Scores are of the calibration data. Nothing is removed here but for the trial.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, cross_entropy, kl_div

from compress.engine.stream import BlockStream
from compress.maths import products
from compress.maths.activations import allocate, rest
from compress.models.depth import BlockPart, other_parts
from compress.models.model import Model, Task
from compress.models.skeleton import OUTER

Loss = Literal["kl", "perplexity"]
Tell = Callable[[str, int, int], None]


@contextmanager
def _silenced(module: nn.Module, names: Collection[str]) -> Iterator[None]:
    """Modules that put out zeros meanwhile."""

    def zeros(_module: nn.Module, _inputs: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (torch.zeros_like(output[0]), *output[1:])
        return torch.zeros_like(output)

    handles = [module.get_submodule(name).register_forward_hook(zeros) for name in names]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def run_cosines(stream: BlockStream, run: int, tell: Tell) -> list[float]:
    """1 - the mean cosine between what enters a run of blocks and what leaves it, for each first block of one, over all
    tokens: how little it turns the hidden states. With run=1 the block influence of ShortGPT (Men et al. 2024,
    arXiv 2403.03853, eq. 1); longer runs as Gromov et al. 2024 (arXiv 2403.17887) take them out, who go by the angle at
    the last token of a text.

    The stream is started, and is at its end afterwards. Memory: one block, and the hidden states at `run` blocks.
    """
    count = len(stream.model.structure.blocks)
    scores: list[float] = []
    entered: dict[int, list[Tensor]] = {}
    for index in range(count):
        tell("Comparing what enters blocks with what leaves them", index, count)
        if index + run <= count:
            entered[index] = allocate([tuple(each.shape) for each in stream.hidden], stream.spill, stream.dtype)
            for copy, hidden in zip(entered[index], stream.hidden, strict=True):
                copy.copy_(hidden)
                rest(copy, hidden)
        stream.load(index, stream.model.layers(index), stream.model.plain(index))
        with products.fast():
            stream.advance(index)
        stream.release(index)
        if index + 1 >= run:
            scores.append(_turned(entered.pop(index + 1 - run), stream.hidden))
    return scores


def part_cosines(stream: BlockStream, parts: Mapping[int, str], part: BlockPart, tell: Tell) -> dict[int, float]:
    """The same for a part of each block: between the hidden states before and after what it adds (He et al. 2024,
    arXiv 2406.15786, eq. 2).

    Args: parts: modules by their block; part: which one they are.
    """
    count, scores = len(stream.model.structure.blocks), dict[int, float]()
    for index in range(count):
        tell("Comparing what enters parts of blocks with what leaves them", index, count)
        stream.load(index, stream.model.layers(index), stream.model.plain(index))
        if index in parts:
            scores[index] = _part_score(stream, index, parts[index], part)
        with products.fast():
            stream.advance(index)
        stream.release(index)
    return scores


@torch.no_grad()
def _part_score(stream: BlockStream, index: int, name: str, part: BlockPart) -> float:
    """An attention adds to what enters the block, a feed-forward to what the block puts out without it."""
    module, others = stream.module, other_parts(stream.module, stream.model.structure.blocks[index], name)
    total, tokens = 0.0, 0
    for hidden in stream.hidden:
        with _silenced(module, others if part == "attention" else [name]):
            output = stream.call(index, hidden)
        before, after = (hidden.to(output), output) if part == "attention" else (output, stream.call(index, hidden))
        cosines = cosine_similarity(before.float(), after.float(), dim=-1)
        total, tokens = total + float((1 - cosines).double().sum()), tokens + cosines.numel()
        rest(hidden)
    return total / tokens


def _turned(before: Sequence[Tensor], after: Sequence[Tensor]) -> float:
    total, tokens = 0.0, 0
    for first, second in zip(before, after, strict=True):
        cosines = cosine_similarity(first.float(), second.float(), dim=-1)
        total, tokens = total + float((1 - cosines).double().sum()), tokens + cosines.numel()
        rest(first, second)
    return total / tokens


class Trials:
    """A model whole in memory, that is run without one block after another, or one part.

    Each batch is run up to the block that is left out only once for all trials. gone: what was left out for good.

    Args: parts: modules by block, where blocks lose a part; None where they go whole.
    """

    def __init__(
        self,
        model: Model,
        batches: Sequence[Tensor],
        *,
        device: str = "cpu",
        parts: Mapping[int, str] | None = None,
    ) -> None:
        self.stream = BlockStream(model, batches, device=device)
        self.stream.start(model.layers(OUTER))
        self.stream.put_outer()
        for index in range(len(model.structure.blocks)):
            self.stream.load(index, model.layers(index), model.plain(index))
        model.release()
        self.parts = parts
        self.gone: set[int] = set()
        self.is_encoder = model.task is Task.ENCODER

    @torch.no_grad()
    def losses(self, candidates: Sequence[int], by: Loss, tell: Callable[[int, int], None]) -> dict[int, float]:
        """The model's mean loss per token without each candidate, beside what is gone: KL(model || without) in nats (of
        an encoder the squared error of its hidden states as a share of theirs), or the negative log-likelihood of the
        next token; infinite where it is not a number."""
        sums, weight = dict.fromkeys(candidates, 0.0), 0.0
        count = len(self.stream.batches)
        for place in range(count):
            wanted = self._wanted(place) if by == "kl" else None
            weight += self._weight(place, wanted)
            for done, (one, hidden) in enumerate(self._without(place, candidates)):
                tell(place * len(candidates) + done, count * len(candidates))
                sums[one] += self._loss(place, self.stream.output(place, hidden), wanted)
        means = {one: total / weight for one, total in sums.items()}
        return {one: mean if math.isfinite(mean) else math.inf for one, mean in means.items()}

    def _call(self, index: int, hidden: Tensor, gone: Collection[int]) -> Tensor:
        if index not in gone:
            return self.stream.call(index, hidden)
        if self.parts is None:
            return hidden
        with _silenced(self.stream.module, [self.parts[index]]):
            return self.stream.call(index, hidden)

    def _through(self, hidden: Tensor, first: int, gone: Collection[int]) -> Tensor:
        for index in range(first, len(self.stream.model.structure.blocks)):
            hidden = self._call(index, hidden, gone)
        return hidden

    def _wanted(self, place: int) -> Tensor:
        """The whole model's log-probabilities, or an encoder's hidden states."""
        output = self.stream.output(place, self._through(self.stream.hidden[place].to(self.stream.device), 0, ()))
        return output.float() if self.is_encoder else output.float().log_softmax(-1)

    def _without(self, place: int, candidates: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
        """Hidden states after the last block, without each candidate in the order of the blocks."""
        hidden = self.stream.hidden[place].to(self.stream.device)
        for index in range(len(self.stream.model.structure.blocks)):
            if index in candidates:
                gone = self.gone | {index}
                yield index, self._through(hidden, index, gone)
            hidden = self._call(index, hidden, self.gone)

    def _weight(self, place: int, wanted: Tensor | None) -> float:
        """What the sums of `_loss` are divided by in the end."""
        batch = self.stream.batches[place]
        if wanted is None:
            return float(batch[:, 1:].numel())
        return float(wanted.double().square().sum()) if self.is_encoder else float(batch.numel())

    def _loss(self, place: int, output: Tensor, wanted: Tensor | None) -> float:
        """Summed over the tokens of a batch."""
        if wanted is None:
            following = self.stream.batches[place][:, 1:].reshape(-1).to(output.device)
            logits = output[:, :-1].float().flatten(0, 1)
            return float(cross_entropy(logits, following, reduction="sum"))
        if self.is_encoder:
            return float((output.float() - wanted).double().square().sum())
        return float(kl_div(output.float().log_softmax(-1), wanted, reduction="sum", log_target=True))
