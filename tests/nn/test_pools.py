"""Pools of experts: each pair is computed by its own pool, once; one router over all, or one per pool."""

from functools import partial

import pytest
import torch
from small_layers import D, tokens
from torch import nn

from himoe import Capacity, Gate, Groups, MoE, PooledExperts, Router, SwiGLUExperts, aux_losses
from himoe.balance import Switch
from himoe.errors import ConfigError
from himoe.functional import reference
from himoe.functional.selection import top_k, top_k_per_group
from himoe.nn import ConstantExperts, CopyExperts, ReLU2Experts, ZeroExperts

SIZES, PER_POOL = (4, 6), (1, 2)
GROUPS = Groups(((0, 1, 2, 3), (4, 5, 6, 7, 8, 9)))


def two_sizes(**options):
    return PooledExperts(SwiGLUExperts(4, D, 12, **options), SwiGLUExperts(6, D, 8, **options))


def free_ones(**options):
    """Experts 0-2 are networks, 3 is zero, 4 and 5 are copies, 6 and 7 constants."""
    return PooledExperts(SwiGLUExperts(3, D, 12, **options), ZeroExperts(1), CopyExperts(2), ConstantExperts(2, D))


def softmax_per_pool(logits):
    """Each pool's softmax, times its share of the K experts."""
    total = sum(PER_POOL)
    parts = zip(logits.split(SIZES, -1), PER_POOL, strict=True)
    return torch.cat([part.softmax(-1) * k / total for part, k in parts], -1)


def one_router(num_experts, k=3, **options):
    return Router(Gate(D, num_experts), partial(top_k, k=k), num_experts=num_experts, **options)


def router_per_pool(**options):
    selector = partial(top_k_per_group, groups=GROUPS, k=PER_POOL)
    return Router(Gate(D, 10), selector, num_experts=10, score=softmax_per_pool, renormalize=False, **options)


LAYERS = {
    "two sizes": lambda **options: MoE(one_router(10), two_sizes(**options)),
    "a router per pool": lambda **options: MoE(router_per_pool(), two_sizes(**options)),
    "free experts": lambda **options: MoE(one_router(8), free_ones(**options)),
    "capacity": lambda **options: MoE(one_router(8), free_ones(**options), dispatcher=Capacity(0.7)),
}


def layer(name, **options):
    torch.manual_seed(0)
    return LAYERS[name](**options)


def expert(pools, x, e):
    """One expert on one token, found by counting through the pools."""
    for pool in pools.pools:
        if e < pool.num_experts:
            break
        e -= pool.num_experts
    if isinstance(pool, ZeroExperts):
        return 0 * x
    if isinstance(pool, CopyExperts):
        return x
    if isinstance(pool, ConstantExperts):
        of_x, of_constant = (pool.gate.weight[2 * e : 2 * e + 2] @ x).softmax(0)
        return of_x * x + of_constant * pool.constant.weight[e]
    return reference.expert(x, pool.gate_up_proj[e], pool.down_proj[e], "swiglu")


def by_loops(pools, x, routing):
    rows = []
    for t in range(len(x)):
        row = 0 * x[t]
        for k in range(routing.top_k):
            if routing.kept[t, k]:
                row = row + routing.weights[t, k] * expert(pools, x[t], int(routing.expert_ids[t, k]))
        rows.append(row)
    return torch.stack(rows)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_output_and_gradients_are_the_double_loop(name, masked):
    moe, x = layer(name).double(), tokens(17, dtype=torch.float64).requires_grad_()
    mask = torch.arange(17) % 4 > 0 if masked else None
    y, routing = moe(x, mask)
    expected = by_loops(moe.experts, x, routing)
    torch.testing.assert_close(y, expected)
    assert mask is None or not y[~mask].any()
    trained = [x, *moe.parameters()]
    upstream = torch.randn_like(y)
    grads = torch.autograd.grad(y, trained, upstream, retain_graph=True)
    torch.testing.assert_close(grads, torch.autograd.grad(expected, trained, upstream))


