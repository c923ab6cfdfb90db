"""Every loss formula, once. Balancers weight these, statistics report them, tests compare them with hand-worked values.

All take per-token tensors of one layer and average over real tokens, in the dtype of the routing (fp32 or fp64).

Two-level terms (Hi-MoE, arXiv 2605.08292), with p the probabilities, m_g = Σ_{e∈g} p_e the mass of a group,
q_e = p_e/m_g the share inside it and C_g = Σ_{e∈g} q_e² its concentration:

| intra measure A | value | | inter measure B | value |
|---|---|---|---|---|
| `global` | mean Σ_e p_e² | | `dense` | mean Σ_g m_g² |
| `group_conditional` | mean over tokens and groups of C_g | | `sparse` | the same, m_g over selected experts only |
| `entropy` | −mean H(p) | | `selected` | mean Σ_selected p_e² (the paper's equation 6) |
| `group_entropy` | −mean over tokens and groups of H(q_g) | | `entropy` | −mean H(m) |
| | | | `group_load` | Σ_g (mean m_g − 1/G)² |

The loss terms are −λ_intra·A and +λ_inter·B. The published text and the published code use different pairs;
`group_conditional` is ours, it rewards decisiveness inside each group without rewarding all mass on one group;
`group_entropy` and `group_load` are the forms of a two-stage reading of the paper, here to compare. Everything is
computed from log p, so no share is 0/0 when a group's mass underflows.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from himoe.functional.groups import Groups
from himoe.functional.masked import masked_mean, token_count
from himoe.functional.stats import count_pairs, selected_load
from himoe.types import Routing


def log_probabilities(routing: Routing, source: str) -> Float[Tensor, "T E"]:
    """Return log p over all E experts.

    Args:
        routing: of one layer.
        source: `raw`, softmax of the gate's own logits; `corrected`, the scores after every `adjust_logits`, divided
            by their sum (for softmax scores that changes nothing; sigmoid scores become a distribution).
    """
    if source == "raw":
        return routing.logits.log_softmax(-1)
    log_scores = routing.scores.clamp(min=torch.finfo(routing.scores.dtype).tiny).log()
    return log_scores - log_scores.logsumexp(-1, keepdim=True)


def probabilities(routing: Routing, source: str) -> Float[Tensor, "T E"]:
    """Return p over all E experts, without the way through logarithms; `source` as for `log_probabilities`."""
    if source == "raw":
        return routing.logits.softmax(-1)
    scores = routing.scores.clamp(min=torch.finfo(routing.scores.dtype).tiny)
    return scores / scores.sum(-1, keepdim=True)


def load_balance(
    routing: Routing, source: str = "corrected", counts: Int[Tensor, " E"] | None = None
) -> Float[Tensor, ""]:
    """E·Σ_i f_i P_i, exactly 1 at perfect balance for every K (Switch, arXiv 2101.03961, with f summing to 1).

    f_i is the share of selected pairs that went to expert i, before capacity drops; P_i the mean probability. Only P
    has a gradient. Others let f sum to K (OLMoE, the Hi-MoE authors): their value is K times this one.

    Args:
        routing: of one layer.
        source: what P averages, see `log_probabilities`.
        counts: pairs per expert that f is made of, such as those of the global batch; None takes this routing's.
    """
    mask = routing.context.mask
    if counts is None:
        counts = selected_load(routing)
    p = probabilities(routing, source)
    fractions = counts.to(p.dtype) / counts.sum().clamp(min=1)
    return routing.num_experts * (fractions * masked_mean(p, mask)).sum()


def sequence_load_balance(routing: Routing, source: str = "corrected") -> Float[Tensor, ""]:
    """`load_balance` within each sequence, mean over sequences (DeepSeek-V2 and V3, arXiv 2412.19437).

    Sequences run along the last dimension of the context's `batch_shape`; those without a real token do not count.
    """
    shape, mask, num_experts = routing.context.batch_shape, routing.context.mask, routing.num_experts
    length = max(shape[-1], 1) if shape else 1
    p = probabilities(routing, source)
    if mask is not None:
        p = p.where(mask[:, None], 0)
    real = torch.ones_like(p[:, 0]) if mask is None else mask.to(p.dtype)
    sequence = torch.arange(real.shape[0], device=real.device) // length
    num_sequences = -(-real.shape[0] // length)
    cell = sequence[:, None] * num_experts + routing.expert_ids
    counts = count_pairs(cell, routing.selected, num_sequences * num_experts).view(num_sequences, num_experts)
    fractions = counts.to(real.dtype) / counts.sum(-1, keepdim=True).clamp(min=1)
    sums = p.new_zeros(num_sequences, num_experts).index_add(0, sequence, p)
    tokens = real.new_zeros(num_sequences).index_add(0, sequence, real)
    values = num_experts * (fractions * sums / tokens.clamp(min=1)[:, None]).sum(-1)
    return values.sum() / (tokens > 0).sum().clamp(min=1)


def z_loss(routing: Routing) -> Float[Tensor, ""]:
    """Mean of logsumexp(logits)² (ST-MoE, arXiv 2202.08906): keeps the gate's logits small."""
    return masked_mean(routing.logits.logsumexp(-1).square(), routing.context.mask)


