"""Where a test runs Triton kernels: on a GPU, which makes it a `gpu` test, or in the interpreter."""

import pytest
import torch

from himoe.kernels import triton

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"

pytest.importorskip("triton", reason="triton is not installed: pip install 'himoe[triton]'")
if not ON_GPU and not triton.interpreted():
    pytest.skip("no GPU, and TRITON_INTERPRET is not set", allow_module_level=True)

marks = [pytest.mark.gpu] if ON_GPU else []
