"""No step of a training iteration makes the host wait for the GPU: router, dispatch, experts, combine, statistics."""

import re
from functools import partial

import pytest
import torch
from host_waits import READS, host_waits

from himoe import Capacity, Groups, MoE, SwiGLUExperts, aux_losses, observe, presets, step
from himoe.balance import Chain, LossFree, PerGroup
from himoe.functional import scores, stats
from himoe.functional.dispatch import sort_by_expert
from himoe.kernels import BACKENDS

T, D, E, F, K = 24, 32, 8, 16, 4


def build(preset="hi_moe", capacity=None, backend="grouped", dtype=torch.bfloat16, fused=False):
    """Return a layer on the meta device."""
    grouped = {"num_groups": 4} if preset in ("hi_moe", "moge") else {}
    router = getattr(presets, preset)(dim=D, num_experts=E, top_k=1 if preset == "switch" else K, **grouped)
    router.fused = fused
    dispatcher = None if capacity is None else Capacity(1.25, order=capacity)
    return MoE(router, SwiGLUExperts(E, D, F, backend=backend), dispatcher=dispatcher).to("meta", dtype)


def training_step(device, layer):
    """One whole step with padding, and the statistics of `himoe train`."""
    x = torch.empty(2, T // 2, D, device=device, dtype=layer.experts.down_proj.dtype, requires_grad=True)
    y, routing = layer(x, torch.empty(2, T // 2, device=device, dtype=torch.bool))
    (y.float().square().mean() + sum(aux_losses(layer, [routing]).values())).backward()
    observe(layer, [routing])
    step(layer)
    load = stats.load(routing)
    for measure in (stats.max_vio, stats.coefficient_of_variation, stats.effective_experts, stats.dead_experts):
        measure(load)
    for measure in (stats.drop_rate, stats.router_entropy, stats.top1_probability, stats.margin):
        measure(routing)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("capacity", [None, "token_major", "score"])
@pytest.mark.parametrize("preset", ["hi_moe", "moge", "switch", "loss_free", "deepseek_v3", "olmoe", "st_moe"])
def test_a_training_step(preset, capacity, dtype):
    found, seen = host_waits(partial(training_step, layer=build(preset, capacity, dtype=dtype)))
    assert found == []
    assert {"expert_mlp", "expert_mlp_backward", "scatter_add"} <= seen


@pytest.mark.parametrize("preset", ["hi_moe", "loss_free"])
def test_a_training_step_in_triton_kernels(preset):
    pytest.importorskip("triton")
    found, seen = host_waits(partial(training_step, layer=build(preset, backend="triton", fused=True)))
    assert found == []
    assert {"expert_mlp", "expert_mlp_backward", "fused_route"} <= seen


def test_unequal_groups_in_any_order():
    groups = [[5, 0, 3], [1, 2], [4, 6, 7]]
    router = presets.hi_moe(D, E, (1, 1, 2), groups=groups, epsilon_intra=0.6, epsilon_inter=0.6)
    parts = [LossFree(len(group)) for group in groups]
    router.balancer = Chain(router.balancer, PerGroup(Groups(tuple(map(tuple, groups))), parts))
    router.score = partial(scores.softmax_per_group, groups=Groups(tuple(map(tuple, groups))), k=(1, 1, 2))
    layer = MoE(router, SwiGLUExperts(E, D, F)).to("meta", torch.bfloat16)
    assert host_waits(partial(training_step, layer=layer))[0] == []


def backend_alone(device, backend, activation="swiglu"):
    """Run a backend's own code, which the operator's shape rule hides from the step."""
    empty = partial(torch.empty, device=device, dtype=torch.bfloat16)
    ids = torch.empty(T, K, device=device, dtype=torch.int64)
    rows = sort_by_expert(ids, torch.empty(T, K, device=device, dtype=torch.bool), E)
    x, weights, up, down = empty(T, D), empty(T, K), empty(E, 2 * F, D), empty(E, D, F)
    y, hidden = BACKENDS[backend].forward(x, weights, rows, up, down, activation)
    grads = BACKENDS[backend].backward(y, x, weights, hidden, rows, up, down, activation, (True,) * 4)
    assert [g.shape for g in grads] == [x.shape, weights.shape, up.shape, down.shape]


def test_the_grouped_backend_itself():
    found, seen = host_waits(partial(backend_alone, backend="grouped"))
    assert found == [] and "_grouped_mm" in seen


def test_the_triton_backend_itself(monkeypatch):
    pytest.importorskip("triton")
    from himoe.kernels.triton import blocks, mlp, route

    launched = []
    for module in (mlp, route):
        monkeypatch.setattr(module, "launch", lambda kernel, grid, *_, **__: launched.append((kernel.__name__, grid)))
    monkeypatch.setattr(blocks, "capability", lambda device: (9, 0))
    found, _ = host_waits(partial(backend_alone, backend="triton"))
    assert found == []
    names = [name for name, _ in launched]
    products = ["tile_map", "up_product", "row_product", "combine"]
    assert names == [*products, "tile_map", "hidden_gradient", "weight_gradient", "weight_gradient", *products[2:]]
    assert all(isinstance(n, int) and n > 0 for _, grid in launched for n in grid)


WAITING = {
    "reads a number": (lambda x: x.sum().item(), "item"),
    "branches on a value": (lambda x: 1 if x.any() else 0, "item"),
    "picks by a mask": (lambda x: x[x > 0], "nonzero"),
    "copies to the host": (lambda x: x.cpu(), "copy out of meta"),
    "copies from the host": (lambda x: x + torch.ones(4).to(x.device), "_to_copy.* between host and device"),
    "picks by a list": (lambda x: x[[0, 2]], r"index \[0, 2\]"),
    "copies a list to the device": (lambda x: torch.tensor([1, 2], device=x.device), r"tensor of \[1, 2\]"),
    "loops over experts": (lambda x: backend_alone(x.device, "loop"), "item"),
}


@pytest.mark.parametrize("name", WAITING)
def test_what_waits_is_found(name):
    waiting, how = WAITING[name]
    try:
        found, _ = host_waits(lambda device: waiting(torch.empty(4, device=device)))
    except (RuntimeError, NotImplementedError) as error:
        found = [str(error)]
    assert re.search(how, "\n".join(found))


def data_dependent(module, *arguments):
    """Export a module for any batch size; return the operators and the sizes of its graph that depend on data."""
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(module, arguments, dynamic_shapes=tuple({0: batch} for _ in arguments))
    nodes = [node for node in program.graph.nodes if node.op == "call_function"]
    names = [getattr(node.target, "overloadpacket", node.target).__name__ for node in nodes]
    sizes = [str(symbol) for symbol in program.range_constraints if str(symbol).startswith("u")]
    return [name for name in names if name in READS or name == "item"] + sizes, names


@pytest.mark.parametrize(("backend", "fused"), [("grouped", False), ("triton", True)])
@pytest.mark.parametrize("capacity", [None, "token_major"])
def test_the_exported_layer_has_no_shape_that_depends_on_data(backend, fused, capacity):
    if fused:
        pytest.importorskip("triton")
    layer = build("hi_moe", capacity, backend, fused=fused)
    x = torch.empty(4, 6, D, device="meta", dtype=torch.bfloat16)
    found, names = data_dependent(layer, x, torch.empty(4, 6, device="meta", dtype=torch.bool))
    assert found == []
    assert "expert_mlp" in names and ("fused_route" in names) == fused


def test_an_exported_shape_that_depends_on_data_is_found():
    class Picks(torch.nn.Module):
        def forward(self, x):
            return x[x > 0]

    found, _ = data_dependent(Picks(), torch.ones(4, 3))
    assert any(symbol.startswith("u") for symbol in found)
