"""Mixing of 32-bit words held in int64: no table, no overflow, the same on every machine."""

from jaxtyping import Int
from torch import Tensor

WORD = 0xFFFFFFFF
STEP = 0x9E3779B9  # ⌊2³²/golden ratio⌋, keeps successive numbers apart


def mix(word: Int[Tensor, "*shape"]) -> Int[Tensor, "*shape"]:
    """Let every bit of a 32-bit word change about half of the result's; products stay below 2⁶³."""
    word = ((word ^ (word >> 16)) * 0x21F0AAAD) & WORD
    word = ((word ^ (word >> 15)) * 0x735A2D97) & WORD
    return word ^ (word >> 15)
