"""`hash`: experts by the token's id alone, nothing learned (hash layers, Roller et al., arXiv 2106.04426).

For every choice j = 0 … K-1, Floyd's way to draw K of E without repetition, from a hash in place of a random number:

    r = h(id, j, seed) mod (E − K + j + 1)          the expert is r, or E − K + j where r is taken already

h mixes words by shifts and multiplications, so there is no table, and every machine gives the same experts. Vocabulary
ids are spread evenly, tokens are not: frequent words load their experts. The scores still weigh the experts; the gate
learns from that.

Deviation: the paper has a table of random experts per word; a hash of the id is one that need not be stored.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from himoe.functional.hashing import STEP, WORD, mix
from himoe.functional.selection.base import Selection, all_selected, check_top_k, refuse
from himoe.types import RouterContext


def hash_tokens(scores: Float[Tensor, "T E"], context: RouterContext, *, k: int, seed: int = 0) -> Selection:
    """K experts by a fixed hash of the token's id, whatever the scores (arXiv 2106.04426).

    Args:
        scores: (T, E); only its shape matters.
        context: its token_ids are hashed.
        k: experts per token.
        seed: another one gives other experts, for instance in another layer.

    Raises:
        ConfigError: no token ids, or k out of range.
    """
    num_experts = scores.shape[-1]
    check_top_k(num_experts, k)
    if context.token_ids is None:
        refuse("hash", "needs the tokens' ids, and got none: call MoE(x, token_ids=…), as DecoderLM does")
    start = mix(mix(context.token_ids.to(torch.int64) & WORD) ^ ((seed * STEP) & WORD))
    chosen: list[Tensor] = []
    for j in range(k):
        last = num_experts - k + j
        drawn = mix((start + (j + 1) * STEP) & WORD) % (last + 1)
        for earlier in list(chosen):
            drawn = drawn.where(drawn != earlier, last)
        chosen.append(drawn)
    return all_selected(torch.stack(chosen, dim=-1))
