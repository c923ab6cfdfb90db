"""A `Routing` from what a test wants to say about it; everything else follows."""

import torch

from himoe.types import RouterContext, Routing


def make_routing(logits, expert_ids, *, scores=None, selected=None, kept=None, mask=None, training=True):
    logits = torch.as_tensor(logits)
    expert_ids = torch.as_tensor(expert_ids)
    scores = logits.softmax(-1) if scores is None else scores
    selected = torch.ones_like(expert_ids, dtype=torch.bool) if selected is None else torch.as_tensor(selected)
    if mask is not None:
        mask = torch.as_tensor(mask)
        selected = selected & mask[:, None]
    kept = selected if kept is None else torch.as_tensor(kept)
    weights = scores.gather(-1, expert_ids).where(selected, 0)
    context = RouterContext(mask=mask, batch_shape=(logits.shape[0],), training=training)
    return Routing(logits, scores, expert_ids, weights, selected, kept, context)
