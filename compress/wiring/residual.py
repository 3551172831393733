"""The residual stream of a model: which norms and weights read it, which layers add to it. Found by running it.

With every layer's output held at zero a block passes its input on, x; so norms that are given x read the stream. Then
their gains are set to one and x is exchanged for x Q, Q orthogonal: a weight whose input v follows as v Q reads the
stream through a gain alone, one whose input stays as it is does not read it. And what a single layer is made to put
out, δ, appears in the block's output as x + c δ (one c per token) if it adds to the stream, and not at all if it does
not. Whatever else is seen is refused by name. Cost: four runs of a block, and one for each layer as wide as the stream.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from compress.engine.stream import BlockStream
from compress.errors import UnsupportedError
from compress.layer import Layer, LayerKind, LayerSpec
from compress.maths.rotation import Rotation
from compress.models import experts, placing
from compress.models.model import Model
from compress.models.reader import Reader
from compress.wiring.tracing import Call, Trace, same, watching

ROUNDING = 1e-3
"""Largest difference, as a share of what is compared, that counts as rounding: tells alike from unlike."""

TOKENS = 16
"""On which each part is watched and held against the original."""

REFUSED = "So a rotation would change what the model puts out. Leave r1 out (r1=none), or choose another pass."


@dataclass(frozen=True)
class LoadedPart:
    """A loaded block, or what comes after the blocks.

    root: the whole tree; modules: its modules by path; layers, plain: all of its layers and other tensors; hidden
    (batch, length, n): its input; call: hidden states → output; put: exchanges plain tensors; adds: whether it is a
    block, which adds to its input.
    """

    name: str
    root: nn.Module
    modules: Mapping[str, nn.Module]
    layers: Mapping[str, Layer]
    plain: Mapping[str, Tensor]
    hidden: Tensor
    call: Callable[[Tensor], Tensor]
    put: Callable[[Mapping[str, Tensor]], None]
    adds: bool = True


@dataclass(frozen=True)
class Residual:
    """Who reads and who writes the stream in one part.

    norms: path → what the norm adds to its weight to get its gain (1 in Gemma's); readers: layer or 2-D plain tensor →
    the norm that feeds it, "" without a gain; writers: layers, and plain tensors (…, n), that are added to the stream.
    """

    norms: Mapping[str, float]
    readers: Mapping[str, str]
    writers: tuple[str, ...]


class Overlay:
    """A reader in which some plain tensors are others: `changed`, which may be exchanged at any time."""

    def __init__(self, base: Reader) -> None:
        self.base = base
        self.changed: dict[str, Tensor] = {}

    def layer(self, spec: LayerSpec) -> Layer:
        """One layer, as it was."""
        return self.base.layer(spec)

    def plain(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Tensors that are no layer's."""
        names = tuple(names)
        kept = self.base.plain(name for name in names if name not in self.changed)
        return {name: self.changed[name] if name in self.changed else kept[name] for name in names}

    def dtype(self, name: str) -> torch.dtype:
        """Stored dtype of a parameter."""
        return self.base.dtype(name)

    def release(self) -> None:
        """Let go of opened files."""
        self.base.release()

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        return self.base.nbytes


def block_part(stream: BlockStream, index: int, layers: Mapping[str, Layer], plain: Mapping[str, Tensor]) -> LoadedPart:
    """A loaded block on its first batch."""
    name = stream.model.structure.blocks[index]
    modules = dict(stream.module.get_submodule(name).named_modules(prefix=name))

    def put(tensors: Mapping[str, Tensor]) -> None:
        placing.put_plain(stream.module, {key: one.to(stream.device) for key, one in tensors.items()}, {})

    hidden = stream.hidden[0].clone()
    return LoadedPart(name, stream.module, modules, layers, plain, hidden, lambda given: stream.call(index, given), put)


def tail_part(
    stream: BlockStream, overlay: Overlay, layers: Mapping[str, Layer], plain: Mapping[str, Tensor]
) -> LoadedPart:
    """What comes after the blocks, on what enters the first of them. overlay: the reader of the stream's model."""
    inner = stream.model.structure.blocks_path + "."
    modules = {name: module for name, module in stream.module.named_modules() if not name.startswith(inner)}

    def put(tensors: Mapping[str, Tensor]) -> None:
        overlay.changed.update(tensors)
        placing.put_plain(stream.module, {key: one.to(stream.device) for key, one in tensors.items()}, {})

    def call(given: Tensor) -> Tensor:
        kept, stream.hidden[0] = stream.hidden[0], given
        [output] = stream.logits()
        stream.hidden[0] = kept
        return output

    hidden = stream.hidden[0].clone()
    return LoadedPart("the part after the blocks", stream.module, modules, layers, plain, hidden, call, put, adds=False)


def few_tokens(model: Model) -> Tensor:
    """(1, T) int64: random ids, unlike each other, so that what mixes tokens or channels shows."""
    length = min(TOKENS, model.longest, model.vocabulary)
    return torch.randperm(model.vocabulary, generator=torch.Generator().manual_seed(0))[None, :length]


def find_residual(part: LoadedPart, turn: Rotation) -> Residual:
    """Find readers and writers; the part is left as it was. turn: of the stream's width.

    Raises: UnsupportedError naming what a rotation of the stream cannot pass.
    """
    with torch.no_grad():
        trace = _quiet(part, part.hidden)
        if part.adds and not _close(trace.output, part.hidden):
            raise UnsupportedError(
                f"{part.name} does not add to the hidden states that enter it: a norm or a factor comes after the sum "
                f"(as in BERT). {REFUSED}"
            )
        norms = _norms(part, trace, turn)
        readers = _readers(part, norms, turn)
        writers = _writers(part) if part.adds else ()
    return Residual({path: offset for path, (offset, _) in norms.items()}, readers, writers)


def _quiet(part: LoadedPart, hidden: Tensor, instead: Mapping[str, Tensor] | None = None) -> Trace:
    """A run in which each layer, and each mixture of experts as one, puts out zeros, or what `instead` has for it."""
    paths = {experts.owner(name)[0] if layer.kind is LayerKind.EXPERT else name for name, layer in part.layers.items()}
    embeddings = {name for name, layer in part.layers.items() if layer.kind is LayerKind.EMBEDDING}
    with ExitStack() as stack:
        for path in sorted(paths - embeddings):
            hook = _putting((instead or {}).get(path))
            stack.callback(part.root.get_submodule(path).register_forward_hook(hook).remove)
        with watching(part.modules.items()) as trace:
            trace.output = part.call(hidden)
    return trace


def _putting(value: Tensor | None) -> Callable[[nn.Module, Any, Tensor], Tensor]:
    def put(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        return torch.zeros_like(output) if value is None else value.to(output).reshape(output.shape)

    return put


def _norms(part: LoadedPart, trace: Trace, turn: Rotation) -> dict[str, tuple[float, Tensor]]:
    """Norms that are given the stream itself: path → (offset, the weight with which the gain is one)."""
    found: dict[str, tuple[float, Tensor]] = {}
    for call in trace.calls:
        weight, entered = part.plain.get(f"{call.path}.weight"), call.inputs
        if weight is None or weight.ndim != 1 or len(weight) != turn.order or entered is None:
            continue
        if entered.numel() != part.hidden.numel() or not _close(entered.reshape(part.hidden.shape), part.hidden):
            continue
        found[call.path] = _unit(part, call, weight, turn)
    return found


def _unit(part: LoadedPart, call: Call, weight: Tensor, turn: Rotation) -> tuple[float, Tensor]:
    """Raises: UnsupportedError where it is no gain on something that turns with the input."""
    name = type(call.module).__name__
    nothing, one = (_output(part, call, weight, value) for value in (0.0, 1.0))
    for offset, known in ((0.0, torch.zeros_like(one)), (1.0, one / 2)):
        if _close(nothing, known, one):
            gain = torch.full_like(weight, 1 - offset)
            plain = _output(part, call, weight, 1 - offset)
            turned = _output(part, call, weight, 1 - offset, turn)
            if f"{call.path}.bias" not in part.plain and _close(turned, turn(plain.cpu())):
                return offset, gain
    raise UnsupportedError(
        f"{call.path} ({name}) is no RMSNorm: it does more than divide the hidden states by their size and multiply by "
        f"a gain (a LayerNorm takes off the mean and adds a bias). {REFUSED}"
    )


def _output(part: LoadedPart, call: Call, weight: Tensor, value: float, turn: Rotation | None = None) -> Tensor:
    """What a norm puts out with a constant weight, and with its input turned."""
    entered = call.inputs
    assert entered is not None
    given = entered if turn is None else turn(entered.cpu()).to(entered)
    with _tensors(part, {f"{call.path}.weight": torch.full_like(weight, value)}):
        output: Tensor = call.module(given)
    return output


@contextmanager
def _tensors(part: LoadedPart, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Some plain tensors of the part are others meanwhile."""
    part.put(tensors)
    try:
        yield
    finally:
        part.put({name: part.plain[name] for name in tensors})


def _readers(part: LoadedPart, norms: Mapping[str, tuple[float, Tensor]], turn: Rotation) -> dict[str, str]:
    found: dict[str, str] = {}
    with _tensors(part, {f"{path}.weight": gain for path, (_, gain) in norms.items()}):
        before = _quiet(part, part.hidden)
        after = _quiet(part, turn(part.hidden.cpu()).to(part.hidden))
    made = {call.path: call.output for call in before.calls if call.path in norms}
    for call, turned in zip(before.calls, after.calls, strict=True):
        if call.path in norms or call.inputs is None or turned.inputs is None or not call.inputs.is_floating_point():
            continue
        if _close(turned.inputs, call.inputs):
            continue
        if call.inputs.shape[-1] != turn.order or not _close(turned.inputs, turn(call.inputs.cpu())):
            raise UnsupportedError(
                f"What enters {call.path} follows the hidden states otherwise than through an RMSNorm. {REFUSED}"
            )
        source = next((path for path, output in made.items() if same(output, call.inputs)), "")
        found |= dict.fromkeys(_weights(part, call, turn.order), source)
    return found


def _weights(part: LoadedPart, call: Call, width: int) -> list[str]:
    """Layers or the plain tensor that a module multiplies its input by."""
    weight = part.plain.get(f"{call.path}.weight")
    if call.path in part.layers:
        return [call.path]
    if experts.is_experts(call.module):
        first = f"{call.path}.{experts.up_key(call.module)}."
        return [name for name in part.layers if name.startswith(first)]
    if weight is not None and weight.ndim == 2 and weight.shape[1] == width:
        return [f"{call.path}.weight"]
    raise UnsupportedError(
        f"{call.path} ({type(call.module).__name__}) reads the hidden states but has no weight matrix to rotate. "
        f"{REFUSED}"
    )


def _writers(part: LoadedPart) -> tuple[str, ...]:
    maker = torch.Generator().manual_seed(0)
    hidden = part.hidden.cpu()
    shift = torch.randn(hidden.shape, generator=maker) * hidden.square().mean().sqrt()
    found: list[str] = []
    for path, names in _candidates(part, hidden.shape[-1]).items():
        output = _quiet(part, part.hidden, {path: shift}).output.cpu()
        added = (output - hidden).double()
        if _close(output, hidden):
            continue
        factor = (added * shift).sum(-1, keepdim=True) / shift.double().square().sum(-1, keepdim=True)
        if not _close(added, factor * shift) or _renormed(part, path):
            raise UnsupportedError(
                f"What {path} puts out is not simply added to the hidden states: a norm or a gain per channel comes in "
                f"between (as after the attention of Gemma 2 and 3). {REFUSED}"
            )
        found += names
    return tuple(found)


def _renormed(part: LoadedPart, path: str) -> bool:
    """Whether a mixture has a norm after each expert, which no run shows where the mixture's output is replaced."""
    return bool(getattr(part.root.get_submodule(path), "has_post_expert_norm", False))


def _candidates(part: LoadedPart, width: int) -> dict[str, list[str]]:
    """Module path → what would be rotated if it wrote to the stream."""
    found: dict[str, list[str]] = {}
    for name, layer in part.layers.items():
        if layer.shape[0] != width:
            continue
        path, key, _ = experts.owner(name) if layer.kind is LayerKind.EXPERT else (name, "", 0)
        if key in ("", "down_proj"):
            found.setdefault(path, []).append(name)
    for path, names in found.items():
        if f"{path}.down_proj_bias" in part.plain:
            names.append(f"{path}.down_proj_bias")
    return found


def _close(found: Tensor, wanted: Tensor, scale: Tensor | None = None) -> bool:
    """Whether two tensors differ by rounding, as a share of the second or of `scale`."""
    if found.shape != wanted.shape:
        return False
    found, wanted = found.double().cpu(), wanted.double().cpu()
    size = torch.linalg.vector_norm(wanted if scale is None else scale.double().cpu())
    return bool(torch.linalg.vector_norm(found - wanted) <= ROUNDING * size)
