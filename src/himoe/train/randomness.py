"""Dropout and noise of a training run: a function of (seed, step, micro-batch, rank), of nothing that came before.

So a resumed run draws what the whole one drew, a repeated forward pass what the first one drew, and evaluations,
checkpoints or measurements between two steps change nothing.
"""

import numpy as np
import torch
import torch.distributed as dist


def rank() -> int:
    """Return the number of this process among those that train together, 0 where it is alone."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def seed_noise(seed: int, step: int, micro_batch: int, rank: int) -> None:
    """Set the generators of all devices for the forward pass and backward of one micro-batch.

    Args:
        seed: of the run.
        step: optimizer steps that are done.
        micro_batch: its place in the step, from 0.
        rank: of the process.

    >>> seed_noise(0, step=3, micro_batch=1, rank=0)
    >>> first = torch.rand(2)
    >>> seed_noise(0, step=3, micro_batch=1, rank=0)
    >>> bool((torch.rand(2) == first).all())
    True
    """
    (state,) = np.random.SeedSequence((seed, step, micro_batch, rank)).generate_state(1, np.uint64)
    torch.manual_seed(int(state))
