"""Integer bookkeeping of dispatch: which pair stands where once pairs are sorted by expert, and who has a place.

No shape depends on the data: unkept pairs are sorted behind all others, where no expert's range reaches.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Int
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
    row_of_pair = torch.empty_like(pair_of_row)
    row_of_pair[pair_of_row] = torch.arange(key.numel(), device=key.device)
    counts = count_pairs(expert_ids, kept, num_experts)
    return SortedPairs(pair_of_row, row_of_pair, counts.cumsum(0).to(torch.int32))


def place_in_expert(
    expert_ids: Int[Tensor, "T K"], selected: Bool[Tensor, "T K"], num_experts: int, order: str
) -> Int[Tensor, "T K"]:
    """Return the place, 0 first, that each selected pair takes in the queue of its expert.

    Args:
        expert_ids: (T, K).
        selected: (T, K); other pairs take no place and get one past every real one.
        num_experts: E.
        order: `token_major`, token by token, causal for any router that is; `column_major`, every token's first
            choice before any second one, as in GShard and the authors' code: a later token's first choice can take
            an earlier token's place when an expert may stand in several columns.
    """
    if order == "column_major":
        return place_in_expert(expert_ids.T, selected.T, num_experts, "token_major").T
    rows = sort_by_expert(expert_ids, selected, num_experts)
    starts = torch.cat([rows.offsets.new_zeros(1), rows.offsets])
    key = expert_ids.where(selected, num_experts)
    place = rows.row_of_pair.view_as(expert_ids) - starts[key]
    return place.where(selected, expert_ids.numel())


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