def _entropy(log_p: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch"]:
    return -(log_p.exp() * log_p).sum(-1)


def _selected_probabilities(log_p: Float[Tensor, "T E"], routing: Routing) -> Float[Tensor, "T K"]:
    return log_p.gather(-1, routing.expert_ids).exp().where(routing.selected, 0)


def intra_global(log_p: Float[Tensor, "T E"], routing: Routing, groups: Groups) -> Float[Tensor, ""]:  # noqa: ARG001
    """Mean Σ_e p_e², between 1/E and 1."""
    return masked_mean((2 * log_p).exp().sum(-1), routing.context.mask)


def intra_group_conditional(log_p: Float[Tensor, "T E"], routing: Routing, groups: Groups) -> Float[Tensor, ""]:
    """Mean over tokens and groups of C_g, between 1/S and 1."""
    return masked_mean(groups.concentration(log_p).mean(-1), routing.context.mask)


def intra_entropy(log_p: Float[Tensor, "T E"], routing: Routing, groups: Groups) -> Float[Tensor, ""]:  # noqa: ARG001
    """−mean H(p), between −log E and 0."""
    return -masked_mean(_entropy(log_p), routing.context.mask)


def intra_group_entropy(log_p: Float[Tensor, "T E"], routing: Routing, groups: Groups) -> Float[Tensor, ""]:
    """−mean over tokens and groups of H(q_g), between −log S and 0."""
    log_q = log_p - groups.expand(groups.log_sum(log_p))
    return masked_mean(groups.sum(log_q.exp() * log_q).mean(-1), routing.context.mask)


def inter_dense(log_p: Float[Tensor, "T E"], routing: Routing, groups: Groups) -> Float[Tensor, ""]:
    """Mean Σ_g m_g², between 1/G and 1."""
    return masked_mean(groups.sum(log_p.exp()).square().sum(-1), routing.context.mask)


def inter_sparse(log_p: Float[Tensor, "T E"], routing: Routing, groups: Groups) -> Float[Tensor, ""]:
    """Mean Σ_g m̃_g², m̃_g the selected probability in group g."""
    chosen = _selected_probabilities(log_p, routing)
    selected_p = torch.zeros_like(log_p).scatter_add(-1, routing.expert_ids, chosen)
    return masked_mean(groups.sum(selected_p).square().sum(-1), routing.context.mask)


def inter_selected(log_p: Float[Tensor, "T E"], routing: Routing, groups: Groups) -> Float[Tensor, ""]:  # noqa: ARG001
    """Mean Σ_selected p_e² (the paper's equation 6)."""
    return masked_mean(_selected_probabilities(log_p, routing).square().sum(-1), routing.context.mask)


def inter_entropy(log_p: Float[Tensor, "T E"], routing: Routing, groups: Groups) -> Float[Tensor, ""]:
    """−mean H(m), between −log G and 0."""
    return -masked_mean(_entropy(groups.log_sum(log_p)), routing.context.mask)


def inter_group_load(log_p: Float[Tensor, "T E"], routing: Routing, groups: Groups) -> Float[Tensor, ""]:
    """Σ_g (mean m_g − 1/G)², between 0 and 1 − 1/G; the load of a group is its mean mass."""
    mask = routing.context.mask
    mean_mass = masked_mean(groups.log_sum(log_p).exp(), mask)
    any_token = token_count(log_p, mask).clamp(max=1)  # a batch of padding alone has no imbalance
    return any_token * (mean_mass - 1 / groups.num_groups).square().sum()


def group_measures(routing: Routing, groups: Groups) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """Return `inter_dense` and `intra_group_conditional` of the raw logits, for statistics: the same values, cheaper.

    Both in one pass, laid out so that a sum over the few experts of a group runs along the tokens.
    """
    logits, mask = routing.logits, routing.context.mask
    if not groups.is_equal or not logits.shape[0]:
        log_p = log_probabilities(routing, "raw")
        return inter_dense(log_p, routing, groups), intra_group_conditional(log_p, routing, groups)
    num_tokens, num_groups = logits.shape[0], groups.num_groups
    members = logits.reshape(num_tokens * num_groups, -1).t().contiguous()  # (S, T·G)
    largest = members.amax(0)
    shares = (members - largest).exp()
    total = shares.sum(0)
    concentration = (shares.square().sum(0) / total.square()).view(num_tokens, num_groups)
    mass = (total.log() + largest).view(num_tokens, num_groups).t().contiguous().softmax(0)  # (G, T)
    mass_squared = mass.square().sum(0)
    if mask is None:
        return mass_squared.mean(), concentration.mean()
    return masked_mean(mass_squared, mask), masked_mean(concentration.mean(-1), mask)


Measure = Callable[[Tensor, Routing, Groups], Tensor]
INTRA: dict[str, Measure] = {
    "global": intra_global,
    "group_conditional": intra_group_conditional,
    "entropy": intra_entropy,
    "group_entropy": intra_group_entropy,
}
INTER: dict[str, Measure] = {
    "dense": inter_dense,
    "sparse": inter_sparse,
    "selected": inter_selected,
    "entropy": inter_entropy,
    "group_load": inter_group_load,
}