@pytest.mark.parametrize("backend", ["loop", "grouped"])
@pytest.mark.parametrize("name", LAYERS)
def test_backends_in_fp32(name, backend):
    moe, x = layer(name, backend=backend), tokens(17)
    y, routing = moe(x)
    torch.testing.assert_close(y, by_loops(moe.experts, x, routing))


def test_padding_changes_nothing_for_real_tokens():
    moe, x = layer("free experts"), tokens(9)
    padded = torch.cat([tokens(4, seed=1) * 9, x])
    y, routing = moe(padded, torch.arange(13) >= 4)
    torch.testing.assert_close(y[4:], moe(x)[0])
    assert not y[:4].any() and not routing.kept[:4].any()


def test_each_pair_is_computed_once_by_its_own_pool(monkeypatch):
    rows, product = [], torch.mm

    def spy(left, right, **options):
        rows.append((left.shape[0], right.shape))
        return product(left, right, **options)

    moe, x = MoE(one_router(14), PooledExperts(*two_sizes(backend="loop").pools, ZeroExperts(4))), tokens(30)
    monkeypatch.setattr(torch, "mm", spy)
    _, routing = moe(x, torch.arange(30) % 5 > 0)
    chosen = routing.expert_ids[routing.kept]
    for hidden, first, end in ((12, 0, 4), (8, 4, 10)):
        pairs = ((chosen >= first) & (chosen < end)).sum()
        assert 0 < pairs == sum(n for n, shape in rows if shape == (D, 2 * hidden))
        assert pairs == sum(n for n, shape in rows if shape == (hidden, D))
    assert (chosen >= 10).any()
    assert {shape for _, shape in rows} == {(D, 24), (12, D), (D, 16), (8, D)}


