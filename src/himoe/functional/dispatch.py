"""Integer bookkeeping of dispatch: which pair stands where once pairs are sorted by expert, and who has a place.

No shape depends on the data: unkept pairs are sorted behind all others, where no expert's range reaches.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from himoe.functional.stats import count_pairs


class SortedPairs(NamedTuple):
    """The T·K pairs in expert order.

    Attributes:
        pair_of_row: (T·K,) flat pair index t·K + k of every sorted row; unkept pairs stand last.
        row_of_pair: (T·K,) the inverse permutation.
        offsets: (E,) int32, the end row of each expert; offsets[-1] = N is the number of kept pairs.
    """

    pair_of_row: Int[Tensor, " T*K"]
    row_of_pair: Int[Tensor, " T*K"]
    offsets: Int[Tensor, " E"]


def sort_by_expert(expert_ids: Int[Tensor, "T K"], kept: Bool[Tensor, "T K"], num_experts: int) -> SortedPairs:
    """Sort the pairs by expert, token order kept inside each expert."""
    key = expert_ids.where(kept, num_experts).flatten()
    pair_of_row = key.argsort(stable=True)
    row = torch.arange(key.numel(), device=key.device)
    row_of_pair = torch.empty_like(row).scatter_(0, pair_of_row, row)
    counts = count_pairs(expert_ids, kept, num_experts)
    return SortedPairs(pair_of_row, row_of_pair, counts.cumsum(0).to(torch.int32))


Pairs = Int[Tensor, " T*K"]  # flat pair indices t·K + k, the first to be served first


class Order(NamedTuple):
    """Who takes an expert's places first.

    Attributes:
        line_up: (selected (T, K), weights (T, K)) → all T·K flat pair indices, first to last.
        causal: a later token never takes an earlier one's place, for any router that is causal itself.
    """

    line_up: Callable[[Tensor, Tensor], Pairs]
    causal: bool


def _by_column(tokens: Int[Tensor, " T"], top_k: int) -> Pairs:
    """List every token's first choice, in the given order of tokens, then every second one, and so on."""
    return (tokens * top_k + torch.arange(top_k, device=tokens.device)[:, None]).flatten()


def _token_major(selected: Tensor, weights: Tensor) -> Pairs:  # noqa: ARG001
    return torch.arange(selected.numel(), device=selected.device)


def _column_major(selected: Tensor, weights: Tensor) -> Pairs:  # noqa: ARG001
    return _by_column(torch.arange(selected.shape[0], device=selected.device), selected.shape[1])


def _by_weight(selected: Tensor, weights: Tensor) -> Pairs:  # noqa: ARG001
    return weights.flatten().argsort(descending=True, stable=True)


def _batch_prioritised(selected: Tensor, weights: Tensor) -> Pairs:
    best = weights.where(selected, -torch.inf).amax(-1)
    return _by_column(best.argsort(descending=True, stable=True), selected.shape[1])


ORDERS = {
    "token_major": Order(_token_major, causal=True),
    "column_major": Order(_column_major, causal=False),
    "score": Order(_by_weight, causal=False),
    "batch_prioritised": Order(_batch_prioritised, causal=False),
}


def place_in_expert(
    expert_ids: Int[Tensor, "T K"],
    selected: Bool[Tensor, "T K"],
    weights: Float[Tensor, "T K"],
    num_experts: int,
    order: str,
) -> Int[Tensor, "T K"]:
    """Return the place, 0 first, that each selected pair takes in the queue of its expert; equals go token by token.

    Args:
        expert_ids: (T, K).
        selected: (T, K); other pairs take no place and get one past every real one.
        weights: (T, K), what `score` and `batch_prioritised` look at.
        num_experts: E.
        order: `token_major`, token by token, causal for any router that is. `column_major`, every token's first choice
            before any second one, as in GShard (arXiv 2006.16668) and the Hi-MoE authors' code: a later token's first
            choice can take an earlier token's place when an expert may stand in several columns. `score`, pairs of
            largest weight first. `batch_prioritised`, column by column, in each the tokens with the largest weight
            first (V-MoE, arXiv 2106.05974): the weight is a token's largest.
    """
    line = ORDERS[order].line_up(selected, weights)
    key = expert_ids.where(selected, num_experts).flatten()[line, None]  # (T·K, 1), as they stand in line
    rows = sort_by_expert(key.clamp(max=num_experts - 1), key < num_experts, num_experts)
    starts = torch.cat([rows.offsets.new_zeros(1), rows.offsets])
    in_line = rows.row_of_pair - starts[key[:, 0]]
    place = torch.empty_like(in_line)
    place[line] = in_line
    return place.view_as(expert_ids).where(selected, expert_ids.numel())


def capacity(tokens: Int[Tensor, ""] | int, num_experts: int, top_k: int, factor: float, multiple: int = 1) -> Tensor:
    """Return the places of one expert: floor(K·factor·tokens/E) rounded up to `multiple`, at least 1.

    Args:
        tokens: number of real tokens; a tensor stays on its device.
        num_experts: E.
        top_k: K.
        factor: 1 is exactly the fair share.
        multiple: the authors' code rounds up to even numbers, 2.
    """
    exact = torch.as_tensor(tokens).to(torch.float64) * (top_k * factor) / num_experts
    # Rounding first forgives the last bit of a product such as 10·1.1/1, which must not lose a place.
    # The upper bound keeps a huge or infinite factor, which means no limit, from overflowing to a tiny capacity.
    whole = (exact * (1 + 1e-12)).floor().clamp(max=2**53).to(torch.int64)
    return ((whole + multiple - 1) // multiple * multiple).clamp(min=1)
