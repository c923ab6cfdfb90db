"""Evaluation stays pure, scales and state never decay, statistics cost O(E)."""

import numpy as np
import pytest
import torch
from router_zoo import ALL, V, everything, make_model, make_router, same, state_of, token_ids
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import himoe
from himoe.balance import Switch, TwoLevelTerms
from himoe.functional import stats
from himoe.functional.histogram import BINS
from himoe.train.evaluate import Reading, evaluate_domains
from himoe.train.optimizer import build_optimizer, decay_groups
from himoe.train.texts import Text

pytestmark = pytest.mark.filterwarnings("ignore::himoe.errors.HimoeWarning")


@pytest.mark.parametrize("name", ALL)
def test_evaluation_loss_is_cross_entropy_and_moves_nothing(name):
    model = make_model(name)
    for module in model.modules():
        if isinstance(module, Switch):
            module.weight = 1e6
        if isinstance(module, TwoLevelTerms):
            module.lambda_intra = module.lambda_inter = 1e6
    before, generator = state_of(model), torch.get_rng_state()
    tokens = token_ids(1, 24).numpy().ravel()
    reading = Reading(0, seq_len=24, batch_size=2, cross_documents=True)
    loss = evaluate_domains(model, {"a": Text(tokens, 24)}, reading)["loss"]
    inputs = torch.from_numpy(np.concatenate([[0], tokens[:-1]]))[None]
    with torch.no_grad():
        logits, _ = model.eval()(inputs)
    assert loss == pytest.approx(F.cross_entropy(logits[0], torch.from_numpy(tokens)).item(), rel=1e-5)
    assert same(before, state_of(model)) and torch.equal(generator, torch.get_rng_state())


@pytest.mark.parametrize("name", ALL)
def test_eval_is_a_function_of_its_input(name):
    model = make_model(name).eval()
    with torch.no_grad():
        one, other = model(token_ids())[0], model(token_ids())[0]
    assert torch.equal(one, other)


def test_learned_scales_and_biases_get_no_weight_decay():
    model = make_model("everything", dtype=torch.float32)
    decayed, spared = decay_groups(model, 0.1)
    scales = [layer.router.expert_scale for layer in himoe.moe_layers(model)]
    assert all(any(p is scale for p in spared["params"]) for scale in scales)
    assert not any(p is scale for p in decayed["params"] for scale in scales)
    optimizer = build_optimizer(model, 0.1, weight_decay=10.0)
    before = state_of(model)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert all(torch.equal(scale, torch.ones_like(scale)) for scale in scales)
    assert same(before, state_of(model))
    assert himoe.moe_layers(model)[0].router.gate.weight.abs().max() < 1e-12  # 1 − 0.1·10: what decays is gone


def test_clipping_sees_scales_gates_and_experts_together():
    model = make_model("everything")
    logits, routings = model(token_ids())
    (1e3 * logits.square().sum() + sum(himoe.aux_losses(model, routings).values())).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    router = himoe.moe_layers(model)[0].router
    assert router.expert_scale.grad.abs().max() > 0 and router.gate.weight.grad.abs().max() > 0
    total = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
    assert total.item() == pytest.approx(1.0, rel=1e-4)


class Largest(TorchDispatchMode):
    """Remember the number of elements of the largest tensor that any operation makes."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, list | tuple) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


@torch.no_grad()
@pytest.mark.parametrize("masked", [False, True])
def test_no_one_hot_over_tokens(masked):
    tokens, num_experts, k = 512, 32, 8
    router = make_router("hi_moe", num_experts, k)
    router.balancer = everything(num_experts)
    mask = torch.arange(tokens) < 500 if masked else None
    routing = router(torch.randn(tokens, 8), mask)
    with Largest() as observing:
        router.balancer.observe(routing)
        router.balancer.losses(routing)
    assert observing.elements <= tokens * num_experts  # the logits' own size; a one-hot is k times as large
    with Largest() as counting:
        stats.load(routing)
        stats.selected_load(routing)
        stats.drop_rate(routing)
    assert counting.elements <= tokens * k


@torch.no_grad()
def test_what_is_kept_between_micro_batches_is_of_size_e():
    num_experts = 32
    router = make_router("hi_moe", num_experts, 4)
    router.balancer = everything(num_experts)
    for _ in range(3):
        router.balancer.observe(router(torch.randn(400, 8)))
    sums = [value for part in router.balancer.modules() for value in getattr(part, "sums", {}).values()]
    histograms = [value for value in sums if value.ndim == 2]
    assert sum(value.numel() for value in sums if value.ndim < 2) <= 4 * num_experts + 8
    assert [value.shape for value in histograms] == [(num_experts, BINS)] * 2
    assert not any(value.requires_grad for value in sums)
    assert V < 400
