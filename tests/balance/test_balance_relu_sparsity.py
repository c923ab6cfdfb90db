"""ReMoE's sparsity controller: hand-worked losses and moves of λ, and a toy whose density goes to K."""

import pytest
import torch
from free_router import one_step
from torch import nn

from himoe import Gate, Router
from himoe.balance import ReluSparsity, step_balancers
from himoe.errors import ConfigError
from himoe.functional import stats


def above_zero(choice, context):
    """Every expert of positive score."""
    return torch.arange(choice.shape[1]).expand_as(choice), choice > 0


def route(logits, mask=None, balancer=None):
    """Route logits with ReLU scores."""
    logits = torch.as_tensor(logits)
    router = Router(
        nn.Identity(), above_zero, num_experts=logits.shape[1], score=torch.relu, balancer=balancer, renormalize=False
    )
    return router(logits, None if mask is None else torch.tensor(mask))


LOGITS = [[2.0, 1.0, -1.0, -3.0], [4.0, -1.0, 0.5, -2.0], [1.0, -1.0, -1.0, -1.0]]  # 3, 1, 1, 0 tokens


def loss(routing, **options) -> float:
    return ReluSparsity(4, 2, start=0.1, **options).losses(routing)["relu_sparsity"].item()


def test_the_refined_loss_by_hand():
    # f_e = E/(K·T)·n_e = 4/6·(3, 1, 1, 0); mean R = (7/3, 1/3, 1/6, 0)
    expected = 4 / 6 * (3 * 7 / 3 + 1 / 3 + 1 / 6)
    assert loss(route(LOGITS)) == pytest.approx(0.1 * expected)


def test_the_plain_loss_is_the_l1_norm():
    assert loss(route(LOGITS), balance=False) == pytest.approx(0.1 * (7 + 1 + 0.5) / 3)


@pytest.mark.parametrize("balance", [True, False])
def test_padding_changes_no_loss(balance):
    padded = [*LOGITS[:1], [9.0, 9.0, 9.0, 9.0], *LOGITS[1:]]
    routing = route(padded, mask=[True, False, True, True])
    assert loss(routing, balance=balance) == pytest.approx(loss(route(LOGITS), balance=balance))
    assert loss(route(LOGITS, mask=[False] * 3), balance=balance) == 0


def test_at_equal_loads_of_k_experts_both_losses_are_the_same():
    logits = torch.tensor([[1.0, 2.0, -1.0, -1.0], [-1.0, -1.0, 3.0, 0.5]])
    assert loss(route(logits)) == pytest.approx(loss(route(logits), balance=False))


def test_the_gradient_presses_the_popular_expert_harder_and_leaves_the_silent_one():
    logits = torch.tensor(LOGITS, requires_grad=True)
    value = ReluSparsity(4, 2, start=0.1).losses(route(logits))["relu_sparsity"]
    (grad,) = torch.autograd.grad(value, logits)
    assert grad[0].tolist() == pytest.approx([0.1 * 4 / 6 * 3 / 3, 0.1 * 4 / 6 / 3, 0.0, 0.0])


def active(counts: list[int], num_experts: int = 4):
    """Tokens with this many positive scores each."""
    return route([[1.0] * n + [-1.0] * (num_experts - n) for n in counts])


@pytest.mark.parametrize(
    ("counts", "factor"),
    [
        ([2, 2], 1.0),  # S = 1 − K/E exactly
        ([1, 3], 1.0),
        ([3, 2], 1.2),  # too dense: λ grows
        ([4, 4], 1.2),
        ([2, 1], 1 / 1.2),  # too sparse: λ shrinks
        ([0, 0], 1 / 1.2),
    ],
)
def test_a_move_of_the_multiplier(counts, factor):
    balancer = ReluSparsity(4, 2, start=0.5)
    one_step(balancer, active(counts))
    assert balancer.multiplier.item() == pytest.approx(0.5 * factor)


