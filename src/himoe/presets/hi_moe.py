"""Hi-MoE (arXiv 2605.08292) as recommended here; `hi_moe_published` has it as printed, and as its authors run it."""

from collections.abc import Sequence

from himoe.balance import Balancer, DualAscent, LogitCorrection, Schedule, Switch, TwoLevelTerms, ZLoss
from himoe.bounds import MAX_RATIO
from himoe.errors import ConfigError
from himoe.nn import Router
from himoe.presets.grouped import GroupList, grouped_router, resolve_groups
from himoe.presets.guards import check_guards


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
    renormalize: bool | None = None,
    expert_scale: bool = False,
    schedule: str = "joint",
    schedule_steps: int = 0,
    epsilon_intra: float | None = None,
    epsilon_inter: float | None = None,
    dual_rate: float | None = None,
    dual_maximum: float | None = None,
    z_loss: float = 0.0,
    extra: Sequence[Balancer] = (),
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
        renormalize: divide each token's weights by their sum; by default for K > 1.
        expert_scale: learned factor per expert.
        schedule: `joint`, `warmup` (intra rises linearly over `schedule_steps`) or `two_stage` (no intra until then).
        schedule_steps: optimizer steps of the first part.
        epsilon_intra: with `epsilon_inter`, bounds for `DualAscent`: both λ then move, from the values given here.
        epsilon_inter: see `epsilon_intra`.
        dual_rate: η of the dual ascent; default 0.001.
        dual_maximum: λ_max of the dual ascent; default 2.5·alpha, the largest that the guards accept.
        z_loss: weight of the router z-loss.
        extra: more balancers behind these; the guards count them.
        force: build what a guard would refuse.

    Raises:
        GuardError: coefficients under which one expert per group would take everything, unless forced.
    """
    partition, per_group = resolve_groups(num_experts, top_k, num_groups, groups)
    parts: list[Balancer] = []
    if correction != "none":
        parts.append(LogitCorrection(num_experts, tau=tau, beta=beta, temperature=temperature, mean_from=correction))
    terms = TwoLevelTerms(
        num_experts,
        partition,
        lambda_intra=lambda_intra,
        lambda_inter=lambda_inter,
        intra=intra,
        inter=inter,
        source=source,
    )
    steered: Balancer = terms
    if epsilon_intra is not None and epsilon_inter is not None:
        maximum = MAX_RATIO * alpha if dual_maximum is None else dual_maximum
        bounds = {"epsilon_intra": epsilon_intra, "epsilon_inter": epsilon_inter}
        steered = DualAscent(terms, **bounds, rate=1e-3 if dual_rate is None else dual_rate, maximum=maximum)
    elif (epsilon_intra, epsilon_inter, dual_rate, dual_maximum) != (None, None, None, None):
        raise ConfigError("hi_moe: dual ascent needs both epsilon_intra and epsilon_inter")
    parts += [_scheduled(steered, schedule, schedule_steps), Switch(weight=alpha, source="raw")]
    if z_loss:
        parts.append(ZLoss(weight=z_loss))
    parts += extra
    router = grouped_router(dim, partition, per_group, parts, renormalize=renormalize, expert_scale=expert_scale)
    check_guards(router.balancer, top_k=sum(per_group), score=router.score, num_experts=num_experts, force=force)
    return router


def _scheduled(terms: Balancer, schedule: str, steps: int) -> Balancer:
    if schedule not in ("joint", "warmup", "two_stage"):
        raise ConfigError(f"hi_moe: schedule = {schedule!r} must be joint, warmup or two_stage")
    if schedule == "joint" and steps:
        raise ConfigError(f"hi_moe: schedule_steps = {steps} needs schedule = 'warmup' or 'two_stage'")
    if schedule != "joint" and steps < 1:
        raise ConfigError(f"hi_moe: schedule = {schedule!r} needs schedule_steps ≥ 1, the steps of its first part")
    no_intra = isinstance(terms, TwoLevelTerms) and not terms.lambda_intra
    return terms if schedule == "joint" or no_intra else Schedule(terms, schedule, steps=steps, only=("intra",))
