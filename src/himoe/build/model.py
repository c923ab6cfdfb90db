"""From the configuration to the model: names become objects, and every option is checked against its constructor."""

import warnings

import torch
from torch import nn

from himoe import registry
from himoe.build.calling import check_type, construct, parameters_of, try_out
from himoe.build.router import build_router
from himoe.config import Config
from himoe.config.schema import MoEConfig
from himoe.errors import ConfigError, HimoeWarning
from himoe.models import DecoderLM
from himoe.nn import (
    GELUMLP,
    Capacity,
    Dropless,
    GatedNetwork,
    MoE,
    PooledExperts,
    ReLU2MLP,
    ReLUMLP,
    SwiGLU,
    non_causal_parts,
)

DENSE = {"swiglu": SwiGLU, "gelu": GELUMLP, "relu": ReLUMLP, "relu2": ReLU2MLP}


def build_model(config: Config, vocab_size: int) -> DecoderLM:
    """Build the language model of a configuration, initialised from `config.seed`.

    Args:
        config: the resolved configuration.
        vocab_size: V, of the tokenizer in use.

    Raises:
        ConfigError: an unknown option, or one that its constructor refuses; a part that lets later tokens change
            earlier ones, unless `moe.allow_non_causal` is set: then it is a warning.
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
    _refuse_if_not_causal(model, allowed=config.moe.allow_non_causal)
    return model


def check_model(config: Config) -> None:
    """Refuse a configuration that `build_model` refuses, without memory for weights.

    Each router is built as it is, which takes D·E numbers, so that a reader's own parts of it are tried out on a token;
    everything else is built on the meta device, so that a reader's own experts are not.
    """
    if config.moe_layer_indices:
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
            warnings.simplefilter("ignore")  # the whole model warns of the same
            build_router(config.moe, config.model.dim)
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        build_model(config, config.data.vocab_size)  # any size: no rule depends on it


def build_moe(moe: MoEConfig, dim: int) -> MoE:
    """Build one MoE layer of width `dim`."""
    experts = _build_experts(moe, dim)
    dispatcher = Dropless()
    if moe.capacity_factor is not None:
        dispatcher = Capacity(moe.capacity_factor, order=moe.capacity_order)
    shared = DENSE.get(moe.experts, SwiGLU)(dim, moe.shared_dim) if moe.shared_dim else None
    if shared is not None and moe.shared_gate:
        shared = GatedNetwork(shared, dim)
    router = build_router(moe, dim)
    router.fused = moe.backend == "triton"
    layer = MoE(router, experts, dispatcher=dispatcher, shared_expert=shared)
    if moe.capacity_factor is not None and layer.router.top_k * moe.capacity_factor >= moe.num_experts:
        warnings.warn(
            f"moe.capacity_factor = {moe.capacity_factor:g} with up to {layer.router.top_k} of {moe.num_experts} "
            "experts a token: every expert has a place for every token, so nothing is ever dropped; lower it, or set "
            "max_k in moe.selector_options",
            HimoeWarning,
            stacklevel=2,
        )
    if own := [kind for kind in (moe.experts, *(pool.experts for pool in moe.pools or [])) if kind and ":" in kind]:
        try_out(layer, f"moe.experts {', '.join(map(repr, own))}", dim)
    return layer


def _build_experts(moe: MoEConfig, dim: int) -> nn.Module:
    """Build the experts of one layer, one kind or several pools."""

    def pool(kind: str, where: str, num_experts: int, hidden_dim: int) -> nn.Module:
        constructor = registry.load("experts", kind)
        given = {"num_experts": num_experts, "dim": dim, "hidden_dim": hidden_dim, "backend": moe.backend}
        accepted = parameters_of(constructor, where)
        experts = construct(constructor, where, **{name: value for name, value in given.items() if name in accepted})
        check_type(experts, nn.Module, where)
        return experts

    if moe.pools is None:
        return pool(moe.experts, f"moe.experts {moe.experts!r}", moe.num_experts, moe.expert_dim)
    pools = [
        pool(kind, f"moe.pools[{index}] {kind!r}", entry.num_experts, entry.expert_dim or moe.expert_dim)
        for index, entry in enumerate(moe.pools)
        for kind in (entry.experts or moe.experts,)
    ]
    return construct(PooledExperts, "moe.pools", *pools)


def _refuse_if_not_causal(model: nn.Module, *, allowed: bool) -> None:
    """Raise or warn where a later token can change an earlier one's routing."""
    parts = non_causal_parts(model)
    if not parts:
        return
    named = ", ".join(f"{name} ({reason})" if reason else name for name, reason in sorted(parts.items()))
    told = (
        f"{named}: not causal as configured, later tokens can change the routing of earlier ones, so that a language "
        "model sees its future in training"
    )
    if not allowed:
        raise ConfigError(
            f"{told}; choose another, or train it all the same with --allow-non-causal (in a configuration "
            "moe.allow_non_causal = true)"
        )
    warnings.warn(f"{told} and its loss is too good", HimoeWarning, stacklevel=3)