def test_micro_batches_and_layers_that_share_it_are_averaged():
    balancer = ReluSparsity(4, 2, start=0.5)
    one_step(balancer, active([4]), active([1, 1]))  # six of three times four: as wanted
    assert balancer.multiplier.item() == 0.5
    shared = ReluSparsity(4, 2, start=0.5)
    with torch.no_grad():
        shared.observe(active([4, 4]))  # the first layer is dense,
        shared.observe(active([1, 1]))  # the second sparse, their mean too dense: one move
    step_balancers([shared, shared])
    assert shared.multiplier.item() == pytest.approx(0.6)


def test_padding_does_not_count():
    balancer = ReluSparsity(4, 2, start=0.5)
    one_step(balancer, route([[1.0] * 4, [1.0] + [-1.0] * 3], mask=[False, True]))
    assert balancer.multiplier.item() == pytest.approx(0.5 / 1.2)
    before = balancer.multiplier.item()
    one_step(balancer, route([[1.0] * 4], mask=[False]))
    assert balancer.multiplier.item() == before


def test_the_multiplier_stays_in_its_range_and_starts_as_published():
    assert ReluSparsity(4, 2).multiplier.item() == pytest.approx(1e-8)
    up, down = (ReluSparsity(4, 2, start=0.5, minimum=0.4, maximum=0.7) for _ in range(2))
    for _ in range(5):
        one_step(up, active([4]))
        one_step(down, active([0]))
    assert up.multiplier.item() == pytest.approx(0.7)
    assert down.multiplier.item() == pytest.approx(0.4)
    up.reset_parameters()
    assert up.multiplier.item() == 0.5


def learn(balance: bool, steps: int = 500, num_experts: int = 8, k: int = 2, dim: int = 12) -> tuple[float, float]:
    """Learn gate and linear experts of a soft mixture; return active experts and MaxVio of the last 50 steps."""
    torch.manual_seed(0)
    balancer = ReluSparsity(num_experts, k, factor=1.05, start=1e-4, balance=balance)
    router = Router(
        Gate(dim, num_experts), above_zero, num_experts=num_experts, score=torch.relu, balancer=balancer,
        renormalize=False,
    )  # fmt: skip
    with torch.no_grad():
        router.gate.weight[:, 0] += torch.linspace(0.5, -0.5, num_experts)
    experts, teacher = (torch.randn(num_experts, dim, dim) / dim**0.5 for _ in range(2))
    teacher_gate = 2 * torch.randn(num_experts, dim)
    optimizer = torch.optim.Adam([*router.parameters(), experts.requires_grad_()], lr=1e-2)
    load, tokens = torch.zeros(num_experts, dtype=torch.int64), 256
    for step in range(steps):
        x = torch.randn(tokens, dim, generator=torch.Generator().manual_seed(step))
        x[:, 0] = 1.0
        target = torch.einsum("td,edf,te->tf", x, teacher, (x @ teacher_gate.t()).softmax(-1))
        routing = router(x)
        y = torch.einsum("td,edf,te->tf", x, experts, routing.weights)
        total = (y - target).square().mean() + balancer.losses(routing)["relu_sparsity"]
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        one_step(balancer, routing)
        if step >= steps - 50:
            load += stats.selected_load(routing)
    return load.sum().item() / (50 * tokens), stats.max_vio(load).item()


def test_a_toy_reaches_k_active_experts_and_the_refined_loss_evens_their_loads():
    mean_active, refined = learn(balance=True)
    assert mean_active == pytest.approx(2, abs=0.1)
    mean_active, plain = learn(balance=False)
    assert mean_active == pytest.approx(2, abs=0.1)
    assert refined < 0.7 * plain


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"top_k": 5}, "relu_sparsity: top_k = 5 must be between 1 and num_experts = 4"),
        ({"factor": 1.0}, "relu_sparsity: factor = 1.0 must be above 1"),
        ({"minimum": 0.0}, "minimum = 0.0"),
        ({"start": 200.0}, "start = 200.0 ≤ maximum = 100.0"),
    ],
)
def test_wrong_options(options, text):
    with pytest.raises(ConfigError, match=text):
        ReluSparsity(4, **{"top_k": 2, **options})
