"""From the configuration to the model: names become objects, and every option is checked against its constructor."""

import inspect
import math
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from types import NoneType, UnionType
from typing import Any, get_args

import torch
from torch import nn

from himoe import registry
from himoe.balance import Balancer, Chain
from himoe.config import Config
from himoe.config.schema import MoEConfig
from himoe.errors import ConfigError, HimoeWarning, nearest
from himoe.functional.groups import Groups
from himoe.models import DecoderLM
from himoe.nn import GELUMLP, Capacity, Dropless, Gate, MoE, Router, SwiGLU
from himoe.presets import check_guards

KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text in quotes"}
DENSE = {"swiglu": SwiGLU, "gelu": GELUMLP}
LONGEST_REASON = 200


def build_model(config: Config, vocab_size: int) -> DecoderLM:
    """Build the language model of a configuration, initialised from `config.seed`.

    Args:
        config: the resolved configuration.
        vocab_size: V, of the tokenizer in use.

    Raises:
        ConfigError: an unknown option, or one that its constructor refuses.

    Warns:
        HimoeWarning: a part that lets later tokens change earlier ones, which a language model should not have.
    """
    is_moe = set(config.moe_layer_indices)

    def feed_forward(layer: int) -> nn.Module:
        if layer in is_moe:
            return build_moe(config.moe, config.model.dim)
        return DENSE[config.model.ffn](config.model.dim, config.model.ffn_dim)

    torch.manual_seed(config.seed)
    with warnings.catch_warnings():
        warnings.simplefilter("once")  # the same warning from every layer would say nothing more
        model = DecoderLM(
            vocab_size=vocab_size,
            dim=config.model.dim,
            num_layers=config.model.num_layers,
            num_heads=config.model.num_heads,
            num_kv_heads=config.model.num_kv_heads,
            feed_forward=feed_forward,
            tie_embeddings=config.model.tie_embeddings,
            qk_norm=config.model.qk_norm,
            rope_theta=config.model.rope_theta,
        )
    _warn_if_not_causal(model)
    return model


def build_moe(moe: MoEConfig, dim: int) -> MoE:
    """Build one MoE layer of width `dim`."""
    kind, where = registry.load("experts", moe.experts), f"moe.experts {moe.experts!r}"
    experts = _construct(kind, where, moe.num_experts, dim, moe.expert_dim, backend=moe.backend)
    _check_type(experts, nn.Module, where)
    dispatcher = Dropless()
    if moe.capacity_factor is not None:
        dispatcher = Capacity(moe.capacity_factor, order=moe.capacity_order)
    shared = SwiGLU(dim, moe.shared_dim) if moe.shared_dim else None
    layer = MoE(build_router(moe, dim), experts, dispatcher=dispatcher, shared_expert=shared)
    if ":" in moe.experts:
        _try_out(layer, where, dim)
    return layer


def build_router(moe: MoEConfig, dim: int) -> Router:
    """Build the router of a preset, or the one spelled out by selector, score and balancers."""
    extra = [_build_balancer(i, entry.name, entry.options, moe) for i, entry in enumerate(moe.balancers)]
    if moe.preset is not None:
        return _build_preset(moe, dim, extra)
    assert moe.selector and moe.score, "without a preset, the configuration has settled both"
    score, balancer = registry.load("scores", moe.score), Chain(*extra)
    check_guards(balancer, top_k=moe.top_k, score=score, force=moe.force)
    if not any(part.balances_load for part in balancer.modules() if isinstance(part, Balancer)):
        warnings.warn(
            "moe.selector without moe.balancers that balance load: nothing keeps the experts evenly used",
            HimoeWarning,
            stacklevel=2,
        )
    if moe.renormalize and moe.top_k == 1:
        warnings.warn(
            "moe.renormalize = true with moe.top_k = 1: every weight is 1, so the gate learns nothing from the task; "
            "leave it out, or raise moe.top_k",
            HimoeWarning,
            stacklevel=2,
        )
    router = Router(
        Gate(dim, moe.num_experts),
        _build_selector(moe.selector, moe),
        num_experts=moe.num_experts,
        score=score,
        balancer=balancer,
        renormalize=moe.top_k > 1 if moe.renormalize is None else moe.renormalize,
    )
    parts = {"moe.score": moe.score, "moe.selector": moe.selector}
    if own := [f"{key} {name!r}" for key, name in parts.items() if ":" in name]:
        _try_out(router, " with ".join(own), dim)
    return router


def build_groups(moe: MoEConfig) -> Groups:
    """Return the groups of experts that a configuration names, also for a router that does not choose by group."""
    return Groups.of(moe.groups or moe.num_groups, moe.num_experts)


