"""Counts and balance metrics. O(E) memory per layer: no one-hot over tokens.

A *load* is a vector of pairs per expert, (…, E). Every metric takes loads of any aggregation level (one batch, a
window of steps, a whole validation set) and averages nothing else: say the level where you report it.
"""

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from himoe.functional.masked import masked_mean
from himoe.types import Routing

Load = Shaped[Tensor, "*batch E"]


def count_pairs(expert_ids: Int[Tensor, "T K"], counted: Bool[Tensor, "T K"], num_experts: int) -> Int[Tensor, " E"]:
    """Count the pairs of each expert in int64 (fp32 counts stop being exact at 2²⁴)."""
    zeros = torch.zeros(num_experts, dtype=torch.int64, device=expert_ids.device)
    return zeros.scatter_add(0, expert_ids.flatten(), counted.flatten().to(torch.int64))


def selected_load(routing: Routing) -> Int[Tensor, " E"]:
    """Pairs per expert as selected, before capacity drops: what losses and controllers use."""
    if routing.counts is not None:
        return routing.counts
    return count_pairs(routing.expert_ids, routing.selected, routing.num_experts)


def load(routing: Routing) -> Int[Tensor, " E"]:
    """Pairs per expert as kept, after capacity drops: what the experts compute."""
    return count_pairs(routing.expert_ids, routing.kept, routing.num_experts)


def drop_rate(routing: Routing) -> Float[Tensor, ""]:
    """Share of the selected pairs that capacity dropped; 0 where nothing was selected."""
    selected = routing.selected.sum()
    return (selected - routing.kept.sum()) / selected.clamp(min=1)


def truncated_mass(routing: Routing, wanted: Bool[Tensor, "T E"]) -> Float[Tensor, ""]:
    """Mean over tokens of the share of their scores that lies on experts which are wanted and not selected.

    Args:
        routing: of one layer.
        wanted: (T, E) what a selector with a variable number of experts asks for before its `max_k` cuts any off.
    """
    shares = routing.scores / routing.scores.sum(-1, keepdim=True).clamp(min=torch.finfo(routing.scores.dtype).tiny)
    selected = torch.zeros_like(wanted).scatter(-1, routing.expert_ids, routing.selected)
    return masked_mean(shares.where(wanted & ~selected, 0).sum(-1), routing.context.mask)


def _relative(load: Load) -> Float[Tensor, "*batch E"]:
    """Load divided by its mean; all ones where there is no load at all."""
    values = load.to(torch.float64)
    total = values.sum(-1, keepdim=True)
    return torch.where(total > 0, values * values.shape[-1] / total.clamp(min=1e-300), 1.0)


def imbalance(load: Load) -> Float[Tensor, "*batch"]:
    """max / mean; 1 is perfect balance."""
    return _relative(load).amax(-1)


def max_vio(load: Load) -> Float[Tensor, "*batch"]:
    """max / mean − 1 (Loss-Free Balancing, arXiv 2408.15664); 0 is perfect balance, E/K − 1 the worst.

    >>> max_vio(torch.tensor([3, 1, 1, 3])).item()
    0.5
    """
    return imbalance(load) - 1


def coefficient_of_variation(load: Load) -> Float[Tensor, "*batch"]:
    """Standard deviation (population) / mean."""
    return _relative(load).std(-1, correction=0)


def effective_experts(load: Load) -> Float[Tensor, "*batch"]:
    """Exp of the entropy of the load's shares: E at perfect balance, 1 when one expert takes everything."""
    relative = _relative(load)
    shares = relative / relative.shape[-1]
    return torch.special.entr(shares).sum(-1).exp()


def normalized_entropy(load: Load) -> Float[Tensor, "*batch"]:
    """Entropy of the load's shares over log E, between 0 and 1."""
    num_experts = load.shape[-1]
    if num_experts == 1:
        return torch.ones(load.shape[:-1], dtype=torch.float64, device=load.device)
    return effective_experts(load).log() / torch.tensor(float(num_experts), dtype=torch.float64).log()


def is_dead(load: Load, threshold: float = 0.01) -> Bool[Tensor, "*batch E"]:
    """Which experts have a load under `threshold` of the fair share."""
    return _relative(load) < threshold


def dead_experts(load: Load, threshold: float = 0.01) -> Int[Tensor, "*batch"]:
    """Number of experts whose load is under `threshold` of the fair share."""
    return is_dead(load, threshold).sum(-1)


def straggler(load: Load, num_ranks: int) -> Float[Tensor, "*batch"]:
    """max / mean load of `num_ranks` devices that each hold E/num_ranks consecutive experts."""
    return imbalance(load.unflatten(-1, (num_ranks, -1)).sum(-1))


def router_entropy(routing: Routing) -> Float[Tensor, ""]:
    """Mean entropy of softmax(logits), in nats."""
    probabilities = routing.logits.softmax(-1)
    return masked_mean(torch.special.entr(probabilities).sum(-1), routing.context.mask)


def top1_probability(routing: Routing) -> Float[Tensor, ""]:
    """Mean of the largest probability of softmax(logits)."""
    return masked_mean(routing.logits.softmax(-1).amax(-1), routing.context.mask)


def margin(routing: Routing) -> Float[Tensor, ""]:
    """Mean difference of the two largest probabilities of softmax(logits); needs E ≥ 2."""
    best = routing.logits.softmax(-1).topk(2, dim=-1).values
    return masked_mean(best[:, 0] - best[:, 1], routing.context.mask)
