"""Every Triton kernel, as a layer launches it, compiles for Ampere, Hopper and the GPUs of desktops, without any."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed: pip install 'himoe[triton]'")

# bytes that one block may have
SHARED_MEMORY = {(8, 0): 163 * 1024, (8, 6): 99 * 1024, (9, 0): 227 * 1024, (12, 0): 99 * 1024}
PRODUCTS = {"up_product", "row_product", "hidden_gradient", "weight_gradient"}


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    program = Path(__file__).with_name("triton_ahead_of_time.py")
    result = subprocess.run([sys.executable, program], env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


@pytest.mark.parametrize("capability", SHARED_MEMORY)
def test_machine_code_that_fits_the_chip(kernels, capability):
    here = [kernel for kernel in kernels if tuple(kernel["capability"]) == capability]
    assert {kernel["kernel"] for kernel in here} == {*PRODUCTS, "tile_map", "combine", "route_kernel"}
    for kernel in here:
        assert kernel["elf"] and kernel["target"], kernel
        assert kernel["shared"] <= SHARED_MEMORY[capability], kernel
        halves = {"*bf16", "*fp16"} & set(kernel["dtypes"])
        if kernel["kernel"] in PRODUCTS:  # exact fp32 products must not become tf32 on the tensor cores
            assert kernel["tensor_cores"] == bool(halves), kernel


def test_large_experts_use_hoppers_own_matrix_instruction(kernels):
    used = {kernel["kernel"] for kernel in kernels if kernel["wgmma"]}
    assert used == PRODUCTS
