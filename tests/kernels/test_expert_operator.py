"""The expert MLP as a registered operator: what it keeps for backward, its shape rules, one graph under compile."""

import pytest
import torch
from expert_case import make_case
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from himoe.functional.dispatch import sort_by_expert
from himoe.kernels import BACKENDS, expert_mlp

T, D, F, E, K = 64, 16, 32, 4, 4


def trained_arguments(dtype=torch.float32, activation="swiglu", **sizes):
    sizes = {"tokens": T, "width": D, "units": F, "num_experts": E, "k": K} | sizes
    arguments = make_case(**sizes, activation=activation, kept="all").arguments(dtype)
    for i in (0, 2, 4, 5):
        arguments[i].requires_grad_()
    return arguments


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("activation", "rows"), [("swiglu", 2 * F), ("gelu", F), ("relu", F), ("relu2", F)])
def test_backward_keeps_one_tensor_per_pair(backend, activation, rows):
    saved = []
    arguments = trained_arguments(activation=activation)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        expert_mlp(*arguments, activation=activation, backend=backend)
    inputs = {t.data_ptr() for t in arguments}
    own = sorted((t.numel() for t in saved if t.data_ptr() not in inputs), reverse=True)
    # hidden; then only the sort's indices: the pair of every row, its inverse, and the experts' ends
    assert own == [T * K * rows, T * K, T * K, E]


@pytest.mark.parametrize("backend", BACKENDS)
def test_backward_allocates_no_gradient_of_the_hidden_output(backend):
    class Zeros(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if "zeros" in str(func):
                sizes.append(out.numel())
            return out

    sizes = []
    y = expert_mlp(*trained_arguments(), backend=backend)
    with Zeros():
        y.sum().backward()
    assert max(sizes, default=0) < T * K * 2 * F


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("where", ["meta", "fake"])
def test_shape_rules(backend, dtype, where):
    with FakeTensorMode() if where == "fake" else torch.device("meta"):
        leaves = [torch.empty(s, dtype=dtype) for s in ((T, D), (T, K), (E, 2 * F, D), (E, D, F))]
        x, weights, up_proj, down_proj = (leaf.requires_grad_() for leaf in leaves)
        ids, kept = torch.zeros(T, K, dtype=torch.int64), torch.ones(T, K, dtype=torch.bool)
        y = expert_mlp(x, ids, weights, kept, up_proj, down_proj, backend=backend)
        y.sum().backward()
    assert y.shape == (T, D) and y.dtype == dtype
    for leaf in leaves:
        assert leaf.grad.shape == leaf.shape and leaf.grad.dtype == dtype


@pytest.mark.parametrize("backend", BACKENDS)
def test_operator_registration(backend):
    if backend == "triton":
        pytest.importorskip("triton")
    x, ids, weights, kept, up_proj, down_proj = trained_arguments(tokens=5, units=8)
    rows = sort_by_expert(ids, kept, E)
    arguments = (x, weights, *rows, up_proj, down_proj, "swiglu", backend)
    results = torch.library.opcheck(torch.ops.himoe.expert_mlp.default, arguments)
    assert set(results.values()) == {"SUCCESS"}


@pytest.mark.parametrize("backend", BACKENDS)
def test_results_repeat_bit_for_bit(backend):
    def once():
        arguments = trained_arguments()
        y = expert_mlp(*arguments, backend=backend)
        y.square().sum().backward()
        return y, *(arguments[i].grad for i in (0, 2, 4, 5))

    assert all(torch.equal(a, b) for a, b in zip(once(), once(), strict=True))
