"""Routing is computed in fp32 or better, whatever the model's dtype and the autocast."""

from contextlib import AbstractContextManager, nullcontext

import torch


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which routing is computed: fp32, or fp64 for fp64 input."""
    return torch.promote_types(dtype, torch.float32)


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Return a context in which nothing is cast; on a device without autocast, such as meta, it does nothing."""
    available = torch.amp.is_autocast_available(device.type)
    return torch.autocast(device.type, enabled=False) if available else nullcontext()
