"""What the presets share that choose the best K of all experts: the router, and the factor of published weights."""

from collections.abc import Sequence
from functools import partial

from himoe.balance import Balancer, Chain, Switch, ZLoss
from himoe.functional.scores import softmax
from himoe.functional.selection import check_top_k
from himoe.functional.selection import top_k as select_top_k
from himoe.nn import Gate, Router
from himoe.nn.router import ScoreFunction, Selector


def flat_router(
    dim: int,
    num_experts: int,
    top_k: int,
    balancers: Sequence[Balancer],
    *,
    renormalize: bool | None = None,
    score: ScoreFunction = softmax,
    selector: Selector | None = None,
) -> Router:
    """Return a router that takes the K best of all experts, by default of softmax scores.

    At K = 1 a renormalised weight is 1 and the gate learns nothing from the task, so None renormalises for K > 1 only.
    """
    check_top_k(num_experts, top_k)
    return Router(
        Gate(dim, num_experts),
        partial(select_top_k, k=top_k) if selector is None else selector,
        num_experts=num_experts,
        score=score,
        balancer=Chain(*balancers),
        renormalize=top_k > 1 if renormalize is None else renormalize,
    )


def load_balance_and_z_loss(top_k: int, alpha: float | None, published: float, z_loss: float) -> list[Balancer]:
    """Return the load-balancing loss, and the z-loss where its weight is not 0.

    Args:
        top_k: K.
        alpha: weight with f summing to 1; None for `published`·K.
        published: weight with f summing to K, as transformers' `load_balancing_loss_func` has it for one layer.
        z_loss: weight of the z-loss.
    """
    parts: list[Balancer] = [Switch(weight=published * top_k if alpha is None else alpha)]
    return [*parts, ZLoss(weight=z_loss)] if z_loss else parts
