"""Backend `triton`: fused kernels for a CUDA GPU, `pip install himoe[triton]`.

    hidden, unit = act(x[token] · upᵀ)·weight         gather in the prologue, activation and weight in the epilogue
    y = Σ_k (unit · downᵀ)[row of pair k]             the sum reads rows in the pairs' order: no atomics, repeatable

Backward has one kernel for the gradient of hidden, with the activation's backward and the row sums that are the
gradient of the routing weights in its epilogue, and two products: rows by weights, and rows by rows for the weights'
gradients. It gathers x and the gradient of y into rows before: a sum over rows that gathers by itself waits at every
step for the rows' numbers.
Tiles of rows never cross experts; which expert a tile belongs to is worked out on the device, and grids have room for
the largest possible number of tiles, so the host never waits for a count. No product reads rows of unkept pairs.

fp32, bf16 and fp16, always added up in fp32. fp32 products are exact (no tf32) unless
`torch.set_float32_matmul_precision` allows less. Under `TRITON_INTERPRET=1`, set before triton is imported, the kernels
run on a CPU; that is how the tests check them. `python -m himoe.kernels.triton.tune` chooses block sizes on a GPU.

No module outside this package imports triton.
"""

import functools
import importlib.util
import os

import torch
from torch import Tensor

from himoe.errors import ConfigError
from himoe.functional.dispatch import SortedPairs
from himoe.functional.tracing import constant

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def interpreted() -> bool:
    """Return whether triton runs kernels on the CPU: its environment variable `TRITON_INTERPRET` is set."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


@functools.cache  # for a package that is not there all of sys.path is looked through
def _is_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


@constant
def installed() -> bool:
    """Return whether there is a package triton; it is not imported."""
    return _is_installed()


@constant
def suits(device: torch.device) -> bool:
    """Return whether `auto` takes these kernels on a device: a GPU of NVIDIA of capability 8.0 or more, with triton."""
    if device.type != "cuda" or torch.version.hip is not None or not installed():
        return False
    # a fake tensor is on a GPU that may not be there
    return torch.cuda.is_available() and torch.cuda.get_device_capability(device) >= (8, 0)


def runs_on(device: torch.device) -> bool:
    """Return whether kernels can run on this device; raises `ConfigError` on a GPU without triton installed.

    The meta device counts, since no kernel runs there; an ordinary CPU does not.
    """
    if device.type not in ("cuda", "meta") and not (device.type == "cpu" and interpreted()):
        return False
    if installed():
        return True
    if device.type == "cuda":
        raise ConfigError("backend = 'triton' needs the package triton: pip install 'himoe[triton]'")
    return False


def unavailable() -> str | None:
    """Return why the kernels cannot run on this machine, None where they can."""
    if not installed():
        return "needs the package triton: pip install 'himoe[triton]'"
    return None if torch.cuda.is_available() or interpreted() else "needs a CUDA GPU"


def supports(x: Tensor, up_proj: Tensor, down_proj: Tensor) -> bool:
    """Return whether the kernels take this dtype on this device; rows may have any length."""
    return x.dtype in DTYPES and up_proj.dtype == down_proj.dtype == x.dtype and runs_on(x.device)


def forward(
    x: Tensor, weights: Tensor, rows: SortedPairs, up_proj: Tensor, down_proj: Tensor, activation: str
) -> tuple[Tensor, Tensor]:
    """Return y (T, D) and the up projection's output (T·K, H), rows in expert order."""
    from himoe.kernels.triton import mlp

    return mlp.forward(x, weights, rows, up_proj, down_proj, activation)


def backward(
    grad: Tensor,
    x: Tensor,
    weights: Tensor,
    hidden: Tensor,
    rows: SortedPairs,
    up_proj: Tensor,
    down_proj: Tensor,
    activation: str,
    needs: tuple[bool, bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients of x, weights, up_proj and down_proj, None where not needed."""
    from himoe.kernels.triton import mlp

    return mlp.backward(grad, x, weights, hidden, rows, up_proj, down_proj, activation, needs)
