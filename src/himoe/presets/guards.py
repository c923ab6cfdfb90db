"""Warnings and refusals for coefficients that are known to fail, with the numbers that make them fail."""

import warnings

import torch
from torch import nn

from himoe.balance import Balancer, DualAscent, Schedule, TwoLevelTerms
from himoe.errors import ConfigError, GuardError, HimoeWarning
from himoe.functional.bound import name_of
from himoe.nn.router import ScoreFunction

MAX_RATIO = 2.5  # λ_intra/α; on a toy, CV inside a group was .17 at 1, .28 at 2.5, and one expert took all at 10
MAX_STEP = 0.25
"""Bias step over the spread of the scores. With softmax scores u = 1e-3 did harm from E = 512 on, together with a large
auxiliary loss, and none at E = 256 (arXiv 2605.11689): that is 0.39 and 0.2 of the spread √(e − 1)/E of unit-normal
logits' scores. The bound lies between."""
SPREAD_LOGITS = 2**16  # logits that a spread is measured on
TINY = 1e-300


def check_guards(
    balancer: Balancer,
    *,
    top_k: int,
    score: ScoreFunction | None = None,
    num_experts: int | None = None,
    force: bool = False,
) -> None:
    """Check two-level terms against each other and the load-balancing part, and a bias's step against its scores.

    Args:
        balancer: the whole composition.
        top_k: K.
        score: the router's score function; None leaves the step of a bias unchecked.
        num_experts: E, which `score` needs.
        force: warn where it would be refused.

    Raises:
        GuardError: `group_conditional` terms that outweigh load balancing, or without any.

    Warns:
        HimoeWarning: coefficients whose optimum puts all of a token's mass on one group; a bias whose step is not
            small beside the spread of the scores it is added to.
    """
    if score is not None and num_experts is None:
        raise ConfigError("check_guards: score needs num_experts beside it")
    for part in balancer.modules():
        if isinstance(part, TwoLevelTerms):
            _warn_of_one_group(part, top_k)
            if part.intra == "group_conditional":
                _refuse_collapse(part, balancer, force)
        if isinstance(part, Balancer) and part.bias_step and score is not None and num_experts is not None:
            _warn_of_step(part, part.bias_step, score, num_experts)


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
    parts = [m for m in balancer.modules() if isinstance(m, Balancer) and m not in _ending_before(terms, balancer)]
    alpha = sum(part.alpha or 0 for part in parts)
    if any(_balances_by_other_means(part) for part in parts):
        return  # no ratio is known to fail
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


def _ending_before(terms: TwoLevelTerms, balancer: Balancer) -> set[nn.Module]:
    """Return what a schedule switches off while the terms go on."""
    ends = [m for m in balancer.modules() if isinstance(m, Schedule) and m.kind == "off_after"]
    return {part for end in ends if terms not in end.modules() for part in end.modules()}


def _balances_by_other_means(part: Balancer) -> bool:
    """Return whether a part drives loads towards equality by moving the choice, or by a loss unlike `Switch`'s."""
    if not part.balances_load or part.alpha is not None:
        return False
    moves_choice = type(part).adjust_choice is not Balancer.adjust_choice
    return part.bias_step != 0 if moves_choice else getattr(part, "weight", 1) != 0


def _warn_of_step(part: Balancer, step: float, score: ScoreFunction, num_experts: int) -> None:
    mean, spread = score_spread(score, num_experts)
    if part.bias_multiplies and mean:
        spread /= mean
    if num_experts == 1 or step <= MAX_STEP * spread:
        return
    relative = " relative to their mean" if part.bias_multiplies else ""
    warnings.warn(
        f"{type(part).__name__}: the bias moves by {step:g} a step, {step / max(spread, TINY):.3g} times the spread"
        f"{relative} {spread:.3g} of {name_of(score)} scores over {num_experts} experts (standard deviation, for "
        f"unit-normal logits), so that it decides instead of the score; use a rate below {MAX_STEP * spread:.2g}, or "
        "scores that lie further apart, such as sigmoid",
        HimoeWarning,
        stacklevel=4,
    )


@torch.no_grad()
def score_spread(score: ScoreFunction, num_experts: int) -> tuple[float, float]:
    """Return mean and standard deviation over experts of the scores of unit-normal logits, which a fresh gate gives.

    Always the same numbers, also of scores that are random, and random numbers elsewhere stay as they are.
    """
    rows = -(-SPREAD_LOGITS // num_experts)
    generator = torch.Generator("cpu").manual_seed(0)
    logits = torch.randn(rows, num_experts, generator=generator, device="cpu", dtype=torch.float32)
    with torch.random.fork_rng(devices=[]):
        torch.set_rng_state(generator.get_state())  # of the CPU alone; manual_seed would set every device's
        scores = score(logits).to(torch.float64)
    return scores.mean().item(), scores.std(-1, correction=0).mean().item()
