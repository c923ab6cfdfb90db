"""Expert choice (arXiv 2202.09368): experts choose tokens, so they are balanced by construction. Not causal.

Softmax scores over the experts, weights as they are; each expert takes its K·T/E best tokens, K the paper's capacity
factor c: 2 in its main models, 100M/64E and 8B/64E with E = 64 and MoE in every second layer. No balancer is needed.

A token's experts depend on the tokens after it, so a language model with it is refused unless asked for; it suits
encoders and vision.
"""

from functools import partial

from himoe.functional.selection import check_top_k
from himoe.functional.selection import expert_choice as choose_tokens
from himoe.nn import Gate, Router


def expert_choice(dim: int, num_experts: int, top_k: int = 2, *, max_k: int | None = None) -> Router:
    """Expert choice: every expert takes its best tokens, equally many; not causal.

    Args:
        dim: D.
        num_experts: E; 64 in the paper's main models.
        top_k: K, the mean number of experts of a token; 2 in the paper, its capacity factor.
        max_k: most experts of a token; default all.
    """
    check_top_k(num_experts, top_k)
    return Router(
        Gate(dim, num_experts),
        partial(choose_tokens, k=top_k, max_k=max_k),
        num_experts=num_experts,
        renormalize=False,
    )
