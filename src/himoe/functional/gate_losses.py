"""Loss formulas that look at the gates themselves: their sums, their noise, their matrix.

| formula | value | at its best |
|---|---|---|
| `importance` (Shazeer, arXiv 1701.06538, equation 6) | summed combine weights of every expert, for CV² | all equal |
| `smooth_load` (the same paper, appendix A) | Σ_t of the chance that a token picks an expert, for CV² | all equal |
| `potential_slope` (φ-balancing, arXiv 2605.15403) | ∇φ(m) for φ the negative entropy | 1 − log E everywhere |
| `similarity` (SimBal, arXiv 2506.14038) | ‖Ŵ Ŵᵀ − I‖ of the gate's normalised rows | 0 where E ≤ D |

CV² is var/mean² with the population's variance: no epsilon, so 0 is reached and never undercut.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from himoe.functional.precision import accumulation_dtype, without_autocast
from himoe.types import Routing


def squared_variation(values: Float[Tensor, " n"]) -> Float[Tensor, ""]:
    """Return CV² = var/mean² (population); 0 where the values add up to nothing, as those of padding alone do."""
    total = values.sum()
    relative = values * values.numel() / total.where(total != 0, 1)
    return relative.var(correction=0)


def importance(routing: Routing) -> Float[Tensor, " E"]:
    """Sum the combine weights of each expert's selected pairs over the tokens."""
    gates = routing.weights.where(routing.selected, 0)
    return torch.zeros_like(routing.scores).scatter_add(-1, routing.expert_ids, gates).sum(0)


def smooth_load(routing: Routing, noise: Float[Tensor, "T E"], noise_std: Float[Tensor, "T E"]) -> Float[Tensor, " E"]:
    """Σ_t Φ((logit − threshold)/noise_std): the load that fresh noise on one expert at a time would give on average.

    The threshold of an expert is the K-th largest noisy logit among the *other* experts of the token, K the number of
    experts that the token has; Φ is the normal distribution function. All three carry gradients.

    Args:
        routing: of one layer; its logits are those without noise.
        noise: what was added to the logits.
        noise_std: its standard deviation, positive.
    """
    noisy, num_experts = routing.logits + noise, routing.num_experts
    chosen = routing.selected.sum(-1, keepdim=True)
    best = noisy.topk(min(routing.top_k + 1, num_experts), dim=-1).values
    last = best.gather(-1, (chosen - 1).clamp(min=0))  # the K-th largest of all
    next_one = best.gather(-1, chosen.clamp(max=best.shape[-1] - 1))  # the K-th largest without one of the first K
    threshold = torch.where(noisy > next_one, next_one, last)
    std = noise_std.clamp(min=torch.finfo(noise_std.dtype).eps)
    chance = torch.special.ndtr((routing.logits - threshold) / std)
    chance = torch.where(chosen < num_experts, chance, 1)  # no other expert can push one out
    return chance.where(chosen > 0, 0).sum(0)


def potential_slope(mean: Float[Tensor, " E"]) -> Float[Tensor, " E"]:
    """∇φ(m) = log m + 1 of φ(m) = Σ m log m, finite where m has underflowed to 0."""
    return mean.clamp(min=torch.finfo(mean.dtype).tiny).log() + 1


def _square_sum(excess: Tensor) -> Tensor:
    return excess.square().sum()


def _absolute_sum(excess: Tensor) -> Tensor:
    return excess.abs().sum()


NORMS: dict[str, Callable[[Tensor], Tensor]] = {"frobenius": _square_sum, "l1": _absolute_sum}


def similarity(weight: Float[Tensor, "E D"], norm: str) -> Float[Tensor, ""]:
    """Norm of Ŵ Ŵᵀ − I over its E·E entries, Ŵ the rows of W at length 1.

    Args:
        weight: (E, D) the gate's matrix.
        norm: `frobenius`, the sum of the squared entries (the squared Frobenius norm); its least value is
            max(0, E²/D − E). `l1`, the sum of their absolute values. Neither reaches 0 where E > D.
    """
    with without_autocast(weight.device):
        rows = F.normalize(weight.to(accumulation_dtype(weight.dtype)), dim=-1)
        excess = rows @ rows.T - torch.eye(rows.shape[0], dtype=rows.dtype, device=rows.device)
    return NORMS[norm](excess)
