"""Shapes within a budget: which there are, and which of them no other one beats in everything that counts.

A recipe or file gives all that is not searched: vocabulary, kinds, routing, batch and optimizer. The search varies

| what | over |
|---|---|
| width D | 64 to 16,384 in steps of about a quarter, heads of 64, of 32 up to D = 256 |
| layers | as many as the budget of active parameters allows, between D/128 and D/16; without one, D/64 |
| sparsity s = E/K | 2, 4 … 256, and 1 for a dense layer in disguise, K = E = 1 |
| granularity g = F/(4·D) | 1, 1/2, 1/4 … 1/64, with K·g = 1, so that the experts of a token are a dense layer's size |

The Pareto set is what is left when every shape goes that another one equals or beats in each of these: more parameters,
more combinations of experts, less memory, fewer FLOPs a token.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass

from himoe.config import Config, MoEConfig
from himoe.errors import ConfigError, nearest
from himoe.plan.cautions import FEW_TOKENS
from himoe.plan.count import flops, parameters
from himoe.plan.memory import Ranks, memory
from himoe.plan.of_config import shape_of
from himoe.plan.routing import log2_combinations, tokens_per_expert
from himoe.plan.shape import Shape
from himoe.plan.summary import TOKENS_PER_ACTIVE
from himoe.registry import GROUPED_PRESETS, GROUPED_SELECTORS

WIDTHS = [64, 96, 128, 160, 192, 224, 256, 320, 384, 448, 512, 640, 768, 896, 1024, 1280, 1536, 1792, 2048, 2560, 3072,
          3584, 4096, 5120, 6144, 7168, 8192, 10240, 12288, 14336, 16384]  # fmt: skip
SPARSITIES = [2**n for n in range(1, 9)]
SLICES = [2**n for n in range(7)]
"""K of each granularity 1/K."""
NARROW = 256
DEEPEST, FLATTEST = 16, 128
"""Of D/L: within these, a model's depth matters little (arXiv 2001.08361, figure 5)."""
NEAR = 0.8
"""Share of an active budget that a shape must use."""
SMALLEST_EXPERT = 16
BUDGETS = ("active", "total", "memory", "compute")
AMOUNT = re.compile(r"(\d+\.?\d*(?:e[+-]?\d+)?)\s*(?:([kmgtp]?)(i?)b|([kmgbtp]))?", re.I)
POWERS = {"": 0, "k": 1, "m": 2, "g": 3, "b": 3, "t": 4, "p": 5}


@dataclass(frozen=True)
class Found:
    """One shape within the budget.

    Attributes:
        total: parameters.
        active: of one token, both embeddings included.
        active_without_embeddings: the same without embeddings.
        flops_per_token: forward and backward.
        memory: bytes of one rank.
        compute: FLOPs of training on 20 tokens for each active parameter.
        log2_combinations: of the sets of experts that a token can have.
        tokens_per_expert_per_step: when all experts are used alike.
        granularity: g.
        sparsity: s.
        set: keys of the configuration, as they lie over the recipe or file.
    """

    total: int
    active: int
    active_without_embeddings: int
    flops_per_token: float
    memory: int
    compute: float
    log2_combinations: float
    tokens_per_expert_per_step: float
    granularity: float
    sparsity: float
    set: dict[str, int]


def parse_budget(text: str) -> dict[str, float]:
    """Return the limits that are meant.

    Raises:
        ConfigError: an unknown limit, or an amount that is no number above 0.

    >>> parse_budget("active=50M, memory=24GiB, compute=1e19")
    {'active': 50000000.0, 'memory': 25769803776.0, 'compute': 1e+19}
    """
    limits: dict[str, float] = {}
    for part in text.split(","):
        name, _, amount = (piece.strip() for piece in part.partition("="))
        if name not in BUDGETS:
            raise ConfigError(
                f"--budget {text}: no limit {name!r}; known: {', '.join(BUDGETS)}{nearest(name, BUDGETS)}"
            )
        value = parse_amount(amount, of_bytes=name == "memory")
        if value is None:
            raise ConfigError(f"--budget {name}={amount}: must be a number above 0, such as 50M, 7B, 24GB or 1e21")
        limits[name] = value
    return limits


def parse_amount(text: str, *, of_bytes: bool = False) -> float | None:
    """Return an amount such as 50M, 7B or 1e21, of bytes also 24GB or 24GiB; None unless it is a number above 0.

    >>> parse_amount("7B"), parse_amount("24GiB", of_bytes=True), parse_amount("1M,2")
    (7000000000.0, 25769803776.0, None)
    """
    found = AMOUNT.fullmatch(text.strip())
    if found is None:
        return None
    number, prefix, binary, bare = found.groups()
    # "7B" is seven billion, "24GB" is bytes: a B alone counts only where no prefix stands before it.
    power = "b" if prefix == "" and not binary and not of_bytes else (prefix or bare or "").lower()
    value = float(number) * (1024 if binary else 1000) ** POWERS[power]
    return value if 0 < value < math.inf else None


