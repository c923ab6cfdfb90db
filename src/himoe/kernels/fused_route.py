"""`himoe::fused_route`: score function, selection bias, choice and counts in one pass over the logits.

Covers the scores softmax and sigmoid, an additive bias per expert on the choice, and the selectors `top_k` and
`top_k_per_group` with equal groups, for fp32 logits of up to 1024 experts, where Triton kernels run. `fused_plan` says
whether a router's parts are among these. Ties go to the lower id. Scores can differ from torch's in the last bit, and
experts that are that close may then change places; the gradient is the formula of the score's own operator.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from himoe.functional import scores as score_functions
from himoe.functional.selection import top_k, top_k_per_group
from himoe.kernels import triton

MAX_EXPERTS = 1024
SCORES = {score_functions.softmax: "softmax", score_functions.sigmoid: "sigmoid"}


class Plan(NamedTuple):
    """What the kernel is told of a router's score function and selector."""

    score: str
    places: int
    groups: int


def fused_plan(score: Callable[..., Any], selector: Callable[..., Any], logits: Tensor) -> Plan | None:
    """Return the plan for a score function and a selector bound with `functools.partial`; None where not covered."""
    num_experts = logits.shape[-1]
    if score not in SCORES or not isinstance(selector, partial) or selector.args:
        return None
    if logits.dtype != torch.float32 or num_experts > MAX_EXPERTS or not triton.runs_on(logits.device):
        return None
    k, groups = selector.keywords.get("k"), selector.keywords.get("groups")
    if selector.func is top_k and isinstance(k, int) and 1 <= k <= num_experts:
        return Plan(SCORES[score], k, 1)
    if (
        selector.func is top_k_per_group
        and groups is not None
        and groups.is_equal
        and groups.num_experts == num_experts
    ):
        per_group = [k] * groups.num_groups if isinstance(k, int) else list(k or ())
        sizes = range(1, num_experts // groups.num_groups + 1)
        if any(per_group == [size] * groups.num_groups for size in sizes):
            return Plan(SCORES[score], sum(per_group), groups.num_groups)
    return None


def fused_route(
    logits: Float[Tensor, "T E"], bias: Float[Tensor, " E"] | None, mask: Bool[Tensor, " T"] | None, plan: Plan
) -> tuple[Float[Tensor, "T E"], Int[Tensor, "T K"], Int[Tensor, " E"]]:
    """Return score(logits), the chosen experts and how many pairs each expert gets.

    Args:
        logits: (T, E) fp32, adjusted.
        bias: (E,) added to the scores for the choice alone; no gradient.
        mask: (T,) True for real tokens; others choose too, but are not counted.
        plan: from `fused_plan`.
    """
    bias = None if bias is None else bias.detach().to(torch.float32).contiguous()
    return _fused_route(logits.contiguous(), bias, None if mask is None else mask.contiguous(), *plan)


@torch.library.custom_op("himoe::fused_route", mutates_args=())
def _fused_route(
    logits: Tensor, bias: Tensor | None, mask: Tensor | None, score: str, places: int, groups: int
) -> tuple[Tensor, Tensor, Tensor]:
    from himoe.kernels.triton.route import route

    return route(logits, bias, mask, score, places, groups)


@_fused_route.register_fake
def _(logits: Tensor, _bias: Tensor | None, _mask: Tensor | None, _score: str, places: int, _groups: int):
    tokens, num_experts = logits.shape
    expert_ids = logits.new_empty(tokens, places, dtype=torch.int64)
    return torch.empty_like(logits), expert_ids, logits.new_empty(num_experts, dtype=torch.int64)


def _setup_context(ctx, inputs, output) -> None:
    scores, expert_ids, counts = output
    ctx.score = inputs[3]
    ctx.mark_non_differentiable(expert_ids, counts)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(scores)


def _backward(ctx, grad: Tensor | None, _grad_ids: Tensor | None, _grad_counts: Tensor | None):
    if grad is None:
        return (None,) * 6
    (scores,) = ctx.saved_tensors
    if ctx.score == "softmax":
        d_logits = torch.ops.aten._softmax_backward_data(grad, scores, -1, scores.dtype)
    else:
        d_logits = torch.ops.aten.sigmoid_backward(grad, scores)
    return d_logits, *(None,) * 5


_fused_route.register_autograd(_backward, setup_context=_setup_context)
