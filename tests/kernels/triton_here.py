"""Where a test runs Triton kernels: on a GPU, which makes it a `gpu` test, or in the interpreter."""

from contextlib import contextmanager

import pytest
import torch

from himoe.kernels import triton

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"

pytest.importorskip("triton", reason="triton is not installed: pip install 'himoe[triton]'")
if not ON_GPU and not triton.interpreted():
    pytest.skip("no GPU, and TRITON_INTERPRET is not set", allow_module_level=True)

marks = [pytest.mark.gpu] if ON_GPU else []


@contextmanager
def poisoned_memory():
    """Make `torch.empty` return NaN, so that reading a row that nobody wrote shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert torch.empty(3, device=DEVICE).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(False)
