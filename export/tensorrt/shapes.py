"""Ranges of the dynamic axes: what an engine is tuned for and how far it goes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from compress.export.onnx.capture import cache_shapes
from compress.export.onnx.slot_session import STATE
from compress.export.onnx.slots import state
from compress.hwprofiles import Profile
from compress.models.model import Model, Task

Range = tuple[list[int], list[int], list[int]]
"""Smallest, usual and largest shape of one input."""
Ranges = dict[str, Range]


def ranges(model: Model, profile: Profile) -> dict[str, Ranges]:
    """Input ranges by optimization profile: `prefill` and `decode` of a decoder, `whole` of anything else.

    Batches go up to the largest of the profile's grid, positions up to the model's; the usual shape is that of the
    grid's first cell.
    """
    cells = profile.grid.prefill or profile.grid.decode or ((1, 128),)
    batch = max(batch for batch, _ in (*profile.grid.prefill, *profile.grid.decode, (1, 1)))
    first, longest = cells[0][0], model.longest
    if model.image is not None:
        channels, height, width = model.image.shape
        return {"whole": {"images": _range(*([size, channels, height, width] for size in (1, first, batch)))}}
    usual = min(cells[0][1], longest)
    if model.task is Task.ENCODER:
        span: Range = ([1, 1], [first, usual], [batch, longest])
        return {"whole": {"input_ids": span, "attention_mask": span}}
    if model.kv:
        chunk = min(spec.chunk for spec in model.kv)
        rows = (1, first, batch)
        return {
            "prefill": _slots(model, rows, (1, min(usual, chunk), chunk)),
            "decode": _slots(model, rows, (1, 1, 1)),
        }
    after = min((profile.grid.decode or cells)[0][1], longest - 1)
    # a whole prompt at once: sizes of all inputs must fit each other at the largest too, and a past beside the longest
    # prompt would be more positions than the model has
    prefill = _decoder(model, (1, first, batch), (1, usual, longest), (0, 0, 0))
    decode = _decoder(model, (1, first, batch), (1, 1, 1), (0, after, longest - 1))
    return {"prefill": prefill, "decode": decode}


def _range(low: list[int], usual: list[int], high: list[int]) -> Range:
    return low, usual, high


Three = tuple[int, int, int]


def _decoder(model: Model, batch: Three, length: Three, past: Three) -> Ranges:
    total = [old + new for old, new in zip(past, length, strict=True)]  # what the mask spans
    found: Ranges = {
        "input_ids": _range(*([rows, new] for rows, new in zip(batch, length, strict=True))),
        "attention_mask": _range(*([rows, whole] for rows, whole in zip(batch, total, strict=True))),
    }
    for index, (heads, size) in enumerate(cache_shapes(model)):
        for part in ("key", "value"):
            cells = ([rows, heads, old, size] for rows, old in zip(batch, past, strict=True))
            found[f"past_key_values.{index}.{part}"] = _range(*cells)
    return found


def _slots(model: Model, batch: Three, length: Three) -> Ranges:
    """Of a cache that drops tokens (compress/export/onnx/slots.py): its shapes are fixed but for the rows."""
    span = _range(*([rows, new] for rows, new in zip(batch, length, strict=True)))
    found: Ranges = {"input_ids": span, "position_ids": span}
    for index, (spec, (heads, size)) in enumerate(zip(model.kv, cache_shapes(model), strict=True)):
        for name, held in state(spec, heads, size, size).items():
            sizes = [int(each) for each in held.shape[1:]]
            found[f"{STATE}{index}.{name}"] = _range(*([rows, *sizes] for rows in batch))
    return found


def build_command(found: Mapping[str, Ranges], graph: str, engine: str, *, sparse: bool = False) -> str:
    """What builds the engine with TensorRT's own tool on the machine that has the chip.

    Args: sparse: whether some weights are 2:4.
    """
    lines = ["trtexec", f"--onnx={graph}", f"--saveEngine={engine}", "--stronglyTyped"]
    lines += ["--sparsity=enable"] if sparse else []
    for number, inputs in enumerate(found.values()):
        lines.append(f"--profile={number}")
        for place, option in enumerate(("minShapes", "optShapes", "maxShapes")):
            shapes = ",".join(f"{name}:{'x'.join(map(str, span[place]))}" for name, span in inputs.items())
            lines.append(f"--{option}={shapes}")
    return " \\\n  ".join(lines) + "\n"


def as_json(found: Mapping[str, Ranges]) -> dict[str, Any]:
    """The same with lists only."""
    return {name: {value: list(span) for value, span in inputs.items()} for name, inputs in found.items()}
