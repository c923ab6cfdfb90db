"""`round_robin`: experts in turn, whatever the token is; for benchmarks, where load must be perfectly even.

Choice j of the t-th real token goes to expert (t·K + j) mod E, so loads differ by one at most, and padding, before or
between the tokens, moves nobody. t counts over the whole batch: a text read in parts, as cached generation reads it,
gets other experts than the text read at once, and so does a row in another batch.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from himoe.functional.selection.base import Selection, all_selected, check_top_k
from himoe.types import RouterContext


def round_robin(scores: Float[Tensor, "T E"], context: RouterContext, *, k: int) -> Selection:
    """Experts in turn, for benchmarks: even load whatever the scores.

    Raises `ConfigError` unless 1 ≤ k ≤ E.
    """
    num_tokens, num_experts = scores.shape
    check_top_k(num_experts, k)
    if context.mask is None:
        turn = torch.arange(num_tokens, device=scores.device)
    else:
        turn = (context.mask.cumsum(0) - 1).clamp(min=0)
    return all_selected((turn[:, None] * k + torch.arange(k, device=scores.device)) % num_experts)


round_robin.balances_load = True  # type: ignore[attr-defined]
