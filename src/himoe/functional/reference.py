"""The MoE layer as loops over tokens and choices: the truth that every fast path is compared with.

Plain, slow and differentiable. Nothing here shares code with what it checks.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def expert(x: Float[Tensor, " D"], up: Float[Tensor, "H D"], down: Float[Tensor, "D F"], activation: str) -> Tensor:
    """One expert on one token.

    `swiglu` is down·(silu(gate)·value) with gate and value stacked in `up`; the others are down·act(up·x).
    """
    hidden = up @ x
    if activation == "swiglu":
        gate, value = hidden[: hidden.shape[0] // 2], hidden[hidden.shape[0] // 2 :]
        return down @ (gate / (1 + torch.exp(-gate)) * value)
    positive = (hidden > 0).to(hidden.dtype)
    unit = {
        "gelu": hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5)),
        "relu": positive * hidden,
        "relu2": positive * hidden**2,
    }[activation]
    return down @ unit


def moe(
    x: Float[Tensor, "T D"],
    expert_ids: Int[Tensor, "T K"],
    weights: Float[Tensor, "T K"],
    kept: Bool[Tensor, "T K"],
    up_proj: Float[Tensor, "E H D"],
    down_proj: Float[Tensor, "E D F"],
    activation: str,
) -> Float[Tensor, "T D"]:
    """y_t = Σ_k kept·weight·expert(x_t), token by token and choice by choice."""
    rows = []
    for t in range(x.shape[0]):
        y = torch.zeros_like(x[t])
        for k in range(expert_ids.shape[1]):
            if kept[t, k]:
                e = int(expert_ids[t, k])
                y = y + weights[t, k].to(x.dtype) * expert(x[t], up_proj[e], down_proj[e], activation)
        rows.append(y)
    return torch.stack(rows) if rows else torch.zeros_like(x)


def top_k(scores: Float[Tensor, "T E"], k: int) -> list[list[int]]:
    """The k best experts of each token, best first, ties to the lower id."""
    return [sorted(range(len(row)), key=lambda e, row=row: (-row[e], e))[:k] for row in scores.tolist()]


def top_k_per_group(scores: Float[Tensor, "T E"], groups: list[list[int]], k: list[int]) -> list[list[int]]:
    """The k_g best experts of each group, group after group."""
    return [
        [e for g, group in enumerate(groups) for e in sorted(group, key=lambda e, row=row: (-row[e], e))[: k[g]]]
        for row in scores.tolist()
    ]


def keep_within_capacity(
    expert_ids: Int[Tensor, "T K"],
    selected: Bool[Tensor, "T K"],
    weights: Float[Tensor, "T K"],
    places: int,
    order: str,
) -> Bool[Tensor, "T K"]:
    """Hand out `places` per expert, pair by pair in the given order; equals go token by token."""
    tokens, choices = expert_ids.shape
    pairs = [(t, k) for t in range(tokens) for k in range(choices)]
    if order == "column_major":
        pairs.sort(key=lambda pair: (pair[1], pair[0]))
    elif order == "score":
        pairs.sort(key=lambda pair: -weights[pair].item())
    elif order == "batch_prioritised":
        best = [max((weights[t, k].item() for k in range(choices) if selected[t, k]), default=0) for t in range(tokens)]
        pairs.sort(key=lambda pair: (pair[1], -best[pair[0]], pair[0]))
    kept = torch.zeros_like(selected)
    used: dict[int, int] = {}
    for t, k in pairs:
        e = int(expert_ids[t, k])
        if selected[t, k] and used.get(e, 0) < places:
            kept[t, k] = True
            used[e] = used.get(e, 0) + 1
    return kept
