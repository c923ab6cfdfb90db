"""Triton is an extra: everything but its backend works without it, and it is loaded only where its kernels run."""

import os
import subprocess
import sys

CODE = """
import sys
class NoTriton:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "triton":
            raise ModuleNotFoundError("No module named 'triton'", name="triton")
{hide}
import torch
from himoe import MoE, SwiGLUExperts, presets
layer = MoE(presets.hi_moe(8, 4, 2, num_groups=2), SwiGLUExperts(4, 8, 8, backend="triton"))
layer.router.fused = True
layer(torch.ones(3, 8))[0].sum().backward()
print(layer.experts.down_proj.grad.isfinite().all().item(), "himoe.kernels.triton.mlp" in sys.modules)
"""


def run(hide):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, "-c", CODE.format(hide=hide)], env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.split()


def test_on_a_cpu_the_backend_falls_back_and_loads_no_kernel():
    assert run("") == ["True", "False"]


def test_without_triton_installed_too():
    assert run("sys.meta_path.insert(0, NoTriton())") == ["True", "False"]
