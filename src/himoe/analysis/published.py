"""What is published about experts' number and size: the answer where there is no sweep of one's own.

The findings are those of Slicing and Dicing (arXiv 2605.11689), which came to them in over 2,000 runs. It gives the
direction of every effect; the best granularity of an active size is none of the numbers that it states in its text, so
beside it stands what released models of a similar active size have, counted from their configurations.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from himoe.analysis.budget import Budget
from himoe.errors import ConfigError
from himoe.plan import Shape, model_names, named_shape, parameters

SOURCE = "Slicing and Dicing, arXiv 2605.11689"
LARGEST_RATIO = 128
"""Total over active expert parameters up to which it saw the loss fall."""
MEASURED = (10e6, 300e6)
"""Active parameters that it trained, embeddings included."""
TOKENS = 20
SIZES = ("sd_10m", "sd_20m", "sd_50m", "sd_80m", "sd_110m", "sd_200m", "sd_300m")
"""Its dense models, as `himoe plan` knows them."""
FINDINGS = (
    "The loss falls with the total parameters of the experts at every active size, up to 128 times the active ones.",
    "The best granularity depends on the active size and hardly on the total.",
    "At 10M to 20M active parameters experts lose to a dense model after 20 tokens a parameter and win after 5 to 20"
    " times as many.",
    "Many small networks that are all active are worse than few large ones.",
    "A shared expert is no better or worse; dropless routing is at least as good as a capacity; settings of balancing"
    " barely matter, but for a strong loss and a bias rate of 1e-3 together at 512 experts and more.",
)
CAVEATS = (
    "Its runs are of one data mixture and 20 tokens for each active parameter; yours may differ in both.",
    "At its small widths nearly all active parameters are embeddings.",
    "The ratio is that of expert parameters; a total over active parameters with embeddings is somewhat less.",
    "Released models chose for serving and hardware too, not for the loss alone.",
)


@dataclass(frozen=True)
class Released:
    """A released model: its parameters, s = E/K and g = F/(4·D)."""

    name: str
    active: int
    total: int
    num_experts: int
    top_k: int
    sparsity: float
    granularity: float
    source: str


def released() -> list[Released]:
    """Return the models with experts of one kind that `himoe plan --model` knows, the smallest active one first."""
    found = []
    for name in model_names():
        shape: Shape = named_shape(name)
        experts = shape.experts
        network = experts.pools[0].network if experts is not None and len(experts.pools) == 1 else None
        if experts is None or network is None or experts.num_experts == experts.mean_top_k or name.startswith("sd_"):
            continue
        counts = parameters(shape)
        g = network.hidden_dim / (4 * shape.dim)
        found.append(Released(name, counts.active, counts.total, experts.num_experts, experts.mean_top_k,
                              experts.num_experts / experts.mean_top_k, g, shape.source or ""))  # fmt: skip
    return sorted(found, key=lambda one: one.active)


def published(budget: Budget) -> dict[str, Any]:
    """Return what is published about a budget, as one tree that says where it is from.

    Raises:
        ConfigError: a budget without active parameters, total parameters or FLOPs.
    """
    active, how = _active(budget)
    ratio = float(LARGEST_RATIO)
    limits = []
    if budget.total is not None:
        held = budget.total / active
        if held < 1:
            raise ConfigError(f"--total {budget.total:.4g} is less than the {active:.4g} active parameters; raise it")
        ratio = min(ratio, held)
        limits = ["--total"] if held < LARGEST_RATIO else []
    warnings = []
    for edge, word in zip(MEASURED, ("smallest", "largest"), strict=True):
        factor = max(active / edge, edge / active)
        if (active > edge) == (word == "largest") and factor > 1.1:
            warnings.append(f"extrapolated: {factor:.1f} times beyond the {word} active size of its runs, {edge:.3g}")
    near = sorted(released(), key=lambda one: abs(math.log(one.active / active)))[:4]
    return {
        "source": f"published findings: {SOURCE}; not your data, model or tokens",
        "budget": asdict(budget),
        "active": active,
        "active_from": how,
        "tokens": budget.tokens or TOKENS * active,
        "total_over_active": ratio,
        "limited_by": limits or [f"the largest ratio that it measured, {LARGEST_RATIO}"],
        "nearest_size": min(SIZES, key=lambda name: abs(math.log(parameters(named_shape(name)).active / active))),
        "granularity": None,
        "interval": None,
        "findings": list(FINDINGS),
        "caveats": list(CAVEATS),
        "released_models_near": [asdict(one) for one in sorted(near, key=lambda one: one.active)],
        "warnings": warnings,
    }


def _active(budget: Budget) -> tuple[float, str]:
    """Return active parameters and where they come from; FLOPs as 6 a token and parameter, at 20 tokens each."""
    if budget.active is not None:
        return budget.active, "--active"
    if budget.flops is not None:
        tokens = budget.tokens
        each = math.sqrt(budget.flops / (6 * TOKENS)) if tokens is None else budget.flops / (6 * tokens)
        return each, "--flops, as 6 FLOPs for each token and active parameter" + (
            "" if tokens else f" and {TOKENS} tokens for each active parameter"
        )
    if budget.total is not None:
        return budget.total / LARGEST_RATIO, f"--total over the largest ratio that it measured, {LARGEST_RATIO}"
    raise ConfigError("name a budget: --active 50M, --total 2B or --flops 1e19; or the folder of a sweep of your own")
