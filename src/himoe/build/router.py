"""The router of a layer: a preset's, or one spelled out by gate, selector, score and balancers."""

import warnings
from collections.abc import Callable
from typing import Any

import torch

from himoe import registry
from himoe.balance import Balancer, Chain, PerGroup, Schedule
from himoe.build.calling import bind, call, check_type, construct, parameters_of, try_out
from himoe.config.schema import BalancerEntry, MoEConfig
from himoe.errors import ConfigError, HimoeWarning
from himoe.functional.bound import unbound
from himoe.functional.groups import Groups
from himoe.nn import Router
from himoe.presets import check_guards
from himoe.types import RouterContext


def build_router(moe: MoEConfig, dim: int) -> Router:
    """Build the router of a preset, or the one spelled out by gate, selector, score and balancers."""
    extra = [_build_balancer(index, entry, moe) for index, entry in enumerate(moe.balancers)]
    if moe.preset is not None:
        return _build_preset(moe, dim, extra)
    assert moe.selector and moe.score and moe.gate, "without a preset, the configuration has settled all three"
    selector, score = _bound("selector", moe.selector, moe, moe.selector_options), _bound("score", moe.score, moe, {})
    balancer = Chain(*extra)
    gate = registry.load("gates", moe.gate)
    router = Router(
        call(gate, f"moe.gate {moe.gate!r}", moe.gate_options, {"dim": dim, "num_experts": moe.num_experts}),
        selector,
        num_experts=moe.num_experts,
        score=score,
        balancer=balancer,
        renormalize=renormalizes(selector, score, moe.top_k) if moe.renormalize is None else moe.renormalize,
    )
    parts = {"moe.gate": moe.gate, "moe.score": moe.score, "moe.selector": moe.selector}
    if own := [f"{key} {name!r}" for key, name in parts.items() if ":" in name]:
        try_out(router, " with ".join(own), dim)
    else:
        construct(lambda: router.top_k, f"moe.selector {moe.selector!r}")  # chooses once: options that do not fit show
    _refuse_what_needs_noise(router, "set")
    check_guards(balancer, top_k=moe.top_k, score=score, num_experts=moe.num_experts, force=moe.force)
    _warn_of_what_cannot_learn(moe, router)
    return router


def renormalizes(selector: Callable[..., Any], score: Callable[..., Any], top_k: int) -> bool:
    """Return whether weights are divided by their sum: what score or selector was published with, else if K > 1."""
    published = (getattr(unbound(part), "renormalize", None) for part in (score, selector))
    return next((stated for stated in published if stated is not None), top_k > 1)


def _warn_of_what_cannot_learn(moe: MoEConfig, router: Router) -> None:
    parts = [part for part in router.balancer.modules() if isinstance(part, Balancer) and part.balances_load]
    ours = moe.selector in registry.SELECTORS and moe.score in registry.SCORES  # a reader's own may look at more
    choosy = ours and moe.top_k < moe.num_experts
    idle = [part for part in parts if choosy and not _moves_choice(part, router)]
    if idle:
        warnings.warn(
            f"moe.balancers: what {', '.join(sorted({type(part).__name__ for part in idle}))} moves makes no "
            f"difference to what moe.selector {moe.selector!r} chooses as configured",
            HimoeWarning,
            stacklevel=3,
        )
    elif not any(getattr(part, "balances_load", False) for part in (unbound(router.selector), *parts)):
        warnings.warn(
            "moe.selector without moe.balancers that balance load: nothing keeps the experts evenly used",
            HimoeWarning,
            stacklevel=3,
        )
    if moe.top_k == 1 and (router.renormalize or (ours and _best_is_always_alike(router))):
        cause = "moe.renormalize = true" if moe.renormalize else f"moe.score {moe.score!r}"
        warnings.warn(
            f"{cause} with moe.top_k = 1: every weight is 1, so the gate learns nothing from the task; "
            "choose another, or raise moe.top_k",
            HimoeWarning,
            stacklevel=3,
        )


@torch.no_grad()
def _moves_choice(part: Balancer, router: Router) -> bool:
    """Return whether the selector chooses otherwise once scores are as far from each other as the part can move them.

    A loss moves the scores themselves, through the gate; a bias multiplies them, or is added to them.
    """
    with torch.device("cpu"):  # also where the model is built on the meta device
        logits = torch.randn(8, router.num_experts, generator=torch.Generator().manual_seed(0))
        scores, factors = router.score(logits), torch.arange(1.0, router.num_experts + 1) ** 8
        if type(part).adjust_choice is Balancer.adjust_choice:
            moved = router.score(logits.flip(0, 1))
        else:
            moved = scores * factors if part.bias_multiplies else scores + factors - factors.mean()
        context = RouterContext(batch_shape=(len(scores),), token_ids=torch.arange(len(scores)))
        choices = [router.selector(values, context) for values in (scores, moved)]
        before, after = (torch.zeros_like(scores, dtype=torch.bool).scatter(-1, *choice) for choice in choices)
        return not torch.equal(before, after)


@torch.no_grad()
def _best_is_always_alike(router: Router) -> bool:
    """Return whether the best expert of every token has the same score, whatever the logits."""
    with torch.device("cpu"):
        logits = torch.linspace(-3, 3, 7)[:, None] * torch.arange(1.0, router.num_experts + 1)
        best = router.score(logits).amax(-1)
        return router.num_experts > 1 and bool((best == best[0]).all())