def test_pools_see_only_their_own_pairs_under_their_own_numbers():
    class Spy(nn.Module):
        num_experts = 2

        def forward(self, x, expert_ids, weights, kept):
            self.seen = expert_ids, kept
            return torch.zeros_like(x)

    spies = [Spy(), Spy()]
    ids, kept = torch.tensor([[0, 3], [2, 1], [1, 2]]), torch.tensor([[True, True], [True, False], [False, True]])
    PooledExperts(*spies)(tokens(3), ids, torch.ones(3, 2), kept)
    for number, spy in enumerate(spies):
        local, mine = spy.seen
        assert torch.equal(mine, kept & (ids // 2 == number))
        assert torch.equal(local[mine], ids[mine] % 2)
        assert local.min() >= 0 and local.max() <= 1


@pytest.mark.parametrize("backend", ["loop", "grouped"])
@pytest.mark.parametrize("favoured", [slice(0, 4), slice(4, 10)])
def test_a_pool_that_nobody_chose(favoured, backend):
    moe, x = layer("two sizes", backend=backend), tokens(6).abs().requires_grad_()
    with torch.no_grad():
        moe.router.gate.weight.fill_(-1)
        moe.router.gate.weight[favoured] = moe.router.gate.weight[favoured].normal_().abs()
    y, routing = moe(x)
    torch.testing.assert_close(y, by_loops(moe.experts, x, routing))
    y.sum().backward()
    used = [any(p.grad.any() for p in pool.parameters()) for pool in moe.experts.pools]
    assert used == ([True, False] if favoured.start == 0 else [False, True])
    assert all(p.grad.isfinite().all() for p in moe.parameters())


def test_a_router_per_pool_is_two_layers_combined():
    """Slicing and Dicing's heterogeneous layer, (k₁·o₁ + k₂·o₂)/(k₁ + k₂), each o from a router of its own."""
    moe, x = layer("a router per pool").double(), tokens(2, 9, dtype=torch.float64).requires_grad_()
    alone = []
    for k, pool, rows in zip(PER_POOL, moe.experts.pools, moe.router.gate.weight.split(SIZES), strict=True):
        router = one_router(pool.num_experts, k, renormalize=False).double()
        with torch.no_grad():
            router.gate.weight.copy_(rows)
        alone.append(MoE(router, pool))
    y, _ = moe(x)
    first, second = (one(x)[0] for one in alone)
    expected = (PER_POOL[0] * first + PER_POOL[1] * second) / sum(PER_POOL)
    torch.testing.assert_close(y, expected, rtol=1e-13, atol=1e-13)
    upstream = torch.randn_like(y)
    trained = [x, *moe.experts.parameters()]
    grads = torch.autograd.grad(y, trained, upstream, retain_graph=True)
    torch.testing.assert_close(grads, torch.autograd.grad(expected, trained, upstream, retain_graph=True))
    (of_gate,) = torch.autograd.grad(y, moe.router.gate.weight, upstream)
    of_gates = torch.autograd.grad(expected, [one.router.gate.weight for one in alone], upstream)
    torch.testing.assert_close(of_gate, torch.cat(of_gates))


@pytest.mark.parametrize("name", LAYERS)
def test_bf16(name):
    moe, x = layer(name), tokens(17)
    expected, same = moe(x)
    with torch.autocast("cpu", torch.bfloat16):
        y, routing = moe(x)
    assert y.dtype == torch.bfloat16 and torch.equal(routing.kept, same.kept)
    torch.testing.assert_close(y.float(), expected, atol=0.08, rtol=0.05)
    half = moe.to(torch.bfloat16)
    y, routing = half(x.bfloat16())
    y.sum().backward()
    assert y.dtype == torch.bfloat16 and routing.weights.dtype == torch.float32
    assert all(p.grad.dtype == torch.bfloat16 and p.grad.isfinite().all() for p in half.parameters())


@pytest.mark.parametrize("name", LAYERS)
def test_one_graph_equals_eager(name):
    moe, x = layer(name, backend="grouped"), tokens(3, 5).requires_grad_()
    moe.router.balancer = Switch(weight=0.1)
    trained = [x, *moe.parameters()]

    def run(x):
        y, routing = moe(x)
        return y, sum(aux_losses(moe, [routing]).values())

    def with_gradients(function):
        y, aux = function(x)
        return y, aux, torch.autograd.grad(y.square().sum() + aux, trained)

    torch.compiler.reset()
    compiled = with_gradients(torch.compile(run, fullgraph=True, backend="aot_eager"))
    torch.testing.assert_close(compiled, with_gradients(run))


def test_state_has_the_names_of_the_pools():
    assert list(free_ones().state_dict()) == [
        "pools.0.gate_up_proj",
        "pools.0.down_proj",
        "pools.3.constant.weight",
        "pools.3.gate.weight",
    ]
    one, other = two_sizes(), two_sizes()
    other.load_state_dict(one.state_dict())
    assert all(map(torch.equal, one.parameters(), other.parameters()))


def test_pools_inside_pools_are_numbered_through():
    torch.manual_seed(0)
    a, b, c = SwiGLUExperts(2, D, 8), ReLU2Experts(3, D, 8), CopyExperts(2)
    flat, nested = PooledExperts(a, b, c), PooledExperts(PooledExperts(a, b), c)
    assert nested.num_experts == flat.num_experts == 7 and nested.sizes == (5, 2)
    pairs = tokens(9), torch.randint(7, (9, 2)), torch.rand(9, 2), torch.rand(9, 2) < 0.8
    torch.testing.assert_close(nested(*pairs), flat(*pairs))


def test_pools_that_cannot_be_are_named():
    with pytest.raises(ConfigError, match="pooled experts: give at least one pool"):
        PooledExperts()
    with pytest.raises(ConfigError, match="pooled experts: pool 1, Linear, must have num_experts"):
        PooledExperts(ZeroExperts(1), nn.Linear(2, 2))
    with pytest.raises(ConfigError, match="the router has num_experts = 8, the experts are 10"):
        MoE(one_router(8), two_sizes())
