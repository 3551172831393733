"""prune_experts: fewer experts in each mixture, those that do least dropped or merged into those that stay."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from compress.engine.layer_stats import Stat
from compress.engine.modelpass import Stage
from compress.engine.reshape import ReshapePass
from compress.engine.stream import BlockStream
from compress.errors import UnsupportedError, UsageError
from compress.layer import Layer, LayerKind
from compress.maths.channels import most_important
from compress.maths.merging import averaged, merged
from compress.models import experts
from compress.models.edits import Shape
from compress.models.model import Model
from compress.models.skeleton import OUTER
from compress.records import LayerResult
from compress.wiring.twins import Held
from compress.wiring.widths import cut_layer, number, shapes_of

COUNTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
"""What config.json calls the number of experts."""
CHOSEN = ("num_experts_per_tok", "moe_top_k", "moe_k")
"""What it calls the number that each token goes to."""

By = Literal["output", "weight", "frequency"]


class PruneExperts(ReshapePass):
    """Fewer experts in every mixture of experts, as many in each block, so that a plain config.json says it: the
    router's rows go with them. Each token still goes to as many experts, so the artifact and its memory get smaller and
    a token costs what it did. Blocks are judged with what the blocks before them, already pruned, put out.

    Settings: `drop` how many go, or `keep` how many stay (by default a quarter goes); `by` which stay: those whose
    outputs are largest, times the router's weight and added up over the calibration tokens (`output`; Lasby et al.
    2025, arXiv 2510.13999 eq. 9, take the mean over the tokens routed there), those that the router gives most weight
    to (`weight`) or most tokens (`frequency`); `merge` whether an expert that goes is averaged into the one that stays
    whose weights point most the same way, weighed by the tokens of each (as Li et al. 2024, arXiv 2310.01334 §3.2,
    without aligning their neurons: for experts that were copied from one layer).
    """

    name: ClassVar[str] = "prune_experts"
    needs: ClassVar[frozenset[Stat]] = frozenset({Stat.HESSIAN})  # real inputs; it adds up what it needs by itself

    drop: int | None = Field(default=None, ge=0)
    keep: int | None = Field(default=None, ge=1)
    by: By = "output"
    merge: bool = False

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.drop is not None and self.keep is not None:
            raise UsageError(f"{self.name}: drop says how many go and keep how many stay. Keep one of them.")
        return self

    def check(self, model: Model) -> None:
        if not any(spec.kind is LayerKind.EXPERT for spec in model.structure.layers.values()):
            raise UnsupportedError(f"{self.name}: {model.name} has no mixture of experts.")
        mixtures: dict[int, set[str]] = {}
        for name, spec in model.structure.layers.items():
            if spec.kind is LayerKind.EXPERT:
                mixtures.setdefault(spec.segment, set()).add(experts.owner(name)[0])
        if two := next((sorted(paths) for paths in mixtures.values() if len(paths) > 1), []):
            raise UnsupportedError(f"{self.name}: {two[0]} and {two[1]} are two mixtures in one block.")
        if (number(model, "n_group") or 1) > 1:
            raise UnsupportedError(
                f"{self.name}: the router of {model.name} chooses among groups of experts first (n_group="
                f"{number(model, 'n_group')}), which would no longer be of one size."
            )

    def shape(self, model: Model) -> Shape:
        count, left = _experts(model), self.left(model)
        keys = [key for key in COUNTS if model.raw_config.get(key) == count]
        return Shape(dict.fromkeys(keys or [_count_key(model)], left), model.edits, model.origin)

    def left(self, model: Model) -> int:
        """How many experts stay. Raises: UsageError."""
        count = _experts(model)
        chosen = max((number(model, key) or 1 for key in CHOSEN), default=1)
        gone = max(1, count // 4) if self.drop is None else self.drop
        left = count - gone if self.keep is None else self.keep
        if not chosen <= left <= count:
            asked = f"keep={self.keep}" if self.keep is not None else f"drop={gone}"
            raise UsageError(
                f"{self.name}: {asked} leaves {left} of {count} experts, and each token goes to {chosen}. Allowed: "
                f"keep from {chosen} to {count}, drop from 0 to {count - chosen}."
            )
        return left

    def apply(self, stage: Stage) -> None:
        with torch.no_grad():
            _Dropping(self, stage).run()


def _count_key(model: Model) -> str:
    found = next((key for key in COUNTS if number(model, key) is not None), None)
    if found is None:
        raise UnsupportedError(f"No number in the config of '{model.config.model_type}' is that of its experts.")
    return found


def _experts(model: Model) -> int:
    return number(model, _count_key(model)) or 0


@dataclass
class Use:
    """Of the experts of one mixture over all tokens, each (experts,) float64: tokens, the router's weights, and these
    times the size of what the expert puts out."""

    frequency: Tensor
    weight: Tensor
    output: Tensor


@contextmanager
def watched(module: Any, count: int) -> Iterator[Use]:
    """Meanwhile the use of a mixture's experts is added up."""
    use = Use(*(torch.zeros(count, dtype=torch.float64) for _ in range(3)))
    routed: list[tuple[Tensor, Tensor]] = []

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found = {**dict(zip(("hidden_states", "top_k_index", "top_k_weights"), args, strict=False)), **kwargs}
        routed[:] = [(found["top_k_index"], found["top_k_weights"])]

    def observe(key: str, expert: int, values: Tensor) -> None:
        if key != "down_proj":
            return
        index, weights = routed[0]
        own = weights[index == expert].double()
        matrix = module.down_proj[expert]
        put_out = values @ (matrix if module.is_transposed else matrix.T)
        if module.has_bias:
            put_out = put_out + module.down_proj_bias[expert]
        use.frequency[expert] += len(own)
        use.weight[expert] += float(own.sum())
        use.output[expert] += float((own * put_out.double().norm(dim=-1)).sum())

    handle = module.register_forward_pre_hook(before, with_kwargs=True)
    experts.set_observer(module, observe)
    try:
        yield use
    finally:
        handle.remove()
        experts.set_observer(module, None)


