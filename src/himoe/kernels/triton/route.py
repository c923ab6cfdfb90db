# type: ignore  # kernels are written in the language of Triton, which pyright takes for Python
"""The fused router's kernel: score, choose and count in one pass; a program has a few tokens with all E experts."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from himoe.kernels.triton.mlp import launch


@triton.jit
def route_kernel(
    logits, bias, mask, scores, expert_ids, counts, T, E,
    SCORE: tl.constexpr, PLACES: tl.constexpr, GROUPS: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_MASK: tl.constexpr,
    ROWS: tl.constexpr, EXPERTS: tl.constexpr,
):  # fmt: skip
    """Choose PLACES/GROUPS experts in every group of E/GROUPS neighbours, best first, ties to the lower id."""
    t = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    e = tl.arange(0, EXPERTS)[None, :]
    real = t < T
    inside = real[:, None] & (e < E)
    place = t.to(tl.int64)[:, None] * E + e
    z = tl.load(logits + place, mask=inside, other=0.0)
    if SCORE == "softmax":
        z = tl.where(e < E, z, float("-inf"))
        z = tl.exp(z - tl.max(z, 1)[:, None])
        score = z / tl.sum(z, 1)[:, None]
    else:
        score = 1.0 / (1.0 + tl.exp(-z))
    tl.store(scores + place, score, mask=inside)
    choice = score
    if HAS_BIAS:
        choice += tl.load(bias + e, mask=e < E, other=0.0)
    choice = tl.where(choice != choice, float("inf"), choice)  # NaN is the greatest, as for topk  # noqa: PLR0124
    if HAS_MASK:
        real = real & (tl.load(mask + t, mask=real, other=0) != 0)
    free = (t >= 0)[:, None] & (e < E)
    hits = tl.zeros((ROWS, EXPERTS), tl.int32)
    for i in range(PLACES):
        allowed = free & (e // (E // GROUPS) == i // (PLACES // GROUPS))
        best = tl.max(tl.where(allowed, choice, float("-inf")), 1)[:, None]
        chosen = tl.min(tl.where(allowed & (choice == best), e, EXPERTS), 1)
        picked = e == chosen[:, None]
        free = free & (chosen[:, None] != e)
        hits += (picked & real[:, None]).to(tl.int32)
        tl.store(expert_ids + t.to(tl.int64) * PLACES + i, chosen.to(tl.int64), mask=t < T)
    e = tl.arange(0, EXPERTS)
    tl.atomic_add(counts + e, tl.sum(hits, 0).to(tl.int64), mask=e < E)  # integers: the order does not matter


def route(
    logits: Tensor, bias: Tensor | None, mask: Tensor | None, score: str, places: int, groups: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return scores (T, E), expert ids (T, K) and the pairs per expert (E,) of tokens that the mask leaves, int64."""
    tokens, num_experts = logits.shape
    experts = triton.next_power_of_2(num_experts)
    rows = max(1, 2048 // experts)
    scores = torch.empty_like(logits)
    expert_ids = torch.empty(tokens, places, dtype=torch.int64, device=logits.device)
    counts = torch.zeros(num_experts, dtype=torch.int64, device=logits.device)
    launch(
        route_kernel,
        (triton.cdiv(tokens, rows),),
        logits,
        logits if bias is None else bias,
        logits if mask is None else mask,
        *(scores, expert_ids, counts, tokens, num_experts),
        SCORE=score,
        PLACES=places,
        GROUPS=groups,
        HAS_BIAS=bias is not None,
        HAS_MASK=mask is not None,
        ROWS=rows,
        EXPERTS=experts,
    )
    return scores, expert_ids, counts
