"""Dtypes: routing is computed in fp32 or better, whatever the model's dtype and the autocast; experts follow it."""

from contextlib import AbstractContextManager, nullcontext

import torch

from himoe.functional.tracing import constant


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which routing is computed: fp32, or fp64 for fp64 input."""
    return torch.promote_types(dtype, torch.float32)


@constant  # torch before 2.13 cannot trace the question
def _has_autocast(device_type: str) -> bool:
    return torch.amp.is_autocast_available(device_type)


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Return a context in which nothing is cast; on a device without autocast, such as meta, it does nothing."""
    return torch.autocast(device.type, enabled=False) if _has_autocast(device.type) else nullcontext()


def autocast_dtype(x: torch.Tensor) -> torch.dtype | None:
    """Return the dtype that autocast gives a product of `x`; None where it leaves it alone, as it does fp64."""
    device = x.device.type
    casts = _has_autocast(device) and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if casts and x.dtype != torch.float64 else None
