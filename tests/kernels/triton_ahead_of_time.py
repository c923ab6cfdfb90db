"""Compile every kernel launch of a forward and backward pass for GPUs that are not here, one line of JSON each.

Run as a program, since triton must not be in its interpreter: `python tests/kernels/triton_ahead_of_time.py`.
Launches are recorded on the meta device with the very arguments that a GPU would get.
"""

import json
import sys
from functools import partial

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from himoe.functional.dispatch import SortedPairs
from himoe.kernels.activation import ACTIVATIONS
from himoe.kernels.triton import blocks, mlp
from himoe.kernels.triton.route import route

POINTER = {
    torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16",
    torch.int32: "*i32", torch.int64: "*i64", torch.bool: "*i1",
}  # fmt: skip
# T, D, F, E, K, dtype, activation: one for every kind of block sizes, and sizes that are no multiple of anything
LAYERS = [
    (8192, 2048, 768, 128, 8, torch.bfloat16, "swiglu"),
    (1024, 2048, 768, 128, 8, torch.float16, "gelu"),
    (250, 100, 72, 128, 8, torch.bfloat16, "relu2"),
    (1024, 256, 128, 64, 8, torch.float32, "swiglu"),
    (1000, 33, 1, 1, 1, torch.float32, "relu"),
]
TARGETS = [(8, 0), (8, 6), (9, 0), (12, 0)]


def launches(run):
    """Return what `run` launches as (kernel, positional arguments, keyword arguments)."""
    found = []
    JITFunction.run = lambda kernel, *arguments, grid, warmup, **options: found.append((kernel, arguments, options))
    run()
    return found


def layer(tokens, dim, units, num_experts, k, dtype, activation):
    """Run the expert MLP forward and backward on the meta device."""
    height = units * ACTIVATIONS[activation].rows
    with torch.device("meta"):
        x, weights = torch.empty(tokens, dim, dtype=dtype), torch.empty(tokens, k)
        rows = SortedPairs(
            *(torch.empty(tokens * k, dtype=torch.int64) for _ in range(2)), torch.empty(num_experts, dtype=torch.int32)
        )
        up, down = torch.empty(num_experts, height, dim, dtype=dtype), torch.empty(num_experts, dim, units, dtype=dtype)
        y, hidden = mlp.forward(x, weights, rows, up, down, activation)
        mlp.backward(y, x, weights, hidden, rows, up, down, activation, (True,) * 4)


def router(score, bias, mask):
    """Run the fused router's kernel on the meta device."""
    with torch.device("meta"):
        route(
            torch.empty(1024, 64),
            bias and torch.empty(64),
            torch.empty(1024, dtype=torch.bool) if mask else None,
            score,
            8,
            4,
        )


def compiled(kernel, arguments, options, capability):
    """Return the facts of one kernel compiled for a capability."""
    given = dict(zip(kernel.arg_names, arguments, strict=False)) | options
    signature, constants, attributes = {}, {}, {}
    for i, name in enumerate(kernel.arg_names):
        value = given[name]
        if isinstance(value, torch.Tensor):
            signature[name], attributes[(i,)] = POINTER[value.dtype], [["tt.divisibility", 16]]
        elif name in options or value == 1:
            signature[name], constants[name] = "constexpr", value
        else:
            signature[name] = "i32" if value < 2**31 else "i64"
            if value % 16 == 0:
                attributes[(i,)] = [["tt.divisibility", 16]]
    how = {n: options[n] for n in ("num_warps", "num_stages", "enable_fp_fusion") if n in options}
    source = ASTSource(kernel, signature, constants, attributes)
    result = triton.compile(source, target=GPUTarget("cuda", 10 * capability[0] + capability[1], 32), options=how)
    ptx = result.asm["ptx"]
    return {
        "kernel": kernel.__name__,
        "capability": capability,
        "dtypes": sorted({s for s in signature.values() if s.startswith("*")}),
        "shared": result.metadata.shared,
        "cubin": len(result.asm["cubin"]),
        "elf": result.asm["cubin"][:4] == b"\x7fELF",
        "tensor_cores": "wgmma.mma_async" in ptx or "mma.sync" in ptx,
        "wgmma": "wgmma.mma_async" in ptx,
        "target": f".target sm_{10 * capability[0] + capability[1]}" in ptx,
    }


def main():
    """Compile everything."""
    runs = [partial(layer, *sizes) for sizes in LAYERS]
    runs += [partial(router, "softmax", None, False), partial(router, "sigmoid", True, True)]
    for capability in TARGETS:
        blocks.capability = lambda device, here=capability: here
        seen = set()
        for run in runs:
            for launch in launches(run):
                line = json.dumps(compiled(*launch, capability))
                if line not in seen:
                    seen.add(line)
                    print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main())
