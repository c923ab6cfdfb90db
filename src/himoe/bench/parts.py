"""What surrounds the experts: router, sort, combine and statistics, each alone, over the whole layer's time.

CPU time of all threads, the least of the repeats. `router` is plain top-k of softmax scores, `hi_moe` the recommended
Hi-MoE router with its losses, `observe` and `step`; both forward and backward. `dispatch` sorts the pairs, `combine`
adds up each token's K rows, once forward and once for the gradient of x. `gather` copies the tokens of all pairs, three
times; kernels that gather tile by tile spend less. The layer is the plain router with the experts.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from himoe.balance import step_balancers
from himoe.bench.clock import race
from himoe.bench.problem import DTYPES
from himoe.bench.shapes import Shape
from himoe.functional.groups import Groups
from himoe.kernels import sort_pairs
from himoe.kernels.loop import sum_pairs
from himoe.nn import MoE, Router, SwiGLUExperts
from himoe.presets import hi_moe
from himoe.presets.flat import flat_router
from himoe.train.statistics import Statistics

SURROUNDING = ("router", "dispatch", "combine", "statistics")


def measure_parts(shape: Shape, dtype: str, *, seconds: float, device: str = "cpu", seed: int = 0) -> dict[str, Any]:
    """Return milliseconds of CPU time of the layer and of each part, and the parts' shares of the layer's."""
    torch.manual_seed(seed)
    steps = _steps(shape, dtype, device)
    for step in steps.values():
        step()
    times = race(steps, seconds, device=device)
    cpu = {name: one.minimum if device == "cuda" else one.cpu_minimum for name, one in times.items()}
    layer = cpu["layer"]
    return {
        "shape": shape.record(),
        "dtype": dtype,
        "time": "wall" if device == "cuda" else "cpu",
        "parts": {name: {"ms": 1e3 * one, "share": one / layer} for name, one in cpu.items()},
        "surrounding_share": sum(cpu[name] for name in SURROUNDING) / layer,
        "hi_moe_extra_share": (cpu["hi_moe"] - cpu["router"]) / layer,
    }


def groups_of(num_experts: int, top_k: int) -> int:
    """Return the largest number of equal groups that both divide: every group then gives K/G experts."""
    return math.gcd(num_experts, top_k)


def _steps(shape: Shape, dtype: str, device: str) -> dict[str, Callable[[], object]]:
    dim, experts, top_k = shape.dim, shape.num_experts, shape.top_k
    groups = groups_of(experts, top_k)
    plain = flat_router(dim, experts, top_k, []).to(device)
    grouped = hi_moe(dim, experts, top_k, num_groups=groups).to(device)
    mlps = SwiGLUExperts(experts, dim, shape.hidden_dim).to(device, DTYPES[dtype])
    layer = MoE(plain, mlps)
    x = torch.randn(shape.tokens, dim, device=device).to(DTYPES[dtype]).requires_grad_()
    grad, grad_weights = torch.randn_like(x), torch.randn(shape.tokens, top_k, device=device)
    routing = plain(x.detach())
    kernel = mlps.kernel
    rows = sort_pairs(kernel, routing.expert_ids, routing.kept, experts)
    token, values = rows.pair_of_row // top_k, x.detach()[rows.pair_of_row // top_k]
    statistics = Statistics([0], Groups.equal(experts, groups), routers=[plain], device=device)

    def watch() -> None:
        statistics.observe([routing])
        statistics.end_step()

    def route(router: Router) -> None:
        found = router(x)
        losses = list(router.balancer.losses(found).values())
        torch.autograd.backward([found.weights, *losses], [grad_weights, *[None] * len(losses)])
        with torch.no_grad():
            router.balancer.observe(found)
        step_balancers([router.balancer])
        _clear(x, router)

    def whole() -> None:
        y, _ = layer(x)
        y.backward(grad)
        _clear(x, layer)

    return {
        "layer": whole,
        "router": lambda: route(plain),
        "hi_moe": lambda: route(grouped),
        "dispatch": lambda: sort_pairs(kernel, routing.expert_ids, routing.kept, experts),
        "combine": lambda: [sum_pairs(values, rows, top_k) for _ in range(2)],
        "gather": lambda: [source[token] for source in (x.detach(), grad, x.detach())],
        "statistics": watch,
    }


def _clear(x: Tensor, module: torch.nn.Module) -> None:
    x.grad = None
    module.zero_grad(set_to_none=True)