def search(config: Config, limits: dict[str, float], ranks: Ranks | None = None) -> list[Found]:
    """Return the Pareto set of all shapes within the limits, the largest first.

    Args:
        config: what is not searched.
        limits: largest `active` and `total` parameters, `memory` in bytes, `compute` in FLOPs.
        ranks: how a model is spread.

    Raises:
        ConfigError: nothing fits, or pools and unequal groups, which are not searched.
    """
    moe = config.moe
    if moe.pools is not None or moe.groups is not None or moe.top_k_per_group is not None:
        raise ConfigError("--budget searches experts of one kind in equal groups: leave moe.pools and moe.groups out")
    if moe.every == 0 or moe.layers is not None:
        raise ConfigError("--budget searches models with experts by moe.every; set it to 1 or more, without moe.layers")
    ranks = Ranks() if ranks is None else ranks
    ranks.rows(config.train)  # refuses ranks that do not divide the batch
    fitting = [found for one in _candidates(config, limits) if (found := _measured(*one, limits, ranks))]
    best = _pareto(fitting)
    if not best:
        given = ",".join(f"{name}={value:g}" for name, value in limits.items())
        raise ConfigError(
            f"--budget {given}: no shape fits; raise a limit, or change what the recipe sets: a vocabulary of "
            f"{shape_of(config).vocab_size:,}, steps of {config.train.batch_size} × {config.train.seq_len} tokens"
        )
    return sorted(best, key=lambda found: (-found.total, -found.log2_combinations))


def _candidates(config: Config, limits: dict[str, float]) -> Iterator[tuple[Config, Shape]]:
    """Yield configurations, not validated: their keys go together by construction."""
    grouped = config.moe.preset in GROUPED_PRESETS or config.moe.selector in GROUPED_SELECTORS
    for dim in WIDTHS:
        layers = _layers(config, dim, limits)
        if not layers:
            continue
        heads = dim // (32 if dim <= NARROW else 64)
        share = config.model.num_heads // config.model.num_kv_heads
        sizes = {"dim": dim, "num_layers": layers, "num_heads": heads, "ffn_dim": 4 * dim}
        sizes["num_kv_heads"] = heads // share if heads % share == 0 else heads
        model = config.model.model_copy(update=sizes)
        for slices in SLICES:
            if 4 * dim % slices or 4 * dim // slices < SMALLEST_EXPERT:
                continue
            groups = math.gcd(slices, config.moe.num_groups) if grouped else 1
            for sparsity in SPARSITIES if slices > 1 else [1, *SPARSITIES]:
                moe = _sized(config.moe, 4 * dim // slices, sparsity * slices, slices, groups)
                made = config.model_copy(update={"model": model, "moe": moe})
                yield made, shape_of(made)


def _sized(moe: MoEConfig, expert_dim: int, num_experts: int, top_k: int, groups: int = 1) -> MoEConfig:
    sizes = {"expert_dim": expert_dim, "num_experts": num_experts, "top_k": top_k, "num_groups": groups}
    return moe.model_copy(update={**sizes, "shared_dim": 0, "shared_gate": False})


def _layers(config: Config, dim: int, limits: dict[str, float]) -> int:
    """Return how many layers of a width fit the active budget, 0 where they would be too few."""
    if "active" not in limits:
        return max(1, dim // 64)
    embeddings = dim * shape_of(config).vocab_size * (1 if config.model.tie_embeddings else 2)
    fitting = int((limits["active"] - embeddings) / (16 * dim**2))
    return min(fitting, dim // DEEPEST) if fitting >= max(1, dim // FLATTEST) else 0


def _measured(config: Config, shape: Shape, limits: dict[str, float], ranks: Ranks) -> Found | None:
    """Return what a shape comes to, None where it breaks a limit or starves its experts."""
    experts, counts = shape.experts, parameters(shape)
    if experts is None or counts.total > limits.get("total", math.inf) or experts.num_experts % ranks.ep:
        return None
    if not NEAR * limits.get("active", 0) <= counts.active <= limits.get("active", math.inf):
        return None
    each = tokens_per_expert(experts, config.train.batch_size * config.train.seq_len)[0]
    if each < FEW_TOKENS:
        return None
    cost = flops(shape, config.train.seq_len, config.train.recompute).total
    held = memory(shape, config.train, ranks, documents=not config.data.cross_documents).total
    compute = TOKENS_PER_ACTIVE * counts.active * cost
    if held > limits.get("memory", math.inf) or compute > limits.get("compute", math.inf):
        return None
    model, moe = config.model, config.moe
    names = {
        "model": ("dim", "num_layers", "num_heads", "num_kv_heads", "ffn_dim"),
        "moe": ("num_experts", "num_groups", "top_k", "expert_dim"),
    }
    return Found(
        total=counts.total,
        active=counts.active,
        active_without_embeddings=counts.active_without_embeddings,
        flops_per_token=cost,
        memory=held,
        compute=compute,
        log2_combinations=log2_combinations(experts),
        tokens_per_expert_per_step=each,
        granularity=moe.expert_dim / (4 * model.dim),
        sparsity=moe.num_experts / moe.top_k,
        set={f"{s}.{key}": getattr(getattr(config, s), key) for s, keys in names.items() for key in keys},
    )


def _pareto(found: list[Found]) -> list[Found]:
    """Return those that no other one equals or beats in all four respects."""
    value = {id(one): (one.total, one.log2_combinations, -one.memory, -one.flops_per_token) for one in found}
    best: list[Found] = []
    for one in sorted(found, key=lambda item: value[id(item)], reverse=True):
        mine = value[id(one)]
        if not any(all(a >= b for a, b in zip(value[id(other)], mine, strict=True)) for other in best):
            best.append(one)
    return best


def as_document(found: list[Found], limits: dict[str, float], searched: Config) -> dict[str, object]:
    """Return a search as one tree."""
    return {"name": searched.name, "budget": limits, "pareto": [asdict(one) for one in found]}
