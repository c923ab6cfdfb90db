"""Warnings and refusals for coefficients that are known to fail, with the numbers that make them fail."""

import math
import warnings

import torch

from himoe.balance import Balancer, DualAscent, Schedule, TwoLevelTerms
from himoe.bounds import MAX_RATIO, SPREAD_LOGITS, step_fault
from himoe.errors import ConfigError, GuardError, HimoeWarning
from himoe.functional.bound import name_of
from himoe.nn.router import ScoreFunction


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
    parts = [part for part in balancer.modules() if isinstance(part, Balancer)]
    for part in parts:
        if isinstance(part, TwoLevelTerms):
            _warn_of_one_group(part, *_extremes(part, parts), top_k)
        if part.bias_step and score is not None and num_experts is not None:
            _warn_of_step(part, part.bias_step, score, num_experts)
    _refuse_collapse(parts, force)


def _extremes(terms: TwoLevelTerms, parts: list[Balancer]) -> tuple[float, float]:
    """Return the largest λ_intra and the least λ_inter beside it: dual ascent moves both between 0 and a maximum."""
    maxima = [part.maximum for part in parts if isinstance(part, DualAscent) and part.terms is terms]
    return (max(terms.lambda_intra, *maxima), 0.0) if maxima else (terms.lambda_intra, terms.lambda_inter)


def _warn_of_one_group(terms: TwoLevelTerms, intra: float, inter: float, top_k: int) -> None:
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


def _refuse_collapse(parts: list[Balancer], force: bool) -> None:
    conditional = [part for part in parts if isinstance(part, TwoLevelTerms) and part.intra == "group_conditional"]
    largest = sum(_extremes(terms, parts)[0] for terms in conditional)  # each pulls: those of every group, for instance
    if largest == 0:
        return
    starts, ends = zip(*(_steps_of(terms, parts) for terms in conditional), strict=True)
    lasting = [part for part in parts if (span := _steps_of(part, parts))[0] <= min(starts) and span[1] >= max(ends)]
    alpha = sum(part.alpha or 0 for part in lasting)
    if any(_balances_by_other_means(part) for part in lasting):
        return  # no ratio is known to fail
    if alpha == 0:
        problem = f"lambda_intra = {largest:g} without any load-balancing part that acts as long as it does"
    elif largest / alpha > MAX_RATIO * (1 + 1e-9):
        problem = f"lambda_intra/alpha = {largest:g}/{alpha:g} = {largest / alpha:g} > {MAX_RATIO}"
    else:
        return
    advice = "one expert per group would take everything; raise the load-balancing weight alpha or lower lambda_intra"
    message = f"group_conditional: {problem}: {advice}"
    if not force:
        raise GuardError(f"{message} (force=True, in a configuration moe.force = true, to try it all the same)")
    warnings.warn(message, HimoeWarning, stacklevel=4)


def _steps_of(part: Balancer, parts: list[Balancer]) -> tuple[float, float]:
    """Return from which optimizer step on a part acts in full, and until which, by the schedules around it."""
    start, end = 0.0, math.inf
    for schedule in parts:
        if not isinstance(schedule, Schedule) or all(part is not inner for inner in schedule.modules()):
            continue
        if (schedule.scales == "losses") != (type(part).losses is not Balancer.losses):
            continue
        scaled = part.loss_names[:1] if schedule.only is None else schedule.only
        if part.loss_names and part.loss_names[0] not in scaled:  # of the two terms, the one inside groups
            continue
        if schedule.kind == "off_after":
            end = min(end, schedule.steps)
        else:
            start = max(start, schedule.steps)
    return start, end


def _balances_by_other_means(part: Balancer) -> bool:
    """Return whether a part drives loads towards equality by moving the choice, or by a loss unlike `Switch`'s."""
    if not part.balances_load or part.alpha is not None:
        return False
    moves_choice = type(part).adjust_choice is not Balancer.adjust_choice
    return part.bias_step != 0 if moves_choice else getattr(part, "weight", 1) != 0


def _warn_of_step(part: Balancer, step: float, score: ScoreFunction, num_experts: int) -> None:
    mean, spread = score_spread(score, num_experts)
    facts = {"score": name_of(score), "num_experts": num_experts, "multiplies": part.bias_multiplies}
    if fault := step_fault(step, mean, spread, **facts):
        warnings.warn(f"{type(part).__name__}: {fault}", HimoeWarning, stacklevel=4)


@torch.no_grad()
def score_spread(score: ScoreFunction, num_experts: int) -> tuple[float, float]:
    """Return mean and standard deviation over experts of the scores of unit-normal logits.

    That is a convention: logits of a fresh gate with small weights lie closer together, those of a trained one further
    apart. Always the same numbers, also of scores that are random, and random numbers elsewhere stay as they are.
    """
    rows = -(-SPREAD_LOGITS // num_experts)
    generator = torch.Generator("cpu").manual_seed(0)
    logits = torch.randn(rows, num_experts, generator=generator, device="cpu", dtype=torch.float32)
    with torch.random.fork_rng(devices=[]):
        torch.set_rng_state(generator.get_state())  # of the CPU alone; manual_seed would set every device's
        scores = score(logits).to(torch.float64)
    return scores.mean().item(), scores.std(-1, correction=0).mean().item()
