"""Score functions: `logits → scores`, what the combine weights are made of."""

from jaxtyping import Float
from torch import Tensor


def softmax(logits: Float[Tensor, "T E"]) -> Float[Tensor, "T E"]:
    """One softmax over all E experts; rows sum to 1."""
    return logits.softmax(-1)


def sigmoid(logits: Float[Tensor, "T E"]) -> Float[Tensor, "T E"]:
    """An independent sigmoid per expert (DeepSeek-V3, Loss-Free Balancing); rows do not sum to 1."""
    return logits.sigmoid()