class _Dropping:
    """One run of the pass, block by block."""

    def __init__(self, item: PruneExperts, stage: Stage) -> None:
        assert stage.calibration is not None
        self.item, self.stage, self.model = item, stage, stage.model
        self.count, self.left = _experts(stage.model), item.left(stage.model)
        self.made = stage.reshape(item.shape(stage.model))
        before, after = shapes_of(self.model), shapes_of(self.made)
        self.axes = {
            name: [axis for axis, size in enumerate(before[name]) if size != shape[axis]]
            for name, shape in after.items()
        }
        self.reader = Held({}, self.model.plain(OUTER))
        data, spill = stage.calibration, stage.folder
        self.wide, self.narrow = (
            BlockStream(model, data.batches(), device=stage.device, spill=spill, dtype=data.dtype)
            for model in (self.model, replace(self.made, weights=self.reader))
        )

    def run(self) -> None:
        """All segments."""
        outer, count = self.model.layers(OUTER), len(self.model.structure.blocks)
        first = self._cut(0, self.model.layers(0), self.model.plain(0), torch.arange(self.left))
        self.reader.layers, self.reader.tensors = outer | first[0], self.reader.tensors | first[1]
        self.wide.start(outer)
        self.narrow.start(outer)
        self.narrow.hidden = self.wide.hidden  # one stream: what the narrow blocks put out enters the wide ones
        for index in range(count):
            self.stage.progress.tick("Dropping experts", index, count)
            self._block(index)
            self.stage.progress.tick("Dropping experts", index + 1, count)
        self.stage.put(OUTER, outer, self.model.plain(OUTER))

    def _block(self, index: int) -> None:
        started = time.perf_counter()
        layers, plain = self.model.layers(index), self.model.plain(index)
        path = next((experts.owner(name)[0] for name, x in layers.items() if x.kind is LayerKind.EXPERT), "")
        kept, notes = torch.arange(self.left), dict[int, str]()
        if path and self.left < self.count:
            self.wide.load(index, layers, plain)
            with watched(self.wide.module.get_submodule(path), self.count) as use:
                for hidden in self.wide.hidden:
                    self.wide.call(index, hidden)
            self.wide.release(index)
            kept = most_important(getattr(use, self.item.by), self.left)
            notes = self._notes(use, kept)
            if self.item.merge:
                layers, plain = self._merge(path, layers, plain, kept, use.frequency, notes)
        cut, tensors = self._cut(index, layers, plain, kept)
        self.stage.put(index, cut, tensors)
        self.narrow.load(index, cut, tensors)
        self.narrow.advance(index)
        self.narrow.release(index)
        self._report(notes, layers, time.perf_counter() - started)

    def _notes(self, use: Use, kept: Tensor) -> dict[int, str]:
        tokens = float(use.frequency.sum()) or 1.0
        gone = sorted(set(range(self.count)) - set(kept.tolist()))
        return {one: f"dropped, the least by {self.item.by}: {float(use.frequency[one]) / tokens:.2%} of the tokens' "
                     "choices went to it" for one in gone}  # fmt: skip

    def _merge(
        self,
        path: str,
        layers: Mapping[str, Layer],
        plain: Mapping[str, Tensor],
        kept: Tensor,
        tokens: Tensor,
        notes: dict[int, str],
    ) -> tuple[dict[str, Layer], dict[str, Tensor]]:
        """The experts that stay, each with those that went into it; their biases are plain tensors."""
        names = {name: experts.owner(name) for name, layer in layers.items() if layer.kind is LayerKind.EXPERT}
        keys = sorted({key for _, key, _ in names.values()})
        rows = {
            expert: torch.cat([layers[f"{path}.{key}.{expert}"].float_weight().flatten() for key in keys])
            for expert in range(self.count)
        }
        found, went = merged(rows, kept, tokens)
        changed = dict(layers)
        for expert, row in found.items():
            for key in keys:
                layer = layers[f"{path}.{key}.{expert}"]
                assert isinstance(layer.weight, Tensor)
                part, row = row[: layer.weight.numel()], row[layer.weight.numel() :]
                if expert in went.values():
                    changed[layer.name] = layer.with_weight(part.reshape(layer.shape).to(layer.weight.dtype))
        for expert, near in went.items():
            notes[expert] = notes[expert].replace("dropped", f"merged into expert {near}")
        biases = [name for name in plain if name.startswith(f"{path}.") and self.axes[name] == [0]]
        return changed, {**plain, **{name: averaged(plain[name], went, tokens) for name in biases}}

    def _cut(
        self, index: int, layers: Mapping[str, Layer], plain: Mapping[str, Tensor], kept: Tensor
    ) -> tuple[dict[str, Layer], dict[str, Tensor]]:
        """What is left of a block with experts (n,) int64, by its new names."""
        cut: dict[str, Layer] = {}
        for spec in self.made.structure.segment_layers(index):
            name = spec.name
            if spec.kind is LayerKind.EXPERT:
                path, key, place = experts.owner(spec.name)
                name = f"{path}.{key}.{int(kept[place])}"
            layer = cut_layer(layers[name], rows=kept) if self.axes[spec.name] == [0] else layers[name]
            cut[spec.name] = replace(layer, name=spec.name, users=spec.users)
        tensors = dict(plain)
        for name, tensor in plain.items():
            for axis in self.axes[name]:
                tensors[name] = tensor = tensor.index_select(axis, kept)
        return cut, tensors

    def _report(self, notes: Mapping[int, str], layers: Mapping[str, Layer], seconds: float) -> None:
        names = [name for name, layer in layers.items() if layer.kind is LayerKind.EXPERT]
        for name in names:
            expert = experts.owner(name)[2]
            if expert in notes:
                self.stage.results.append(
                    LayerResult(
                        layer=name,
                        users=(name,),
                        pass_text=str(self.item),
                        changed=True,
                        seconds=seconds / max(1, len(names)),
                        notes=(notes[expert],),
                    )
                )
