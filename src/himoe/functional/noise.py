"""Random numbers for every token and column that do not depend on how much padding stands between the tokens.

One seed is drawn from the generator per call. A number is then a hash of the seed, of the token's place among the real
tokens, and of the column, so that the same seed gives the same numbers on every device and with any padding.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from himoe.functional.hashing import STEP, WORD, mix


def uniform_noise(like: Float[Tensor, "T N"], mask: Bool[Tensor, " T"] | None) -> Float[Tensor, "T N"]:
    """Draw fp32 numbers evenly between 0 and 1, neither reached; those of padding mean nothing."""
    num_tokens, columns = like.shape
    seed = torch.randint(WORD, (2,), device=like.device)
    place = torch.arange(num_tokens, device=like.device) if mask is None else mask.cumsum(0) - 1
    word = mix(mix(place & WORD) ^ seed[0])
    column = torch.arange(1, columns + 1, device=like.device) * STEP
    word = mix(((word[:, None] + column) & WORD) ^ seed[1])
    return ((word >> 9).to(torch.float32) + 0.5) / 2**23  # with more bits fp32 would round the largest to 1


def normal_noise(like: Float[Tensor, "T N"], mask: Bool[Tensor, " T"] | None) -> Float[Tensor, "T N"]:
    """Draw standard normal numbers of the dtype of `like`."""
    return (2**0.5 * torch.erfinv(2 * uniform_noise(like, mask) - 1)).to(like.dtype)
