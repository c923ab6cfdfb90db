"""ReMoE (arXiv 2412.14711): an expert is used where its ReLU score is positive, and a loss makes the scores sparse.

The paper's main models have E = 8 and K = 1 on average, and no shared expert; λ starts at 1e-8 and changes by a factor
of 1.2 a step. Training starts nearly dense, with about half of the experts for every token: memory is laid out for all
E, and the first steps cost accordingly. `max_k` bounds that, and makes it another method while more are wanted.

Deviation: the paper has one λ for all layers, here each layer has its own and reaches its own density.
"""

from functools import partial

from himoe.balance import ReluSparsity
from himoe.functional.scores import relu
from himoe.functional.selection import check_top_k, threshold
from himoe.nn import Gate, Router


def remoe(
    dim: int,
    num_experts: int,
    top_k: int,
    *,
    max_k: int | None = None,
    start: float = 1e-8,
    factor: float = 1.2,
    balance: bool = True,
) -> Router:
    """ReMoE: every expert with a positive ReLU score, its weight; a loss leads to K of them on average.

    Args:
        dim: D.
        num_experts: E; 8 in the paper's main models.
        top_k: K, the mean number of experts of a token to reach; 1 there.
        max_k: most experts of a token; default all E, which is exact.
        start: λ before the first step; 1e-8 in the paper.
        factor: by which λ grows or shrinks in an optimizer step; 1.2 in the paper.
        balance: weigh the loss of each expert by its load, as the paper does; False leaves the plain L1 norm.
    """
    check_top_k(num_experts, top_k)
    return Router(
        Gate(dim, num_experts),
        partial(threshold, max_k=max_k),
        num_experts=num_experts,
        score=relu,
        balancer=ReluSparsity(num_experts, top_k, start=start, factor=factor, balance=balance),
        renormalize=False,
    )
