"""Quantiles per expert from integer histograms: exact sums over micro-batches and ranks, in O(E) memory.

The bins are those of a floating-point number of three bits: eight equal ones in every octave from 2⁻²⁴ to 2⁸, for
either sign. So a bin is at most an eighth of its value wide, and 7e-8 at 0; what lies beyond counts in the outermost
bins. The number of a bin is read off the value's own bits: no search, and the same on every machine.

Hand in differences from the value in force: they shrink as a controller settles, and its bins become finer. Uniform
bins would need the range of the values: 256 of them over [0, 1] put nearly all softmax scores of 256 experts, about
1/256 in size, in one.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

LOWEST, HIGHEST, BITS = -24, 8, 3  # octaves from 2^LOWEST to 2^HIGHEST, each in 2^BITS bins
HALF = (HIGHEST - LOWEST) << BITS
BINS = 2 * HALF
CHUNK = 2**20  # values that are sorted into bins at a time: their indices take 8 bytes each

MANTISSA, BIAS = 23, 127  # of a 32-bit floating-point number


def edges(device: torch.device) -> Float[Tensor, " bins+1"]:
    """Return the edges of the bins in rising order, fp64."""
    step = torch.arange(1, HALF + 1, device=device)
    size = 1 << BITS
    positive = torch.ldexp(1 + (step % size).to(torch.float64) / size, LOWEST + step // size)
    return torch.cat([-positive.flip(0), positive.new_zeros(1), positive])


def bins(values: Float[Tensor, "T E"]) -> Int[Tensor, "T E"]:
    """Return the number of each value's bin, 0 … BINS-1; on an edge, that of the bin farther from 0."""
    values = values.to(torch.float32)
    step = (values.abs().view(torch.int32) - ((BIAS + LOWEST) << MANTISSA)) >> (MANTISSA - BITS)
    step = step.clamp(0, HALF - 1)
    return torch.where(values < 0, HALF - 1 - step, HALF + step).to(torch.int64)


def histogram(values: Float[Tensor, "T E"], mask: Bool[Tensor, " T"] | None = None) -> Int[Tensor, "E bins"]:
    """Count each expert's values per bin, those of real tokens."""
    num_tokens, num_experts = values.shape
    device = values.device
    first = torch.arange(num_experts, device=device) * BINS
    real = torch.ones(num_tokens, dtype=torch.int64, device=device) if mask is None else mask.to(torch.int64)
    counts = torch.zeros(num_experts * BINS, dtype=torch.int64, device=device)
    rows = max(CHUNK // num_experts, 1)
    for some, weight in zip(values.split(rows), real.split(rows), strict=True):
        cell = bins(some) + first
        counts.scatter_add_(0, cell.flatten(), weight[:, None].expand_as(cell).flatten())
    return counts.view(num_experts, BINS)


def quantile(counts: Int[Tensor, "E bins"], numerator: int, denominator: int) -> Float[Tensor, " E"]:
    """Return each expert's numerator/denominator quantile in fp64, linear inside the bin; 0 where nothing was counted.

    It lies in the bin that holds the ⌈q·n⌉-th smallest of the n values: which bin that is, is decided in integers.

    >>> values = torch.tensor([[-1.0], [0.0], [3.0], [4.0]])
    >>> quantile(histogram(values), 3, 4).item()  # the bin of 3 ends at 3.25
    3.25
    """
    total, cumulative = counts.sum(-1), counts.cumsum(-1)
    index = (cumulative * denominator < total[:, None] * numerator).sum(-1, keepdim=True)
    inside = counts.gather(-1, index).to(torch.float64)
    before = cumulative.gather(-1, index).to(torch.float64) - inside
    wanted = total[:, None].to(torch.float64) * numerator / denominator
    share = ((wanted - before) / inside.clamp(min=1)).squeeze(-1)
    edge = edges(counts.device)
    lower, upper = edge[index.squeeze(-1)], edge[index.squeeze(-1) + 1]
    return torch.where(total > 0, lower + share * (upper - lower), 0.0)
