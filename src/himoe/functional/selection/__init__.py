"""Selectors: `(scores, context) → (expert_ids, selected)`, plain functions, one file each.

`selected` marks the places that hold a choice; the ids in other places mean nothing but lie in 0 … E-1. Ties go
whichever way `topk` breaks them: do not rely on it, and save the routing wherever it could be computed twice.

What a selector says of itself stands in attributes of its function: `causal = False` where a later token can change an
earlier one's experts, `random = True` where random numbers decide in training, `balances_load = True` where experts
get equal load whatever the scores are, `renormalize` where its authors do or do not divide a token's weights by their
sum, `wanted(scores, context, **options) → (T, E) bool` where `max_k` may cut off experts that the rule asks for, and
`toy_options`, options with which it has something to choose in a toy's small batches, where its defaults have not.

A selector is imported from its own file; those that other code needs are named here too.
"""

from himoe.functional.selection.base import Selection, check_top_k
from himoe.functional.selection.expert_choice import expert_choice
from himoe.functional.selection.hash import hash_tokens
from himoe.functional.selection.replay import replay
from himoe.functional.selection.round_robin import round_robin
from himoe.functional.selection.sinkhorn import sinkhorn
from himoe.functional.selection.threshold import threshold
from himoe.functional.selection.top_k import top_k
from himoe.functional.selection.top_k_in_best_groups import top_k_in_best_groups
from himoe.functional.selection.top_k_in_tiles import top_k_in_tiles
from himoe.functional.selection.top_k_per_group import top_k_per_group
from himoe.functional.selection.top_p import top_p

__all__ = [
    "Selection",
    "check_top_k",
    "expert_choice",
    "hash_tokens",
    "replay",
    "round_robin",
    "sinkhorn",
    "threshold",
    "top_k",
    "top_k_in_best_groups",
    "top_k_in_tiles",
    "top_k_per_group",
    "top_p",
]
