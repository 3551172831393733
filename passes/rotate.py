"""rotate: turn the hidden states by an orthogonal matrix, folded into the weights, so that no channel stands out."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal, Self

import torch
from pydantic import model_validator
from torch import Tensor

from compress.engine.blockpass import Block
from compress.engine.modelpass import ModelPass, Stage
from compress.engine.part import Part
from compress.engine.stream import BlockStream
from compress.errors import UnsupportedError, UsageError
from compress.layer import Layer, LayerKind, LayerSpec
from compress.maths.rotation import Kind, Rotation, rotation
from compress.models.attention import attentions
from compress.models.model import Model, Task
from compress.models.skeleton import OUTER
from compress.wiring.heads import find_heads, turned_heads
from compress.wiring.residual import LoadedPart, Overlay, Residual, block_part, few_tokens, find_residual, tail_part

TOLERANCE = 1e-4
"""Largest change of what a block adds to the stream, and of the logits, that counts as rounding in float32; plus
`NOISE` of the stream itself, whose large channels are spread over all."""
NOISE = 1e-6


class Rotate(ModelPass):
    """Rotation of the hidden states and of the values (QuaRot, Ashkboos et al. 2024, arXiv 2404.00456 §4, its folded
    part; the names R1 and R2 are those of SpinQuant, arXiv 2405.16406). The gains of RMSNorms move into the weights
    after them; then all that reads the stream of hidden states is multiplied by an orthogonal Q and all that adds to it
    by its inverse (R1), and the values of each head and the inputs of the output layer by another (R2). The model puts
    out the same, at the same cost, but outliers are spread over all channels, so it rounds better. Each block, the
    embedding and the logits are held against the original; what cannot be rotated is refused by name.

    Needs RMSNorms that read the sum itself (Llama, Qwen, Mistral, Mixtral, Phi-3, Gemma 1, …). Tied embeddings part:
    only the head gets the last norm's gain. Weights are written in float32, since rotated they are values of no
    shorter type any more, and rounding them here would come on top of what the next pass rounds.

    Settings: `r1` rotation of the hidden states: `hadamard` with random signs (any orthogonal matrix where no Hadamard
    matrix of that size is known), `random`, `none`; `r2` whether values are rotated; `seed`.
    """

    name: ClassVar[str] = "rotate"
    kinds: ClassVar[frozenset[LayerKind]] = frozenset({LayerKind.LINEAR, LayerKind.EXPERT, LayerKind.EMBEDDING})
    part: ClassVar[Part] = Part.NONE
    rescales: ClassVar[bool] = True
    before: ClassVar[frozenset[Part]] = frozenset({Part.WEIGHT, Part.ACT, Part.PRE})

    r1: Literal["hadamard", "random", "none"] = "hadamard"
    r2: bool = True
    seed: int = 0

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.targets or self.ignore or self.overrides:
            raise UsageError(f"{self.name} turns what all layers share, so it takes no targets, ignore or overrides.")
        if self.r1 == "none" and not self.r2:
            raise UsageError(f"{self.name}: r1=none and r2=false leave nothing to do. Set one of them.")
        return self

    @property
    def whole(self) -> bool:
        return self.r1 != "none"

    def plan(self, spec: LayerSpec) -> LayerSpec:
        return replace(spec, source_dtype=torch.float32) if self.whole else spec

    def check(self, model: Model) -> None:
        if model.image is not None:
            raise UnsupportedError(f"{self.name}: an image classifier has no stream of hidden states to rotate.")
        if model.task is Task.ENCODER and self.r1 != "none":
            raise UnsupportedError(
                f"{self.name}: this model's output is the hidden states themselves, with no head after them, so they "
                "would come out rotated. Leave r1 out (r1=none)."
            )

    def apply(self, stage: Stage) -> None:
        with torch.no_grad():
            _Turning(self, stage).run()


@dataclass
class _Turned:
    """Layers and plain tensors of one segment; layers that are as they were, with why."""

    layers: dict[str, Layer]
    plain: dict[str, Tensor]
    skipped: dict[str, str] = field(default_factory=dict)


class _Turning:
    """One run of the pass: segment by segment, on a few tokens that show how the model is wired."""

    def __init__(self, item: Rotate, stage: Stage) -> None:
        self.item, self.stage = item, stage
        self.overlay = Overlay(stage.model.reader)
        self.model = replace(stage.model, weights=self.overlay)
        self.stream = BlockStream(self.model, [few_tokens(stage.model)], device=stage.device)
        self.outer, self.outer_plain = self.model.layers(OUTER), self.model.plain(OUTER)
        self.turn: Rotation | None = None
        self.rotated = 0

    def run(self) -> None:
        """All segments, the outer one last."""
        self.stream.start(self.outer)
        outer = _Turned(self.outer, self.outer_plain)
        if self.item.r1 != "none":
            outer = self._outer(self.item.r1)
        count = len(self.model.structure.blocks)
        for index in range(count):
            self.stage.progress.tick("Rotating blocks", index, count)
            started = time.perf_counter()
            done = self._block(index)
            seconds = (time.perf_counter() - started) / max(1, len(done.layers))
            self.stage.write(index, done.layers, done.plain, seconds, done.skipped)
            self.stage.progress.tick("Rotating blocks", index + 1, count)
        if self.turn is not None:
            self._check_logits(outer, self.turn)
        elif not self.rotated:
            raise UnsupportedError(
                "rotate: no block has values whose heads can be rotated, and r1=none. There is nothing to do."
            )
        self.stage.write(OUTER, outer.layers, outer.plain, skipped=outer.skipped)

    def _outer(self, kind: Literal["hadamard", "random"]) -> _Turned:
        """Embedding and head rotated, held against the original as far as they go before the blocks."""
        embedding = next(layer for layer in self.outer.values() if layer.kind is LayerKind.EMBEDDING)
        width = self.stream.hidden[0].shape[-1]
        self._refuse_outer(embedding, width)
        turn = rotation(width, kind, torch.Generator().manual_seed(self.item.seed))
        residual = find_residual(tail_part(self.stream, self.overlay, self.outer, self.outer_plain), turn)
        layers, plain = turned(residual, turn, self.outer, self.outer_plain)
        note = "no Hadamard matrix of this width is known, so the rotation is a random one"
        notes = (note,) if kind == "hadamard" and len(turn.core) == width > 1 else ()
        layers[embedding.name] = replace(
            embedding, weight=turn(_plain_weight(embedding)).float(), notes=(*embedding.notes, *notes)
        )
        rotated = self.outer | layers
        entered = BlockStream(self.model, self.stream.batches, device=self.stage.device)
        entered.start(rotated)
        if not _agree(entered.hidden[0], turn(self.stream.hidden[0]).float()):
            others = ", ".join(self.outer_plain) or "a module"
            raise UnsupportedError(
                "rotate: what enters the blocks is not the embedding times a number: a norm, a projection or learned "
                f"positions come in between ({others}). Leave r1 out (r1=none)."
            )
        self.turn = turn
        if self.model.config.get_text_config().tie_word_embeddings:
            self.stage.config["tie_word_embeddings"] = False
        return _Turned(rotated, self.outer_plain | plain, _skipped(self.outer, layers))

    def _refuse_outer(self, embedding: Layer, width: int) -> None:
        if embedding.shape[1] != width:
            raise UnsupportedError(
                f"rotate: {embedding.name} is {embedding.shape[1]} wide and the hidden states {width}: a projection "
                "comes in between. Leave r1 out (r1=none)."
            )

    def _block(self, index: int) -> _Turned:
        layers, plain = self.model.layers(index), self.model.plain(index)
        _refuse_shared(layers)
        self.stream.load(index, layers, plain)
        part = block_part(self.stream, index, layers, plain)
        wanted = self.stream.call(index, part.hidden).clone()
        residual = find_residual(part, self.turn) if self.turn is not None else None
        changed, why = self._turn_values(part, index) if self.item.r2 else ({}, "")
        now, tensors = layers | changed, dict[str, Tensor]()
        if residual is not None and self.turn is not None:
            changed |= (found := turned(residual, self.turn, now, plain))[0]
            tensors = found[1]
            changed |= {name: _noted(changed[name], why) for name in residual.writers if why and name in changed}
        changed = {name: _short(layer) for name, layer in changed.items()}
        done = _Turned(layers | changed, plain | tensors, _skipped(layers, changed))
        self._check_block(index, part, done, wanted)
        self.stream.advance(index, [wanted])
        self.stream.release(index)
        return done

    def _turn_values(self, part: LoadedPart, index: int) -> tuple[dict[str, Layer], str]:
        """Values and output layer rotated, or why they are not."""
        size = attentions(self.model.config.get_text_config())[index].size
        maker = torch.Generator().manual_seed(self.item.seed + 1 + index)
        kind: Kind = "random" if self.item.r1 == "random" else "hadamard"
        block = Block(part.name, part.layers, part.layers, {}, part.plain, {}, self.stream.runner(index))
        heads = find_heads(block, size, rotation(size, kind, maker))
        if heads is None:
            return {}, f"only by r1: no values were found in {part.name} whose heads of {size} can be rotated"
        self.rotated += 1
        turns = [rotation(size, kind, maker) for _ in range(heads.count)]
        return turned_heads(heads, turns, part.layers), ""

    def _check_block(self, index: int, part: LoadedPart, done: _Turned, wanted: Tensor) -> None:
        """Raises: UnsupportedError unless the block now puts out what it did, turned."""
        self.stream.release(index)
        self.stream.load(index, done.layers, done.plain)
        given = part.hidden
        if self.turn is not None:
            given, wanted = self.turn(part.hidden).float(), self.turn(wanted.cpu()).float()
        if not _agree(self.stream.call(index, given), wanted, given):
            raise UnsupportedError(
                f"rotate: {part.name} does not put out the same once its weights are rotated, so it does something "
                "with the hidden states that its weights and norms do not show. Leave r1 out (r1=none), or the pass."
            )

    def _check_logits(self, outer: _Turned, turn: Rotation) -> None:
        """Raises: UnsupportedError unless the head puts out what it did."""
        [wanted] = self.stream.logits()
        self.stream.outer, self.stream.hidden[0] = outer.layers, turn(self.stream.hidden[0]).float()
        self.overlay.changed.update(outer.plain)
        [found] = self.stream.logits()
        if not _agree(found, wanted):
            raise UnsupportedError(
                "rotate: the logits change when the head is rotated, so it reads the hidden states in another way than "
                "through its weight. Leave r1 out (r1=none)."
            )


def turned(
    residual: Residual, turn: Rotation, layers: Mapping[str, Layer], plain: Mapping[str, Tensor]
) -> tuple[dict[str, Layer], dict[str, Tensor]]:
    """The layers and plain tensors that change, computed in float64: readers W diag(γ) Q, writers Qᵀ W and b Q, norms
    with a gain of one."""
    gains = {path: offset + plain[f"{path}.weight"].double() for path, offset in residual.norms.items()}
    changed: dict[str, Layer] = {}
    tensors = {
        f"{path}.weight": torch.full_like(plain[f"{path}.weight"], 1 - offset)
        for path, offset in residual.norms.items()
    }
    for name, path in residual.readers.items():
        gain = gains[path] if path else torch.ones(turn.order, dtype=torch.float64)
        if name in layers:
            changed[name] = layers[name].with_weight(turn(_plain_weight(layers[name]) * gain))
        else:
            tensors[name] = turn(plain[name].double() * gain).float()
    for name in residual.writers:
        if name in layers:
            layer = changed.get(name, layers[name])
            bias = None if layer.bias is None else turn(layer.bias)
            changed[name] = replace(layer, weight=turn(_plain_weight(layer).T).T.contiguous(), bias=bias)
        else:
            tensors[name] = turn(plain[name]).float()
    return {name: _short(layer) for name, layer in changed.items()}, tensors


def _plain_weight(layer: Layer) -> Tensor:
    assert isinstance(layer.weight, Tensor), layer.name  # the order of passes is checked before
    return layer.weight.double()


def _short(layer: Layer) -> Layer:
    """In float32."""
    bias = None if layer.bias is None else layer.bias.float()
    return replace(layer, weight=_plain_weight(layer).float().contiguous(), bias=bias)


def _noted(layer: Layer, note: str) -> Layer:
    return replace(layer, notes=(*layer.notes, note))


def _skipped(layers: Mapping[str, Layer], changed: Mapping[str, Layer]) -> dict[str, str]:
    return {name: "neither reads nor writes what is rotated" for name in layers if name not in changed}


def _refuse_shared(layers: Mapping[str, Layer]) -> None:
    for layer in layers.values():
        if len(layer.users) > 1:
            raise UnsupportedError(f"rotate: {layer.name} shares its weight with {layer.users[1]}, so it cannot turn.")


def _agree(found: Tensor, wanted: Tensor, given: Tensor | None = None) -> bool:
    """Whether both differ by rounding, as a share of what is added to `given`."""
    found, wanted = found.double().cpu(), wanted.double().cpu()
    start = torch.zeros_like(wanted) if given is None else given.double().cpu()
    allowed = TOLERANCE * torch.linalg.vector_norm(wanted - start) + NOISE * torch.linalg.vector_norm(start)
    return bool(torch.linalg.vector_norm(found - wanted) <= allowed)
