"""Quantiles per expert from integer histograms: exact sums over micro-batches and ranks, in O(E) memory.

The edges are spaced like sinh,

    edge_i = SCALE·sinh(U·(2i/BINS − 1)),  U = asinh(LIMIT/SCALE),  i = 0 … BINS

so a bin is 6.5e-7 wide at 0 and 7 % of the value far from it, up to ±LIMIT; what lies beyond counts in the outermost
bins. Hand in differences from the value in force: they shrink as a controller settles, and its bins become finer.
Uniform bins would need the range of the values: 256 of them over [0, 1] put nearly all softmax scores of 256 experts,
about 1/256 in size, in one.
"""

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

BINS = 512
LIMIT = 80.0
SCALE = 1e-5
CHUNK = 2**20  # values that are sorted into bins at a time: their indices take 8 bytes each


def edges(device: torch.device, dtype: torch.dtype = torch.float64) -> Float[Tensor, " bins+1"]:
    """Return the edges of the bins in rising order."""
    reach = math.asinh(LIMIT / SCALE)
    return (SCALE * torch.linspace(-reach, reach, BINS + 1, dtype=torch.float64, device=device).sinh()).to(dtype)


def histogram(values: Float[Tensor, "T E"], mask: Bool[Tensor, " T"] | None = None) -> Int[Tensor, "E bins"]:
    """Count each expert's values per bin, those of real tokens; bin i holds edge_i < value ≤ edge_{i+1}."""
    num_tokens, num_experts = values.shape
    device = values.device
    inner = edges(device, values.dtype)[1:-1]
    first = torch.arange(num_experts, device=device) * BINS
    real = torch.ones(num_tokens, dtype=torch.int64, device=device) if mask is None else mask.to(torch.int64)
    counts = torch.zeros(num_experts * BINS, dtype=torch.int64, device=device)
    rows = max(CHUNK // num_experts, 1)
    for some, weight in zip(values.split(rows), real.split(rows), strict=True):
        cell = torch.bucketize(some.contiguous(), inner) + first
        counts.scatter_add_(0, cell.flatten(), weight[:, None].expand_as(cell).flatten())
    return counts.view(num_experts, BINS)


def quantile(counts: Int[Tensor, "E bins"], numerator: int, denominator: int) -> Float[Tensor, " E"]:
    """Return each expert's numerator/denominator quantile in fp64, linear inside the bin; 0 where nothing was counted.

    It lies in the bin that holds the ⌈q·n⌉-th smallest of the n values: which bin that is, is decided in integers.

    >>> values = torch.tensor([[-1.0], [0.0], [3.0], [4.0]])
    >>> round(quantile(histogram(values), 3, 4).item(), 1)
    3.1
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
