"""Triton is an extra: everything but its backend works without it, and it is loaded only where its kernels run."""

import os
import subprocess
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from himoe.kernels import choose_backend

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


@pytest.mark.parametrize(
    ("dtype", "capability", "hip", "installed", "chosen"),  # no capability: no GPU, the tensors are fake
    [
        (torch.bfloat16, (9, 0), None, True, "triton"),
        (torch.float32, (8, 6), None, True, "triton"),
        (torch.float64, (9, 0), None, True, "loop"),
        (torch.bfloat16, (7, 5), None, True, "grouped"),
        (torch.bfloat16, (9, 0), None, False, "grouped"),
        (torch.bfloat16, (9, 4), "6.2", True, "grouped"),
        (torch.bfloat16, None, None, True, "grouped"),
    ],
)
def test_auto_takes_the_kernels_on_gpus_that_they_are_made_for(monkeypatch, dtype, capability, hip, installed, chosen):
    monkeypatch.setattr("torch.cuda.is_available", lambda: capability is not None)
    if capability:
        monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: capability)
    monkeypatch.setattr("torch.version.hip", hip)
    monkeypatch.setattr("himoe.kernels.triton.installed", lambda: installed)
    with FakeTensorMode():
        x, up, down = (torch.empty(size, dtype=dtype, device="cuda") for size in ((4, 16), (2, 64, 16), (2, 16, 32)))
    assert choose_backend("auto", x, up, down) == chosen
