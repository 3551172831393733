"""Decoding our own files of other layouts, from the formats' descriptions: the twin of what wrote them.

Slow and obvious: each code is put together bit by bit. Used where a layout's own reader is not installed, and by tests.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from compress.errors import InputError

Take = Mapping[str, Tensor]


def read(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder by name, packed weights decoded to float32 (out, in).

    Raises: InputError for a layout that is not known here.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf8"))["quantization_config"]
    method = str(config["quant_method"])
    if method not in DECODERS:
        raise InputError(f"{folder}: quant_method '{method}' is decoded by its own reader only.")
    tensors = stored(folder)
    marker, decode = DECODERS[method]
    modules = [name.removesuffix(f".{marker}") for name in tensors if name.endswith(f".{marker}")]
    if method == "bitsandbytes":  # float weights have the same name
        modules = [name for name in modules if {f"{name}.SCB", f"{name}.weight.absmax"} & set(tensors)]
    found: dict[str, Tensor] = {}
    for module in modules:
        prefix = f"{module}."
        own = {name.removeprefix(prefix): tensors.pop(name) for name in list(tensors) if name.startswith(prefix)}
        found[f"{module}.weight"] = decode(own, _of_module(config, module))
        if "bias" in own:
            found[f"{module}.bias"] = own["bias"]
    return tensors | found


def stored(folder: Path, endings: tuple[str, ...] = ("",)) -> dict[str, Tensor]:
    """All tensors of a folder as they are, or those whose names end so."""
    tensors: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as handle:
            names = [name for name in handle.keys() if name.endswith(endings)]  # noqa: SIM118 (a handle, not a dict)
            tensors |= {name: handle.get_tensor(name) for name in names}
    return tensors


def names(folder: Path) -> list[str]:
    """The names of all tensors of a folder."""
    found: list[str] = []
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as handle:
            found += handle.keys()
    return found


def _of_module(config: Mapping[str, Any], module: str) -> dict[str, Any]:
    """The settings of one module: GPTQModel's `dynamic` has those that differ, by `+:` and a pattern; VPTQ's
    `config_for_layers` all of them."""
    found = {**config, **(config.get("config_for_layers") or {}).get(module, {})}
    for pattern, settings in (config.get("dynamic") or {}).items():
        if pattern.startswith("+:") and re.match(pattern.removeprefix("+:"), module):
            found |= settings
    return found


def stream_codes(words: Tensor, bits: int, count: int) -> Tensor:
    """Codes 0 … count − 1 of each row of int32 words: bit i of code k is bit k · bits + i of the row's stream."""
    row = words.to(torch.int64) & 0xFFFFFFFF
    codes = torch.zeros(words.shape[0], count, dtype=torch.int64)
    place = torch.arange(count) * bits
    for bit in range(bits):
        at = place + bit
        codes |= ((row[:, at // 32] >> (at % 32)) & 1) << bit
    return codes


def awq_codes(words: Tensor) -> Tensor:
    """Codes of AWQ words (rows, n): nibble 0 … 7 of a word is column 0, 2, 4, 6, 1, 3, 5, 7 of its eight."""
    codes = torch.zeros(words.shape[0], words.shape[1] * 8, dtype=torch.int64)
    for nibble, column in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):
        codes[:, column::8] = (words.to(torch.int64) >> (4 * nibble)) & 15
    return codes


def _gptq(own: Take, config: Mapping[str, Any]) -> Tensor:
    bits, (inputs,) = int(config["bits"]), own["g_idx"].shape
    outputs = own["scales"].shape[1]
    codes = stream_codes(own["qweight"].T, bits, inputs).T
    zeros = stream_codes(own["qzeros"], bits, outputs)
    if config["checkpoint_format"] == "gptq":  # version 1 holds them less one
        zeros = zeros + 1
    group = own["g_idx"].long()
    return ((codes - zeros[group]).float() * own["scales"].float()[group]).T.contiguous()


def _awq(own: Take, config: Mapping[str, Any]) -> Tensor:
    codes, zeros = awq_codes(own["qweight"]), awq_codes(own["qzeros"])
    size = int(config["group_size"]) if config["group_size"] > 0 else len(codes)
    group = torch.arange(len(codes)) // size
    return ((codes - zeros[group]).float() * own["scales"].float()[group]).T.contiguous()


def _bitsandbytes(own: Take, config: Mapping[str, Any]) -> Tensor:
    if "SCB" in own:
        return own["weight"].float() * (own["SCB"].float()[:, None] / 127)
    state = json.loads(bytes(own[f"weight.quant_state.bitsandbytes__{config['bnb_4bit_quant_type']}"].tolist()))
    pairs = own["weight"].flatten()
    codes = torch.stack([pairs >> 4, pairs & 15], 1).flatten().long()
    scales = own["weight.absmax"]
    if "weight.nested_absmax" in own:
        place = torch.arange(len(scales)) // state["nested_blocksize"]
        scales = own["weight.nested_quant_map"][scales.long()] * own["weight.nested_absmax"][place]
        scales = scales + state["nested_offset"]
    rows, columns = state["shape"]
    values = own["weight.quant_map"][codes][: rows * columns]
    return (values * scales[torch.arange(rows * columns) // state["blocksize"]]).reshape(rows, columns)


def _aqlm(own: Take, config: Mapping[str, Any]) -> Tensor:
    codes, books = own["codes"].long() % (1 << int(config["nbits_per_codebook"])), own["codebooks"].float()
    total = sum(books[stage][codes[..., stage]] for stage in range(len(books)))  # (rows, units, outputs, inputs)
    assert isinstance(total, Tensor)
    rows, units, height, width = total.shape
    values = total * own["scales"].float()
    return values.transpose(1, 2).reshape(rows * height, units * width)


def _vptq(own: Take, config: Mapping[str, Any]) -> Tensor:
    """Main codes are in the low bits of an index, residual ones above."""
    vector, columns = int(config["vector_lens"][1]), int(config["group_size"])
    bits = [int(config[name][1]).bit_length() - 1 for name in ("num_centroids", "num_res_centroids")]
    bits = bits if "res_centroids.weight" in own else bits[:1]
    groups = []
    for group, words in enumerate(own["indices"]):
        left, values = stream_codes(words, sum(bits), columns), torch.zeros(())
        for name, width in zip(("centroids", "res_centroids"), bits, strict=False):
            book = own[f"{name}.weight"][group].float().reshape(-1, vector)
            values = values + book[left % (1 << width)]  # (rows, columns, vector)
            left = left >> width
        groups.append(values.transpose(1, 2).reshape(-1, columns))
    whole = torch.cat(groups, 1)[: int(config["out_features"])]
    return whole * own["weight_scale"].float() + own["weight_bias"].float()


def _exl3(own: Take, config: Mapping[str, Any]) -> Tensor:
    """A tile's bits are one row, highest first, its words of 16 bits in swapped pairs; a state is the 16 bits that end
    with a symbol, around the end of the row."""
    shape = own["trellis"].shape
    words = (own["trellis"].long() & 0xFFFF).reshape(*shape[:2], -1, 2).flip(-1).flatten(-2)
    bits = shape[-1] // 16
    row = torch.stack([(words >> bit) & 1 for bit in range(15, -1, -1)], -1).flatten(-2)
    ends = (torch.arange(256) + 1) * bits
    state = torch.zeros(*shape[:2], 256, dtype=torch.int64)
    for back in range(16):
        state |= row[..., (ends - 1 - back) % (256 * bits)] << back
    values = _exl3_values(own)[state]  # (in / 16, out / 16, 256)
    inner = torch.empty(values.shape[0] * 16, values.shape[1] * 16)
    for symbol in range(256):
        lane, part = divmod(symbol, 8)
        down = 2 * (lane % 4) + (0, 1, 8, 9)[part % 4]
        inner[down::16, lane // 4 + 8 * (part // 4) :: 16] = values[..., symbol]
    mixer = torch.ones(1, 1)
    for _ in range(7):
        mixer = torch.cat([torch.cat([mixer, mixer], 1), torch.cat([mixer, -mixer], 1)])
    mixer = mixer / 128**0.5
    left = (mixer @ inner.reshape(-1, 128, inner.shape[1])).flatten(0, 1) * own["suh"].float()[:, None]
    whole: Tensor = (left.reshape(len(left), -1, 128) @ mixer).flatten(1) * own["svh"].float()
    return whole.T.contiguous()


def _exl3_values(own: Take) -> Tensor:
    """(65536,) float32: what each state stands for, by the code that the module is marked with."""
    state = torch.arange(1 << 16)
    if "mul1" in own:
        product = state * 0x83DCD12D
        total = torch.stack([(product >> shift) & 0xFF for shift in (0, 8, 16, 24)]).sum(0)
        factor, offset = (
            torch.tensor([0x1EEE, 0xC931 - 0x10000], dtype=torch.int16).view(torch.float16).float().unbind()
        )
        return (total + 1024) * factor + offset
    product = state * 0xCBAC1FED if "mcg" in own else state * 89226354 + 64248484
    halves = torch.stack([(product >> shift) & 0x8FFF ^ 0x3B60 for shift in (0, 16)])
    return (halves - ((halves & 0x8000) << 1)).to(torch.int16).view(torch.float16).float().sum(0)


# quant_method → the tensor by which a packed module is known, and what decodes it
DECODERS: dict[str, tuple[str, Callable[[Take, Mapping[str, Any]], Tensor]]] = {
    "gptq": ("qweight", _gptq),
    "awq": ("qweight", _awq),
    "bitsandbytes": ("weight", _bitsandbytes),
    "aqlm": ("codes", _aqlm),
    "vptq": ("indices", _vptq),
    "exl3": ("trellis", _exl3),
}