def _build_preset(moe: MoEConfig, dim: int, extra: list[Balancer]) -> Router:
    assert moe.preset is not None
    preset = registry.load("presets", moe.preset)
    accepted = _parameters(preset, f"moe.preset {moe.preset!r}")
    given: dict[str, Any] = {"dim": dim, "num_experts": moe.num_experts, "top_k": moe.top_k}
    if "groups" in accepted:
        given |= {"groups": moe.groups, "num_groups": None if moe.groups else moe.num_groups}
        given["top_k"] = moe.top_k_per_group or moe.top_k
    elif "num_groups" in accepted:
        given["num_groups"] = moe.num_groups
    given |= {name: value for name, value in (("force", moe.force), ("extra", extra)) if name in accepted}
    options = ({} if moe.renormalize is None else {"renormalize": moe.renormalize}) | moe.options
    router = _call(preset, f"moe.options of preset {moe.preset!r}", options, given)
    _check_type(router, Router, f"moe.preset {moe.preset!r}")
    if extra and "extra" not in accepted:
        router.balancer = Chain(router.balancer, *extra)
        check_guards(router.balancer, top_k=moe.top_k, score=router.score, force=moe.force)
    return router


def _build_balancer(index: int, name: str, options: dict[str, Any], moe: MoEConfig) -> Balancer:
    balancer, where = registry.load("balancers", name), f"moe.balancers[{index}] {name!r}"
    accepted = _parameters(balancer, where)
    given: dict[str, Any] = {}
    if "num_experts" in accepted:
        given["num_experts"] = moe.num_experts
    if "groups" in accepted:
        given["groups"] = build_groups(moe)
    built = _call(balancer, where, options, given)
    _check_type(built, Balancer, where)
    return built


def _build_selector(name: str, moe: MoEConfig) -> Callable[..., Any]:
    selector = registry.load("selectors", name)
    if "groups" not in _parameters(selector, f"moe.selector {name!r}"):
        return partial(selector, k=moe.top_k)
    groups = build_groups(moe)
    if name not in registry.GROUPED_SELECTORS:
        return partial(selector, groups=groups, k=moe.top_k)
    per_group = tuple(moe.top_k_per_group or [moe.top_k // groups.num_groups] * groups.num_groups)
    return partial(selector, groups=groups, k=per_group)


def _parameters(function: Any, where: str) -> Mapping[str, inspect.Parameter]:
    try:
        return inspect.signature(function).parameters
    except (TypeError, ValueError) as error:  # it cannot be called, or is written in C and names no parameters
        raise ConfigError(f"{where}: must be a function or class whose parameters have names") from error


def _call(function: Callable[..., Any], where: str, options: dict[str, Any], given: dict[str, Any]) -> Any:
    """Call `function` with what the layer gives and the user's options, after checking their names and kinds."""
    parameters = _parameters(function, where)
    allowed = [name for name in parameters if name not in given]
    for name, value in options.items():
        if name not in allowed:
            raise ConfigError(
                f"{where}: unknown option {name} = {value!r}; allowed: {', '.join(allowed) or 'none'}"
                f"{nearest(name, allowed)}"
            )
        if kind := _other_kind(value, parameters[name].annotation):
            raise ConfigError(f"{where}: {name} = {value!r} must be {kind}")
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{where}: {name} = {value!r} must be a finite number")
    return _construct(function, where, **given, **options)


def _construct(function: Callable[..., Any], where: str, *arguments: Any, **options: Any) -> Any:
    try:
        return function(*arguments, **options)
    except ConfigError as error:
        raise type(error)(f"{where}: {error}") from error
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{where}: {_in_one_line(error)}") from error


def _check_type(built: Any, kind: type, where: str) -> None:
    if not isinstance(built, kind):
        raise ConfigError(f"{where}: gives a {type(built).__name__}, must give a {kind.__module__}.{kind.__name__}")


@torch.no_grad()
def _try_out(module: nn.Module, where: str, dim: int) -> None:
    """Send one zero token through a reader's own part, in eval mode and without moving the random numbers."""
    try:
        with torch.random.fork_rng(devices=[]):
            module.eval()(torch.zeros(1, dim))
    except Exception as error:  # somebody else's code may raise anything
        raise ConfigError(f"{where}: fails on one token: {_in_one_line(error)}") from error
    module.train()


def _in_one_line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= LONGEST_REASON else f"{text[: LONGEST_REASON - 1]}…"


def _other_kind(value: Any, annotation: Any) -> str:
    """Return in words which plain kind `annotation` asks for if `value` is of another; what is not plain passes."""
    kinds = set(get_args(annotation)) if isinstance(annotation, UnionType) else {annotation}
    if not kinds <= {*KINDS, NoneType} or type(value) in kinds or (type(value) is int and float in kinds):
        return ""
    return " or ".join(word for kind, word in KINDS.items() if kind in kinds)


def _warn_if_not_causal(model: nn.Module) -> None:
    parts = {type(m).__name__ for m in model.modules() if getattr(m, "causal", True) is False}
    if parts:
        warnings.warn(
            f"{', '.join(sorted(parts))}: not causal as configured, later tokens can change the routing of earlier "
            "ones; a language model's held-out loss in training mode would be too good",
            HimoeWarning,
            stacklevel=2,
        )
