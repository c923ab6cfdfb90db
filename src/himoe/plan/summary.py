"""A whole plan as one tree of numbers, the document that `himoe plan --json` prints."""

import math
from dataclasses import asdict
from typing import Any

from himoe.config import Config, TrainConfig
from himoe.plan.cautions import cautions
from himoe.plan.count import flops, parameters
from himoe.plan.memory import Ranks, memory
from himoe.plan.routing import UNEVEN, combinations, expected_drop, log2_combinations, tokens_per_expert
from himoe.plan.shape import Experts, Shape

TOKENS_PER_ACTIVE = 20
"""Tokens for each active parameter (Chinchilla, arXiv 2203.15556; for active parameters 2605.11689)."""


def summarize(
    shape: Shape, train: TrainConfig, *, config: Config | None = None, ranks: Ranks | None = None
) -> dict[str, Any]:
    """Return everything that is planned of a model.

    Args:
        shape: of the model.
        train: how it is trained.
        config: where the shape comes from one: what it says of balancing, capacity and documents counts too.
        ranks: how it is spread; one rank by default.

    Raises:
        ConfigError: ranks that do not divide the batch or the experts.

    >>> from himoe.config import load_config
    >>> from himoe.plan import shape_of
    >>> config = load_config("lm_tiny")
    >>> summarize(shape_of(config), config.train, config=config)["shape"]["granularity"]
    0.25
    """
    ranks = Ranks() if ranks is None else ranks
    documents = config is None or not config.data.cross_documents
    held = memory(shape, train, ranks, documents=documents)  # first: it refuses ranks that do not divide
    counts, cost = parameters(shape), flops(shape, train.seq_len, train.recompute)
    step = train.batch_size * train.seq_len
    return {
        "name": shape.name,
        "source": shape.source,
        "shape": _shape(shape),
        "parameters": asdict(counts),
        "flops_per_token": asdict(cost),
        "training": {
            "steps": train.steps,
            "tokens_per_step": step,
            "tokens": step * train.steps,
            "flops": step * train.steps * cost.total,
            "tokens_per_active_parameter": step * train.steps / counts.active,
            "chinchilla_tokens": TOKENS_PER_ACTIVE * counts.active,
            "chinchilla_flops": TOKENS_PER_ACTIVE * counts.active * cost.total,
            "seq_len": train.seq_len,
            "precision": train.precision,
            "optimizer": train.optimizer,
            "recompute": train.recompute,
        },
        "memory": {**asdict(ranks), "sequences": ranks.rows(train), **asdict(held)},
        "routing": None if shape.experts is None else _routing(shape.experts, train, ranks, config),
        "warnings": list(cautions(shape, counts, train, ranks, config)),
    }


def _shape(shape: Shape) -> dict[str, Any]:
    """Return the sizes; granularity is g = F/(4·D), sparsity s = E/K, and `width` K·g with the shared expert's g."""
    found: dict[str, Any] = {
        "vocab_size": shape.vocab_size,
        "dim": shape.dim,
        "num_layers": shape.num_layers,
        "tie_embeddings": shape.tie_embeddings,
    }
    experts = shape.experts
    if experts is None:
        return {**found, "moe_layers": 0}
    pools = [
        {
            "num_experts": pool.num_experts,
            "used": float(pool.used * experts.presence),
            "expert_dim": None if pool.network is None else pool.network.hidden_dim,
            "granularity": None if pool.network is None else pool.network.hidden_dim / (4 * shape.dim),
        }
        for pool in experts.pools
    ]
    shared = 0.0 if experts.shared is None else experts.shared.hidden_dim / (4 * shape.dim)
    return {
        **found,
        "moe_layers": sum(layer.count for layer in shape.layers if isinstance(layer.feed_forward, Experts)),
        "num_experts": experts.num_experts,
        "top_k": experts.mean_top_k,
        "num_groups": len(experts.group_sizes),
        "granularity": pools[0]["granularity"] if len(pools) == 1 else None,
        "shared_granularity": shared,
        "width": sum(pool["used"] * (pool["granularity"] or 0) for pool in pools) + shared,
        "sparsity": experts.num_experts / experts.mean_top_k,
        "pools": pools,
    }


def _routing(experts: Experts, train: TrainConfig, ranks: Ranks, config: Config | None) -> dict[str, Any]:
    step, local = train.batch_size * train.seq_len, ranks.rows(train) * train.seq_len
    factor = None if config is None else config.moe.capacity_factor
    exact = {which: combinations(experts, flat=flat) for which, flat in (("flat", True), ("grouped", False))}
    logs = {which: log2_combinations(experts, flat=flat) for which, flat in (("flat", True), ("grouped", False))}
    return {
        "tokens_per_expert_per_step": _one(tokens_per_expert(experts, step)),
        "tokens_per_expert_per_micro_batch": _one(tokens_per_expert(experts, local * ranks.ep)),
        "experts_per_rank": experts.num_experts // ranks.ep,
        "combinations": exact,
        "log2_combinations": {which: None if math.isnan(bits) else bits for which, bits in logs.items()},
        "expected_drop": None if factor is None else expected_drop(experts, factor, local),
        "expected_drop_uneven": None if factor is None else expected_drop(experts, factor, local, cv=UNEVEN),
    }


def _one(values: list[float]) -> float | list[float]:
    return values[0] if len(set(values)) == 1 else values
