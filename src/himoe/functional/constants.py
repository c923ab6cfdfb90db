"""Python's numbers as a tensor of any device without a wait: a GPU copies from pinned memory while the host goes on."""

from collections.abc import Sequence

import torch
from torch import Tensor


def numbers_on(device: torch.device, numbers: Sequence[int], dtype: torch.dtype = torch.int64) -> Tensor:
    """Return the numbers as a vector on the device; `torch.tensor(…, device=…)` would wait for a GPU."""
    pinned = device.type == "cuda" and not torch.compiler.is_compiling()
    return torch.tensor(numbers, dtype=dtype, pin_memory=pinned).to(device, non_blocking=True)
