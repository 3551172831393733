"""Which scales a block lets fold into what: found by watching it run, and checked by running it with a scale folded in.

Nothing is taken from module names. Candidates are norms and the layers that are fed their very output, and layers
whose output reaches another layer channel by channel, scaled alone (values through the attention, `up` of a gated MLP,
anything through ReLU). A candidate is kept only if the block puts out the same with random powers of two folded in,
which floating point arithmetic carries through exactly; a residual, a router or a gate that was overlooked fails
there. Cost: 2 runs of the block on one batch; with pairs 4 to 6, and one more for each folding once one fails.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from compress.engine.blockpass import Block, Runner
from compress.layer import Layer, LayerKind
from compress.models import experts
from compress.wiring.folding import Folding, fold
from compress.wiring.tracing import Call, Trace, replaced, run, same

# Largest change of the block's output, relative to what the block adds to its input, that counts as rounding.
TOLERANCE = 1e-4
# Largest part of a layer's input that may not follow the factors of another layer's rows: rounding in the attention.
RESIDUE = 1e-4
# A layer's input comes from one of the layers last run before it: values after queries and keys, up after gate.
NEAREST = 3


@dataclass(frozen=True)
class Wiring:
    """foldings: those that hold; refused: every other layer of the block → why nothing folds into what feeds it."""

    foldings: tuple[Folding, ...]
    refused: Mapping[str, str]


def wire(block: Block, *, pairs: bool) -> Wiring:
    """The foldings of a loaded block, in the order in which it runs.

    Args: pairs: also look for layers that feed layers; otherwise only norms do.
    Returns: see Wiring. Where a block has no runner (outside the blocks) every layer is refused.
    """
    if block.runner is None:
        return Wiring((), dict.fromkeys(block.layers, f"{block.name} nothing is folded"))
    maker = torch.Generator().manual_seed(0)
    with torch.no_grad():
        trace = run(block, block.runner)
        found, refused = _norms(block, block.runner, trace, maker)
        if pairs:
            fed = {name for folding in found for name in folding.consumers} | set(refused)
            found += _pairs(block, block.runner, trace, fed)
        found = _without_obstacles(block, found, refused)
        kept = _kept(block, block.runner, found, trace, refused, maker)
    consumers = {name for folding in kept for name in folding.consumers}
    others = "no norm or layer of this block feeds it by a gain alone" if pairs else "no norm of this block feeds it"
    reasons = {name: refused.get(name, others) for name in block.layers if name not in consumers}
    return Wiring(tuple(kept), reasons)


def _powers(count: int, maker: torch.Generator) -> Tensor:
    """(count,) random powers of two, ⅛ … 8: scaling by them rounds nothing."""
    return torch.exp2(torch.randint(-3, 4, (count,), generator=maker).float())


def _norms(block: Block, runner: Runner, trace: Trace, maker: torch.Generator) -> tuple[list[Folding], dict[str, str]]:
    """Norms and the layers that are fed their output; layers whose norm is ruled out, with why."""
    found: list[Folding] = []
    refused: dict[str, str] = {}
    for call in trace.calls:
        gain = block.plain.get(f"{call.path}.weight")
        own = {key for key, _ in call.module.named_parameters(recurse=False)}
        if gain is None or gain.ndim != 1 or not own <= {"weight", "bias"}:
            continue
        consumers, plain, strangers = _readers(block, trace, call.output, len(gain))
        if not consumers:
            continue
        folding = Folding(call.path, consumers, plain, len(gain), torch.arange(len(gain)), 0.0)
        offset = _offset(block, runner, call, folding, maker)
        if strangers:
            reason = f"{call.path}, which feeds it, also feeds {strangers[0]}, which has no weight to scale"
        else:
            reason = f"{call.path}, which feeds it, is no gain per channel"
        if strangers or offset is None:
            refused |= dict.fromkeys(consumers, reason)
        else:
            found.append(replace(folding, offset=offset))
    return found, refused


def _readers(
    block: Block, trace: Trace, output: Any, width: int
) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
    """Who is fed a tensor: layers, plain weights, and modules that are neither."""
    layers: list[str] = []
    plain: list[str] = []
    strangers: list[str] = []
    for call in trace.calls:
        if not same(output, call.inputs):
            continue
        weight = block.plain.get(f"{call.path}.weight")
        if call.path in block.layers and block.layers[call.path].shape[1] == width:  # a convolution's need not be
            layers.append(call.path)
        elif experts.is_experts(call.module):
            first = f"{call.path}.{experts.up_key(call.module)}."
            layers += [name for name in block.layers if name.startswith(first)]
        elif weight is not None and weight.ndim == 2 and weight.shape[1] == width:
            plain.append(f"{call.path}.weight")
        else:
            strangers.append(call.path)
    return tuple(dict.fromkeys(layers)), tuple(dict.fromkeys(plain)), tuple(strangers)


def _offset(block: Block, runner: Runner, call: Call, folding: Folding, maker: torch.Generator) -> float | None:
    """What the norm adds to its weight: the value with which folding a scale divides its output by that scale."""
    scale = _powers(folding.channels, maker)
    only_norm = replace(folding, consumers=(), plain=())
    for offset in (0.0, 1.0):
        _, plain = fold(replace(only_norm, offset=offset), scale, block.layers, block.plain)
        with replaced(runner, block, {}, plain):
            output = call.module(*call.args, **call.kwargs)
        expected = call.output / scale.to(call.output.device)
        if float((output - expected).abs().max()) <= 1e-5 * float(expected.abs().max()):
            return offset
    return None


def _pairs(block: Block, runner: Runner, trace: Trace, fed: set[str]) -> list[Folding]:
    """Layers whose rows reach other layers channel by channel; `fed`: layers whose producer is known."""
    found: list[Folding] = []
    order = [call.path for call in trace.calls if _is_linear(block, call.path)]
    for place, name in enumerate(order):
        if name in fed:
            continue
        inputs = trace.entering(name)
        consumers, plain, strangers = _readers(block, trace, inputs, block.layers[name].shape[1])
        fed |= set(consumers)
        if strangers:
            continue
        for producer in [other for other in order[:place][::-1] if other not in consumers][:NEAREST]:
            rows = _row_map(block, runner, trace, [(producer, name)])
            if rows is not None:
                found.append(Folding(producer, consumers, plain, block.layers[producer].shape[0], rows))
                break
    for call in trace.calls:
        if experts.is_experts(call.module):
            found += _expert_pairs(block, runner, trace, call)
    return found


def _is_linear(block: Block, name: str) -> bool:
    return name in block.layers and block.layers[name].kind is LayerKind.LINEAR


def _expert_pairs(block: Block, runner: Runner, trace: Trace, call: Call) -> list[Folding]:
    """The first product of each expert and its second; all run the same code, so one map serves every expert."""
    first, second = f"{call.path}.{experts.up_key(call.module)}.", f"{call.path}.down_proj."
    names = [name.removeprefix(first) for name in block.layers if name.startswith(first)]
    rows = _row_map(block, runner, trace, [(first + name, second + name) for name in names])
    if rows is None:
        return []
    count = block.layers[first + names[0]].shape[0]
    return [Folding(first + name, (second + name,), (), count, rows) for name in names]


def _row_map(block: Block, runner: Runner, trace: Trace, pairs: list[tuple[str, str]]) -> Tensor | None:
    """Which row of a layer makes each input of another, (in,) int64 and −1 where an input was never on; None where
    they are not tied by gains alone. Read off the inputs when each row has a factor of its own.

    Args: pairs: (producer, consumer), all wired alike; the one that was fed the most tokens is read.
    """
    live = [(*pair, entering) for pair in pairs if (entering := trace.entering(pair[1])) is not None]
    if not live or any(block.layers[name].format is not None for name, _ in pairs):
        return None
    producer, consumer, before = max(live, key=lambda item: item[2].numel())
    count, width = block.layers[producer].shape[0], before.shape[-1]
    for start in _starts(count, width):
        factors = torch.ones(count)
        factors[start:] = torch.exp2(torch.linspace(-3, 3, count - start))
        layers: dict[str, Layer] = {}
        for name, _ in pairs:
            spare = Folding(name, (), (), count, torch.arange(count))
            layers |= fold(spare, 1 / factors, block.layers, block.plain)[0]
        with replaced(runner, block, layers, {}):
            after = run(block, runner).entering(consumer)
        if after is None or after.shape != before.shape:
            continue  # the other rows decide where tokens go
        rows = _read_factors(before, after, factors[start:])
        if rows is not None:
            return torch.where(rows < 0, rows, rows + start)
    return None


def _starts(count: int, width: int) -> list[int]:
    """From which row on a layer with `count` rows may make an input of this width: all of it, alone or repeated for
    groups of heads; its last part where several are stored as one (gate and up; queries, keys and values)."""
    if width % count == 0:
        return [0]
    if count < width:
        return []
    grouped = (count - width) // 2  # rows of the values, beside `width` of the queries
    found = [count - width]
    if (count - width) % 2 == 0 and grouped < width and width % grouped == 0:
        found.append(count - grouped)
    return found


def _read_factors(before: Tensor, after: Tensor, factors: Tensor) -> Tensor | None:
    """For each last-axis channel the place of the factor by which it grew, −1 if it is always 0; None if some channel
    did not just grow by one factor."""
    before = before.reshape(-1, before.shape[-1]).double().cpu()
    after = after.reshape(-1, after.shape[-1]).double().cpu()
    power = before.square().sum(0)
    ratio = (before * after).sum(0) / power.clamp(min=torch.finfo(torch.float64).tiny)
    off = (after - ratio * before).square().sum(0) > RESIDUE**2 * after.square().sum(0)
    if bool((off | (ratio <= 0))[power > 0].any()) or not bool((power > 0).any()):
        return None
    edges = (factors[1:] * factors[:-1]).sqrt().double()
    place = torch.bucketize(ratio, edges)
    exact = (ratio / factors.double()[place] - 1).abs() < 1e-4
    if not bool(exact[power > 0].all()):
        return None
    return torch.where(power > 0, place, -1)


def _without_obstacles(block: Block, found: list[Folding], refused: dict[str, str]) -> list[Folding]:
    """Foldings whose layers may all be rescaled; `refused` takes the others."""
    kept = []
    for folding in found:
        reason = _obstacle(block, folding)
        if reason:
            refused |= dict.fromkeys(folding.consumers, reason)
        else:
            kept.append(folding)
    return kept


def _obstacle(block: Block, folding: Folding) -> str:
    producer = () if folding.offset is not None else (folding.producer,)
    for name in (*folding.consumers, *producer):
        layer = block.layers[name]
        if layer.format is not None:
            return f"{name}, which would have to be rescaled too, is quantized already"
        if layer.act is not None and name in folding.consumers:
            return f"the input of {name}, which would have to be rescaled too, is rounded already"
        if len(layer.users) > 1:
            return f"{name}, which would have to be rescaled too, shares its weight with {layer.users[1]}"
    return ""


def _kept(
    block: Block, runner: Runner, found: list[Folding], trace: Trace, refused: dict[str, str], maker: torch.Generator
) -> list[Folding]:
    """The foldings that leave the block's output as it is: all at once, or those that do so one by one."""
    if not found or _holds(block, runner, found, trace, maker):
        return found
    kept = []
    for group in _together(found, block):
        if _holds(block, runner, group, trace, maker):
            kept += group
            continue
        for folding in group:
            listed = ", ".join(folding.consumers[:3]) + (" …" if len(folding.consumers) > 3 else "")
            reason = (
                f"what {folding.producer} puts out goes elsewhere too than to {listed} (a residual, an operation "
                "without a weight): with a scale folded in, the block no longer puts out the same"
            )
            refused |= dict.fromkeys(folding.consumers, reason)
    return kept


def _together(found: list[Folding], block: Block) -> list[list[Folding]]:
    """Experts of a mixture stand or fall together; every other folding alone."""
    groups: dict[str, list[Folding]] = {}
    for folding in found:
        layer = block.layers.get(folding.producer)
        is_expert = layer is not None and layer.kind is LayerKind.EXPERT
        groups.setdefault(experts.owner(folding.producer)[0] if is_expert else folding.producer, []).append(folding)
    return list(groups.values())


def _holds(block: Block, runner: Runner, group: list[Folding], trace: Trace, maker: torch.Generator) -> bool:
    layers, plain = dict(block.layers), dict(block.plain)
    touched: dict[str, Layer] = {}
    tensors: dict[str, Tensor] = {}
    for folding in group:
        changed, changed_plain = fold(folding, _powers(folding.channels, maker), layers, plain)
        layers, plain = layers | changed, plain | changed_plain
        touched, tensors = touched | changed, tensors | changed_plain
    with replaced(runner, block, touched, tensors):
        output = runner.forward(0)
    added = torch.linalg.vector_norm((trace.output - runner.inputs(0).to(trace.output.device)).double())
    return bool(torch.linalg.vector_norm((output - trace.output).double()) <= TOLERANCE * added)
