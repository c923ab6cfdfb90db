"""Warnings and refusals for coefficients that are known to fail, with the numbers that make them fail."""

import warnings

from himoe.balance import Balancer, DualAscent, LossFree, Switch, TwoLevelTerms
from himoe.errors import GuardError, HimoeWarning
from himoe.functional.scores import softmax
from himoe.nn.router import ScoreFunction

MAX_RATIO = 2.5  # λ_intra/α; on a toy, CV inside a group was .17 at 1, .28 at 2.5, and one expert took all at 10
MAX_RATE = 0.5  # u over the mean softmax score 1/E; u = 1e-3 did harm from E = 512 on (arXiv 2605.11689)


def check_guards(balancer: Balancer, *, top_k: int, score: ScoreFunction | None = None, force: bool = False) -> None:
    """Check two-level terms against each other and the load-balancing part, and a bias's rate against its scores.

    Args:
        balancer: the whole composition.
        top_k: K.
        score: the router's score function, where it may be softmax.
        force: warn where it would be refused.

    Raises:
        GuardError: `group_conditional` terms that outweigh load balancing, or without any.

    Warns:
        HimoeWarning: coefficients whose optimum puts all of a token's mass on one group; a loss-free rate that is not
            small beside softmax scores.
    """
    for part in balancer.modules():
        if isinstance(part, TwoLevelTerms):
            _warn_of_one_group(part, top_k)
            if part.intra == "group_conditional":
                _refuse_collapse(part, balancer, force)
        if isinstance(part, LossFree) and score is softmax:
            _warn_of_rate(part)


def _warn_of_one_group(terms: TwoLevelTerms, top_k: int) -> None:
    intra, inter = terms.lambda_intra, terms.lambda_inter
    if intra == 0:
        return
    form = (terms.intra, terms.inter)
    if form in (("global", "dense"), ("entropy", "entropy")) and inter <= intra:
        warnings.warn(
            f"{form[0]} intra with {form[1]} inter: lambda_inter = {inter:g} ≤ lambda_intra = {intra:g} rewards "
            "putting all of a token's mass on one group; use lambda_inter > lambda_intra or intra = group_conditional",
            HimoeWarning,
            stacklevel=4,
        )
    bound = terms.groups.num_experts / top_k * intra  # (S/k')·λ_intra
    if form == ("global", "selected") and inter < bound:
        warnings.warn(
            f"global intra with selected inter: lambda_inter = {inter:g} < (S/k')·lambda_intra = {bound:g} rewards "
            "putting all of a token's mass on one group (above it, specialization inside groups vanishes too); "
            "use intra = group_conditional with inter = dense",
            HimoeWarning,
            stacklevel=4,
        )


def _refuse_collapse(terms: TwoLevelTerms, balancer: Balancer, force: bool) -> None:
    parts = [m for m in balancer.modules() if isinstance(m, Balancer)]
    alpha = sum(part.weight for part in parts if isinstance(part, Switch))
    if any(isinstance(part, LossFree) and part.rate > 0 for part in parts):
        return
    # Dual ascent may raise λ_intra up to its maximum.
    reachable = [part.maximum for part in parts if isinstance(part, DualAscent) and part.terms is terms]
    largest = max(terms.lambda_intra, *reachable) if reachable else terms.lambda_intra
    if largest == 0:
        return
    if alpha == 0:
        problem = f"lambda_intra = {largest:g} without any load-balancing part"
    elif largest / alpha > MAX_RATIO * (1 + 1e-9):
        problem = f"lambda_intra/alpha = {largest:g}/{alpha:g} = {largest / alpha:g} > {MAX_RATIO}"
    else:
        return
    advice = "one expert per group would take everything; raise the load-balancing weight alpha or lower lambda_intra"
    message = f"group_conditional: {problem}: {advice}"
    if not force:
        raise GuardError(f"{message} (force=True, in a configuration moe.force = true, to try it all the same)")
    warnings.warn(message, HimoeWarning, stacklevel=4)


def _warn_of_rate(part: LossFree) -> None:
    num_experts = part.bias.numel()
    if not part.multiplicative and part.rate * num_experts > MAX_RATE:
        warnings.warn(
            f"loss_free: rate = {part.rate:g} is {part.rate * num_experts:.3g} times the mean softmax score "
            f"1/{num_experts}, so the bias would decide instead of the score; use sigmoid scores or a smaller rate",
            HimoeWarning,
            stacklevel=4,
        )
