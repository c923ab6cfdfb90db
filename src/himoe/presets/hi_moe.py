"""Hi-MoE (arXiv 2605.08292) three ways: as recommended here, as the paper prints it, as its authors' code runs it.

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

import functools
from collections.abc import Sequence
from typing import Any

from himoe.balance import Balancer, LogitCorrection, Schedule, Switch, TwoLevelTerms, ZLoss
from himoe.errors import ConfigError
from himoe.nn import Router
from himoe.presets.grouped import GroupList, grouped_router, resolve_groups
from himoe.presets.guards import check_guards

PUBLISHED_ALPHA = 0.01  # with f summing to K


def hi_moe(
    dim: int,
    num_experts: int,
    top_k: int | Sequence[int],
    *,
    num_groups: int | None = None,
    groups: GroupList | None = None,
    alpha: float = 0.01,
    lambda_intra: float = 0.01,
    lambda_inter: float = 0.01,
    intra: str = "group_conditional",
    inter: str = "dense",
    source: str = "raw",
    correction: str = "previous",
    tau: float = 0.01,
    beta: float = 0.9,
    temperature: float = 1.0,
    renormalize: bool = True,
    expert_scale: bool = False,
    schedule: str = "joint",
    schedule_steps: int = 0,
    z_loss: float = 0.0,
    force: bool = False,
) -> Router:
    """Hi-MoE as recommended here: decisive inside each group, fair between groups, causal.

    Args:
        dim: D.
        num_experts: E.
        top_k: K in total, a multiple of the number of groups, or one k' per group.
        num_groups: G equal contiguous groups.
        groups: explicit expert ids of every group, instead of `num_groups`.
        alpha: weight α of the load-balancing loss, f summing to 1.
        lambda_intra: weight of the intra-group term.
        lambda_inter: weight of the inter-group term.
        intra: form of the intra-group term, see `TwoLevelTerms`.
        inter: form of the inter-group term.
        source: `raw` or `corrected` probabilities in both terms.
        correction: `previous`, `same_batch`, or `none`, which leaves the temperature out too.
        tau: strength of the correction.
        beta: decay of the mean logits.
        temperature: divides the corrected logits.
        renormalize: divide each token's weights by their sum.
        expert_scale: learned factor per expert.
        schedule: `joint`, `warmup` (intra rises linearly over `schedule_steps`) or `two_stage` (no intra until then).
        schedule_steps: optimizer steps of the first part.
        z_loss: weight of the router z-loss.
        force: build what a guard would refuse.

    Raises:
        GuardError: coefficients under which one expert per group would take everything, unless forced.
    """
    partition, per_group = resolve_groups(num_experts, top_k, num_groups, groups)
    parts: list[Balancer] = []
    if correction != "none":
        parts.append(LogitCorrection(num_experts, tau=tau, beta=beta, temperature=temperature, mean=correction))
    terms = TwoLevelTerms(
        num_experts,
        partition,
        lambda_intra=lambda_intra,
        lambda_inter=lambda_inter,
        intra=intra,
        inter=inter,
        source=source,
    )
    parts += [_scheduled(terms, schedule, schedule_steps), Switch(weight=alpha, source="raw")]
    if z_loss:
        parts.append(ZLoss(weight=z_loss))
    router = grouped_router(dim, partition, per_group, parts, renormalize=renormalize, expert_scale=expert_scale)
    check_guards(router.balancer, top_k=sum(per_group), force=force)
    return router


def _scheduled(terms: TwoLevelTerms, schedule: str, steps: int) -> Balancer:
    if schedule == "joint":
        return terms
    if schedule not in ("warmup", "two_stage"):
        raise ConfigError(f"hi_moe: schedule = {schedule!r} must be joint, warmup or two_stage")
    if steps < 1:
        raise ConfigError(f"hi_moe: schedule = {schedule!r} needs schedule_steps ≥ 1, the steps of its first part")
    return Schedule(terms, schedule, steps=steps, only=("intra",))


@functools.wraps(hi_moe, assigned=(), updated=())
def hi_moe_paper(dim: int, num_experts: int, top_k: int | Sequence[int], **options: Any) -> Router:
    """Hi-MoE as the paper prints it: warns, its optimum puts a token's mass on one group. Not causal.

    Args:
        dim: D.
        num_experts: E.
        top_k: K in total, a multiple of the number of groups, or one k' per group.
        **options: as in `hi_moe`; the defaults are the paper's.
    """
    published = {
        "alpha": _total(top_k) * PUBLISHED_ALPHA,
        "lambda_intra": 0.1,
        "lambda_inter": 0.05,
        "intra": "global",
        "inter": "selected",
        "source": "corrected",
        "correction": "same_batch",
        "renormalize": False,
    }
    return hi_moe(dim, num_experts, top_k, **{**published, **options})


@functools.wraps(hi_moe, assigned=(), updated=())
def hi_moe_official(dim: int, num_experts: int, top_k: int | Sequence[int], **options: Any) -> Router:
    """Hi-MoE as its authors' code runs it: warns, its optimum puts a token's mass on one group. Not causal.

    Args:
        dim: D.
        num_experts: E.
        top_k: K in total, a multiple of the number of groups, or one k' per group.
        **options: as in `hi_moe`; the defaults are those of the authors' code.
    """
    published = {
        "alpha": _total(top_k) * PUBLISHED_ALPHA,
        "lambda_intra": 0.1,
        "lambda_inter": 0.05,
        "intra": "global",
        "inter": "dense",
        "correction": "same_batch",
        "expert_scale": True,
    }
    return hi_moe(dim, num_experts, top_k, **{**published, **options})


def _total(top_k: int | Sequence[int]) -> int:
    return top_k if isinstance(top_k, int) else sum(top_k)
