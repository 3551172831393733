"""Codes into machine words: pure functions on tensors. Codes are unsigned and lie below 2^bits."""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from compress.maths import grid

# Which of eight neighbouring columns is in each nibble of an AWQ word, lowest first (AutoAWQ's GEMM kernel).
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def pack_words(codes: Tensor, bits: int) -> Tensor:
    """(rows, n) codes → (rows, ceil(n · bits / 32)) int32: one stream of bits per row, lowest bits first.

    A code may cross from one word into the next (3, 5, 6 and 7 bits): GPTQ's 3-bit layout, and compressed-tensors'
    since May 2026.
    """
    packed = grid.pack_bits(codes, bits)
    filled = torch.nn.functional.pad(packed, (0, -packed.shape[1] % 4)).reshape(-1)
    if sys.byteorder == "big":  # a word's lowest bits are in its last byte
        filled = filled.reshape(-1, 4).flip(-1).reshape(-1)
    return filled.view(torch.int32).reshape(len(codes), -1)


def pack_awq(codes: Tensor) -> Tensor:
    """(rows, n) 4-bit codes → (rows, n / 8) int32, the nibbles of a word in `AWQ_ORDER`. n is a multiple of 8."""
    rows = codes.shape[0]
    return pack_words(codes.reshape(rows, -1, 8)[:, :, AWQ_ORDER].reshape(rows, -1), 4)


def wrap_codes(codes: Tensor, bits: int) -> Tensor:
    """Codes as AQLM stores them: those from 2^(bits − 1) on less 2^bits, as int8 up to 8 bits and int16 up to 16."""
    wrapped = torch.where(codes >= 1 << (bits - 1), codes.int() - (1 << bits), codes.int())
    return wrapped.to(torch.int8 if bits <= 8 else torch.int16)