def build_groups(moe: MoEConfig) -> Groups:
    """Return the groups of experts that a configuration names, also for a router that does not choose by group."""
    return Groups.of(moe.groups or moe.num_groups, moe.num_experts)


def _build_preset(moe: MoEConfig, dim: int, extra: list[Balancer]) -> Router:
    assert moe.preset is not None
    preset = registry.load("presets", moe.preset)
    accepted = parameters_of(preset, f"moe.preset {moe.preset!r}")
    given: dict[str, Any] = {"dim": dim, "num_experts": moe.num_experts, "top_k": moe.top_k}
    if "groups" in accepted:
        given |= {"groups": moe.groups, "num_groups": None if moe.groups else moe.num_groups}
        given["top_k"] = moe.top_k_per_group or moe.top_k
    elif "num_groups" in accepted:
        given["num_groups"] = moe.num_groups
    given |= {name: value for name, value in (("force", moe.force), ("extra", extra)) if name in accepted}
    options = ({} if moe.renormalize is None else {"renormalize": moe.renormalize}) | moe.options
    router = call(preset, f"moe.options of preset {moe.preset!r}", options, given)
    check_type(router, Router, f"moe.preset {moe.preset!r}")
    if extra and "extra" not in accepted:
        router.balancer = Chain(router.balancer, *extra)
        facts = {"top_k": moe.top_k, "num_experts": moe.num_experts, "force": moe.force}
        check_guards(router.balancer, score=router.score, **facts)
    _refuse_what_needs_noise(
        router, f"moe.preset ({moe.preset!r}) brings its own gate; give moe.selector instead, with"
    )
    return router


def _refuse_what_needs_noise(router: Router, advice: str) -> None:
    """Raise `ConfigError` for a balancer whose losses need a gate that adds noise, where the gate adds none."""
    if hasattr(router.gate, "noise_std"):
        return
    for part in router.balancer.modules():
        if isinstance(part, Balancer) and part.needs_noise:
            raise ConfigError(
                f'moe.balancers: {type(part).__name__} needs a gate that adds noise: {advice} moe.gate = "noisy"'
            )


def _build_balancer(index: int, entry: BalancerEntry, moe: MoEConfig) -> Balancer:
    """Build one balancer, one for every group where it is to be, and its schedule."""
    constructor, where = registry.load("balancers", entry.name), f"moe.balancers[{index}] {entry.name!r}"
    accepted = parameters_of(constructor, where)

    def build(num_experts: int, groups: Groups, top_k: int, chosen_by: Groups | None = None) -> Balancer:
        layer = {"num_experts": num_experts, "groups": groups, "top_k": top_k}
        if chosen_by is not None and "selection_groups" in accepted:
            layer |= {"selection_groups": chosen_by, "top_k": _top_k_per_group(moe, chosen_by)}
        given = {name: value for name, value in layer.items() if name in accepted}
        built = call(constructor, where, entry.options, given)
        check_type(built, Balancer, where)
        return built

    groups = build_groups(moe)
    by_group = moe.preset in registry.GROUPED_PRESETS or moe.selector in registry.GROUPED_SELECTORS
    if entry.per_group:
        each = _top_k_per_group(moe, groups)
        if "top_k" in accepted and not (by_group or moe.top_k_per_group):
            each = _shares_of_top_k(moe, groups, where)
        sizes = zip(groups.sizes, each, strict=True)
        built = PerGroup(groups, [build(size, Groups.equal(size, 1), k) for size, k in sizes])
    else:
        built = build(moe.num_experts, groups, moe.top_k, groups if by_group else None)
    return built if entry.schedule is None else construct(Schedule, where, built, **entry.schedule.model_dump())


def _bound(part: str, name: str, moe: MoEConfig, options: dict[str, Any]) -> Callable[..., Any]:
    """Return a selector or score function with what the layer and the user give."""
    function, where = registry.load(f"{part}s", name), f"moe.{part} {name!r}"
    if part == "score" and ":" in name:
        return function  # as it is; it need not even name its parameters
    accepted, groups = parameters_of(function, where), build_groups(moe)
    by_group = name in registry.GROUPED_SELECTORS | registry.GROUPED_SCORES
    k = _top_k_per_group(moe, groups) if by_group else moe.top_k
    layer = {"num_experts": moe.num_experts, "groups": groups, "k": k}
    given = {key: value for key, value in layer.items() if key in accepted}
    if "max_k" in accepted:
        options = {"max_k": moe.num_experts} | options
    return bind(function, where, options, given)


def _top_k_per_group(moe: MoEConfig, groups: Groups) -> tuple[int, ...]:
    return tuple(moe.top_k_per_group or [moe.top_k // groups.num_groups] * groups.num_groups)


def _shares_of_top_k(moe: MoEConfig, groups: Groups, where: str) -> tuple[int, ...]:
    """Return how many of a token's experts are a group's fair share where the best of all are taken: K·S_g/E."""
    if any(moe.top_k * size % moe.num_experts for size in groups.sizes):
        raise ConfigError(
            f"{where}: per_group needs a whole number of a token's experts for each group, and moe.top_k = {moe.top_k} "
            f"does not divide over groups of {', '.join(map(str, groups.sizes))}; choose another moe.top_k, or select "
            f"by group with {', '.join(sorted(registry.GROUPED_SELECTORS))}"
        )
    return tuple(moe.top_k * size // moe.num_experts for size in groups.sizes)
