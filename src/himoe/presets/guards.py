"""Warnings and refusals for coefficients that are known to fail, with the numbers that make them fail."""

import warnings

from himoe.balance import Balancer, Switch, TwoLevelTerms
from himoe.errors import GuardError, HimoeWarning

MAX_RATIO = 2.5  # λ_intra/α; on a toy, CV inside a group was .17 at 1, .28 at 2.5, and one expert took all at 10


def check_guards(balancer: Balancer, *, top_k: int, force: bool = False) -> None:
    """Check two-level terms against each other and against the load-balancing part.

    Args:
        balancer: the whole composition.
        top_k: K.
        force: warn where it would be refused.

    Raises:
        GuardError: `group_conditional` terms that outweigh load balancing, or without any.

    Warns:
        HimoeWarning: coefficients whose optimum puts all of a token's mass on one group.
    """
    for terms in balancer.modules():
        if isinstance(terms, TwoLevelTerms) and terms.lambda_intra > 0:
            _warn_of_one_group(terms, top_k)
            if terms.intra == "group_conditional":
                _refuse_collapse(terms, balancer, force)


def _warn_of_one_group(terms: TwoLevelTerms, top_k: int) -> None:
    intra, inter = terms.lambda_intra, terms.lambda_inter
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
    if any(part.balances_load and not isinstance(part, Switch) for part in parts):
        return
    if alpha == 0:
        problem = f"lambda_intra = {terms.lambda_intra:g} without any load-balancing part"
    elif terms.lambda_intra / alpha > MAX_RATIO:
        problem = (
            f"lambda_intra/alpha = {terms.lambda_intra:g}/{alpha:g} = {terms.lambda_intra / alpha:g} > {MAX_RATIO}"
        )
    else:
        return
    message = (
        f"group_conditional: {problem}: one expert per group would take everything; raise alpha or lower lambda_intra"
    )
    if not force:
        raise GuardError(f"{message} (force = true to try it all the same)")
    warnings.warn(message, HimoeWarning, stacklevel=4)
