"""Models with fewer blocks, or with blocks that lack a part: what config.json says of them, and what only edits can."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from compress.errors import UnsupportedError, UsageError
from compress.models import skeleton
from compress.models.edits import Edit, EditKind, Removed, Shape, reshaped
from compress.models.model import Model, Task
from compress.models.stub import shortened

BlockPart = Literal["attention", "mlp"]
KINDS: dict[BlockPart, EditKind] = {"attention": "no attention", "mlp": "no feed-forward"}
WORDS: dict[BlockPart, str] = {"attention": "attention", "mlp": "feed-forward"}

FIRST = ("first_k_dense_replace", "max_window_layers")
"""Settings that say how many of the first blocks are of another kind."""
NO_LISTS = ("_token_id", "_tokens", "architectures")
"""Ends of the names of settings whose lists are not about blocks, whatever their length."""
INDEX = ("layer_idx", "layer_id", "layer_index", "layer_number")
"""Attributes by which a block knows its place."""
TOKENS = 3


def fewer_blocks(model: Model, kept: Sequence[int]) -> Shape:
    """The model of some of its blocks only, by their places in it, which a plain config.json can say.

    Raises: UnsupportedError where a block would be another one by the config of the shorter model; UsageError where no
    attention would be left.
    """
    path = model.structure.blocks_path
    places = {old: new for new, old in enumerate(kept)}
    edits = []
    for edit in model.edits:
        index = skeleton.segment_of(edit.path, path)
        if index == skeleton.OUTER:
            edits.append(edit)
        elif index in places:
            rest = edit.path[len(f"{path}.{index}") :]
            edits.append(replace(edit, path=f"{path}.{places[index]}{rest}"))
    if sum(edit.kind == "no attention" for edit in edits) >= len(kept):
        raise UsageError("No block that would stay has its attention. Keep one that has.")
    shape = Shape(_config_of(model, kept), tuple(edits), tuple(model.origins[place] for place in kept))
    try:
        made = reshaped(model, shape)
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise UnsupportedError(
            f"{model.source}: no model of these {len(kept)} blocks can be built by its config ({error}). Drop others."
        ) from error
    _check_alike(model, made, kept)
    return shape


def _config_of(model: Model, kept: Sequence[int]) -> dict[str, Any]:
    """What changes in config.json; of a model that has a text model inside, the whole of that part."""
    text, raw = model.config.get_text_config(), model.raw_config
    name = getattr(text, "attribute_map", {}).get("num_hidden_layers", "num_hidden_layers")
    changes: dict[str, Any] = {name: len(kept)}
    settings, count = text.to_dict(), len(model.structure.blocks)
    for key, value in settings.items():
        if key in FIRST and isinstance(value, int):
            changes[key] = sum(place < value for place in kept)
        elif isinstance(value, list) and not key.endswith(NO_LISTS):
            cut = _cut(key, value, kept, count)
            changes |= {} if cut is None else {key: cut}
    inside = next((key for key in raw if isinstance(raw[key], dict) and getattr(model.config, key, None) is text), "")
    return {inside: {**raw[inside], **changes}} if inside else changes


def _cut(key: str, value: list[Any], kept: Sequence[int], count: int) -> list[Any] | None:
    """A list with an entry per block, or with the numbers of some blocks, as the shorter model has it; None for any
    other list."""
    numbers = all(isinstance(item, int) and not isinstance(item, bool) and 0 <= item < count for item in value)
    if numbers and len(set(value)) == len(value) and key.endswith("layers") and (len(value) != count or count > 2):
        return [new for new, old in enumerate(kept) if old in value]
    return [value[place] for place in kept] if len(value) == count else None


def _check_alike(model: Model, made: Model, kept: Sequence[int]) -> None:
    """Raises: UnsupportedError unless each block has the modules, sizes and settings of the one that it was."""
    before, after = model.skeleton(), made.skeleton()
    for new, old in enumerate(kept):
        first = before.get_submodule(model.structure.blocks[old])
        second = after.get_submodule(made.structure.blocks[new])
        was, now = dict(_settings(first)), dict(_settings(second))
        name = next((name for name in (*was, *now) if was.get(name) != now.get(name)), None)
        if name is not None:
            raise UnsupportedError(
                f"{model.structure.blocks[old]} cannot become block {new} of a model of {len(kept)}: its {name} is "
                f"{was.get(name, 'not there')}, and by the config of the shorter model it would be "
                f"{now.get(name, 'not there')}. Drop other blocks, such as whole periods of the pattern that the "
                "config repeats."
            )


def _settings(block: nn.Module) -> Iterator[tuple[str, Any]]:
    """What a block is apart from its weights' values: types, sizes, plain settings; not the index it bears."""
    for name, module in block.named_modules():
        yield f"{name or 'block'} type", type(module).__name__
        for key, parameter in module.named_parameters(recurse=False):
            yield f"{name}.{key} shape".lstrip("."), tuple(parameter.shape)
        for key, value in vars(module).items():
            if isinstance(value, str | int | float | tuple | None) and key not in INDEX and not _tensors(value):
                yield f"{name}.{key}".lstrip("."), value


def _tensors(value: Any) -> bool:
    return isinstance(value, tuple) and any(isinstance(item, Tensor) for item in value)


