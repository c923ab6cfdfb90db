"""The layer on a real GPU: right in every backend, never waiting for the device, one graph under compile."""

import pytest
import torch

from himoe import Capacity, MoE, SwiGLUExperts, aux_losses, observe, presets, step
from himoe.functional import stats

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
D, E, F, K = 256, 16, 128, 4
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 3e-2}


def make_layer(backend, *, capacity=None, fused=False):
    torch.manual_seed(0)
    router = presets.hi_moe(dim=D, num_experts=E, num_groups=4, top_k=K)
    router.fused = fused
    dispatcher = None if capacity is None else Capacity(capacity)
    return MoE(router, SwiGLUExperts(E, D, F, backend=backend), dispatcher=dispatcher)


def inputs(tokens, device="cuda", dtype=torch.float32):
    x = torch.randn(2, tokens // 2, D, generator=torch.Generator().manual_seed(1))
    mask = torch.arange(tokens).view(2, -1) % 7 > 0
    return x.to(device, dtype), mask.to(device)


def training_step(layer, x, mask):
    y, routing = layer(x, mask)
    (y.float().square().mean() + sum(aux_losses(layer, [routing]).values())).backward()
    observe(layer, [routing])
    step(layer)
    return y, routing


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("backend", ["grouped", "triton"])
@pytest.mark.parametrize("tokens", [64, 1024, 8192])
def test_experts_are_right(tokens, backend, dtype):
    if backend == "triton":
        pytest.importorskip("triton")
    experts = SwiGLUExperts(E, D, F, backend=backend).to("cuda", dtype)
    exact = SwiGLUExperts(E, D, F, backend="loop").double()
    exact.load_state_dict({name: value.double().cpu() for name, value in experts.state_dict().items()})
    generator = torch.Generator().manual_seed(2)
    chance = 1.0 / torch.arange(1, E + 1)  # Zipf's law: the first expert has a third of the tokens
    ids = torch.multinomial(chance.expand(tokens, E), K, generator=generator)
    kept, weights = torch.rand(tokens, K, generator=generator) < 0.9, torch.rand(tokens, K, generator=generator)
    results = []
    for module, device, precision in ((experts, "cuda", dtype), (exact, "cpu", torch.float64)):
        x = inputs(tokens, device, dtype)[0].flatten(0, 1).to(precision).requires_grad_()
        w = weights.to(device, dtype).to(precision).requires_grad_()
        y = module(x, ids.to(device), w, kept.to(device))
        y.square().mean().mul(y.numel()).backward()
        results.append([t.double().cpu() for t in (y, x.grad, w.grad, *(p.grad for p in module.parameters()))])
    for found, expected in zip(*results, strict=True):
        assert (found - expected).norm() <= TOLERANCE[dtype] * expected.norm()


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("capacity", [None, 1.25])
@pytest.mark.parametrize("backend", ["grouped", "triton"])
def test_a_training_step_never_waits_for_the_gpu(backend, capacity, fused):
    if backend == "triton" or fused:
        pytest.importorskip("triton")
    layer = make_layer(backend, capacity=capacity, fused=fused).to("cuda", torch.bfloat16)
    x, mask = inputs(1024, dtype=torch.bfloat16)
    training_step(layer, x, mask)  # kernels are compiled and modules loaded, which may wait
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        _, routing = training_step(layer, x, mask)
        load = stats.load(routing)
        measured = [stats.max_vio(load), stats.effective_experts(load), stats.drop_rate(routing), stats.margin(routing)]
        with pytest.raises(RuntimeError, match="sync"):  # what this test relies on
            load.sum().item()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(value.isfinite() for value in measured)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("backend", ["grouped", "triton"])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_the_layer_compiles_as_one_graph(dtype, backend, fused):
    if backend == "triton" or fused:
        pytest.importorskip("triton")
    layer, other = (make_layer(backend, fused=fused).to("cuda", dtype) for _ in range(2))
    x, mask = inputs(512, dtype=dtype)
    y, routing = torch.compile(layer, fullgraph=True)(x, mask)
    y.float().square().mean().backward()
    expected, expected_routing = other(x, mask)
    expected.float().square().mean().backward()
    same = (routing.expert_ids == expected_routing.expert_ids).all(-1)
    assert same.float().mean() > 0.99  # near ties may fall the other way
    torch.testing.assert_close(y.flatten(0, 1)[same], expected.flatten(0, 1)[same], rtol=2e-2, atol=2e-2)
    assert all(p.grad.isfinite().all() for p in layer.parameters())


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_the_fused_router_at_its_usual_sizes(score):
    pytest.importorskip("triton")
    from himoe.functional import scores
    from himoe.kernels.fused_route import Plan, fused_route

    logits = torch.randn(8192, 128, device="cuda", generator=torch.Generator("cuda").manual_seed(0))
    found, ids, counts = fused_route(logits, None, None, Plan(score, 8, 4))
    torch.testing.assert_close(found, getattr(scores, score)(logits))
    ranking = found.view(-1, 4, 32).sort(descending=True, stable=True).indices  # ties to the lower id, unlike topk
    best = ranking[..., :2] + 32 * torch.arange(4, device="cuda")[:, None]
    assert torch.equal(ids, best.flatten(1)) and torch.equal(counts, ids.flatten().bincount(minlength=128))
