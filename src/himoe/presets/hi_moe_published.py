"""Hi-MoE (arXiv 2605.08292) as the paper prints it, and as its authors' code runs it.

| | `hi_moe` | `hi_moe_paper` | `hi_moe_official` |
|---|---|---|---|
| source of the terms | raw | corrected | raw |
| intra, inter | group_conditional, dense | global, selected | global, dense |
| λ_intra, λ_inter | 0.01, 0.01 | 0.1, 0.05 | 0.1, 0.05 |
| α (f sums to 1) | 0.01 | K·0.01 | K·0.01 |
| weights | renormalised | as they are | renormalised, learned scale |
| mean logits used | of the last step | include this batch (not causal) | include this batch (not causal) |

The published α counts f with sum K; ours is K times as large for the same loss.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from himoe.nn import Router
from himoe.presets.hi_moe import hi_moe

F = TypeVar("F", bound=Callable[..., Router])

PUBLISHED = {"lambda_intra": 0.1, "lambda_inter": 0.05, "intra": "global", "correction": "same_batch"}
PAPER = PUBLISHED | {"inter": "selected", "source": "corrected", "renormalize": False}
OFFICIAL = PUBLISHED | {"inter": "dense", "expert_scale": True}


def _with_defaults_of_hi_moe(changed: dict[str, Any]) -> Callable[[F], F]:
    """Give a preset that passes `**options` on the signature it really has: `hi_moe`'s, with other defaults."""

    def decorate(preset: F) -> F:
        parameters = inspect.signature(hi_moe).parameters.values()
        preset.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
            [p.replace(default=changed[p.name]) if p.name in changed else p for p in parameters],
            return_annotation=Router,
        )
        return preset

    return decorate


@_with_defaults_of_hi_moe(PAPER | {"alpha": None})
def hi_moe_paper(dim: int, num_experts: int, top_k: int | Sequence[int], **options: Any) -> Router:
    """Hi-MoE as the paper prints it: warns, its optimum puts a token's mass on one group. Not causal.

    Args:
        dim: D.
        num_experts: E.
        top_k: K in total, a multiple of the number of groups, or one k' per group.
        **options: as in `hi_moe`, with the paper's defaults; `alpha` is K·0.01.
    """
    return hi_moe(dim, num_experts, top_k, **{"alpha": _published_alpha(top_k), **PAPER, **options})


@_with_defaults_of_hi_moe(OFFICIAL | {"alpha": None})
def hi_moe_official(dim: int, num_experts: int, top_k: int | Sequence[int], **options: Any) -> Router:
    """Hi-MoE as its authors' code runs it: warns, its optimum puts a token's mass on one group. Not causal.

    Args:
        dim: D.
        num_experts: E.
        top_k: K in total, a multiple of the number of groups, or one k' per group.
        **options: as in `hi_moe`, with the defaults of the authors' code; `alpha` is K·0.01.
    """
    return hi_moe(dim, num_experts, top_k, **{"alpha": _published_alpha(top_k), **OFFICIAL, **options})


def _published_alpha(top_k: int | Sequence[int]) -> float:
    """Return the published 0.01, which counts f with sum K, in our convention."""
    return 0.01 * (top_k if isinstance(top_k, int) else sum(top_k))