def without_parts(model: Model, places: Sequence[int], part: BlockPart) -> Shape:
    """The model whose blocks at some places have lost a part, which only edits can say.

    Raises: UnsupportedError where the part is not one module that adds to the stream of hidden states; UsageError where
    no block would keep it, or one has lost it before.
    """
    module = model.skeleton()
    names = [part_path(module, model, place, part) for place in places]
    if len(places) >= len(with_part(model, part)):
        raise UsageError(
            f"No {WORDS[part]} would be left: {len(with_part(model, part))} of the {len(model.structure.blocks)} "
            f"blocks have one, and {len(places)} are to lose it. Drop fewer."
        )
    edits = (*model.edits, *(Edit(name, KINDS[part]) for name in sorted(names)))
    for place, name in zip(places, names, strict=True):
        _check_additive(replace(model, edits=()).skeleton(), model, place, name, part)
    if part == "attention" and model.task is Task.CAUSAL_LM:
        _check_one_cache(model)
    return Shape({}, edits, model.origins)


def with_part(model: Model, part: BlockPart) -> list[int]:
    """The places of the blocks that still have a part."""
    return model.blocks_without(KINDS[part])


def part_path(module: nn.Module, model: Model, place: int, part: BlockPart) -> str:
    """The module that is a part of a block. Raises: UsageError where it is gone already; UnsupportedError where there
    is not one such module."""
    block = model.structure.blocks[place]
    if place not in with_part(model, part):
        raise UsageError(f"{block} has no {WORDS[part]} any more: it was dropped before. Name another block.")
    parts = _with_weights(module.get_submodule(block))
    attention = [name for name in parts if "attn" in name or "attention" in name]
    found = attention if part == "attention" else [name for name in parts if name not in attention]
    if len(found) != 1:
        told = f"in several modules ({', '.join(found)})" if found else "nowhere by the names of its modules"
        raise UnsupportedError(
            f"{block} has its {WORDS[part]} {told}, so it cannot be taken out alone. Drop whole blocks (what=block)."
        )
    return f"{block}.{found[0]}"


def other_parts(module: nn.Module, block: str, part: str) -> list[str]:
    """The modules of a block that have matrices, but for one of them."""
    names = [f"{block}.{name}" for name in _with_weights(module.get_submodule(block))]
    return [name for name in names if name != part]


def _with_weights(block: nn.Module) -> list[str]:
    return [name for name, child in block.named_children() if any(p.ndim > 1 for p in child.parameters())]


def _check_additive(module: nn.Module, model: Model, place: int, name: str, part: BlockPart) -> None:
    """Raises: UnsupportedError unless a block whose other layers put out nothing hands on, without the part, just what
    came in: then all that the part does is add to it."""
    block = module.get_submodule(model.structure.blocks[place])
    base: Any = getattr(module, str(module.base_model_prefix), module)
    blocks = module.get_submodule(model.structure.blocks_path)
    assert isinstance(blocks, nn.ModuleList)
    parent, _, last = name.rpartition(".")
    setattr(module.get_submodule(parent), last, Removed(part == "attention"))
    seen: list[Tensor] = []

    def note(_module: nn.Module, args: Any, settings: Any, output: Any) -> None:
        seen.extend(
            (args[0] if args else settings["hidden_states"], output[0] if isinstance(output, tuple) else output)
        )

    handle = block.register_forward_hook(note, with_kwargs=True)
    generator = torch.Generator().manual_seed(0)
    width = base.get_input_embeddings().weight.shape[1]
    given = torch.randn(1, TOKENS, width, generator=generator)
    settings = {"use_cache": False} if hasattr(module.config, "use_cache") else {}
    reason, cause = "", None
    with torch.no_grad(), shortened(blocks, [block]):
        _fill(base, generator)
        try:
            base(inputs_embeds=given, **settings)
        except (TypeError, ValueError, AttributeError, RuntimeError) as error:
            reason, cause = f"it does not run without ({error})", error
    handle.remove()
    if not reason and not torch.allclose(seen[0], seen[1], rtol=1e-5, atol=1e-6):
        reason = "what comes in does not go on as it is, but through a norm or a factor"
    if reason:
        raise UnsupportedError(
            f"The {WORDS[part]} of {model.structure.blocks[place]} cannot be taken out: without it and with all other "
            f"layers at zero, {reason}. Drop whole blocks (what=block)."
        ) from cause


def _fill(base: nn.Module, generator: torch.Generator) -> None:
    """Zeros for matrices and their biases, random numbers for the vectors of norms; the table of embeddings stays."""
    table = base.get_input_embeddings()  # type: ignore[operator]
    for module in base.modules():
        if module is table:
            continue
        matrix = any(parameter.ndim > 1 for parameter in module.parameters(recurse=False))
        for key, parameter in module._parameters.items():
            if parameter is None:
                continue
            value = torch.zeros(parameter.shape)
            value = value if matrix else torch.randn(parameter.shape, generator=generator) + 2
            module._parameters[key] = nn.Parameter(value, requires_grad=False)


def _check_one_cache(model: Model) -> None:
    """Raises: UnsupportedError for attentions of several kinds: a cache is laid out by the kinds that the config lists
    for all blocks, so those after a gap would find the cache of another kind."""
    kinds = getattr(model.config.get_text_config(), "layer_types", None) or ()
    if len(set(kinds)) > 1:
        raise UnsupportedError(
            f"{model.source} has attentions of several kinds ({', '.join(sorted(set(kinds)))}), whose caches are laid "
            "out by block, so no single attention can be taken out. Drop whole blocks, or what=mlp."
        )
