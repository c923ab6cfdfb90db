"""SMEBU: hand-worked moves of bias and momentum."""

import math

import pytest
import torch
from free_router import choices, one_step, random_logits, route

from himoe.balance import LossFree, Momentum
from himoe.errors import ConfigError

COUNTS_4211 = [[0, 1], [0, 1], [0, 2], [0, 3]]  # loads 4, 2, 1, 1; the mean is 2, v = −1, 0, 1/2, 1/2


def moves(rate: float, kappa: float) -> list[float]:
    """λ·tanh(κ·v), the mean taken off."""
    d = [rate * math.tanh(kappa * v) for v in (-1.0, 0.0, 0.5, 0.5)]
    return [value - sum(d) / 4 for value in d]


@pytest.mark.parametrize("kappa", [0.5, 2.0])
def test_two_steps_worked_by_hand(kappa):
    balancer, d = Momentum(4, rate=0.1, kappa=kappa, beta=0.75), moves(0.1, kappa)
    one_step(balancer, choices(COUNTS_4211, 4))
    first = [0.25 * value for value in d]
    assert balancer.momentum.tolist() == pytest.approx(first, abs=1e-7)
    assert balancer.bias.tolist() == pytest.approx(first, abs=1e-7)
    one_step(balancer, choices(COUNTS_4211, 4))
    second = [0.75 * m + 0.25 * value for m, value in zip(first, d, strict=True)]
    assert balancer.momentum.tolist() == pytest.approx(second, abs=1e-7)
    assert balancer.bias.tolist() == pytest.approx([m + n for m, n in zip(first, second, strict=True)], abs=1e-7)


def test_the_published_options_are_the_defaults():
    balancer = Momentum(4)
    one_step(balancer, choices(COUNTS_4211, 4))
    assert balancer.bias.tolist() == pytest.approx([0.5 * value for value in moves(5e-4, 2.0)], abs=1e-9)
    assert balancer.bias_step == 5e-4


def test_without_momentum_and_with_an_early_bend_it_is_a_centred_sign():
    soft, sign = Momentum(6, rate=0.1, kappa=1e6, beta=0.0), LossFree(6, rate=0.1, centred=True)
    routing = route(random_logits(0, 7, 6), 2)
    for balancer in (soft, sign):
        one_step(balancer, routing)
    torch.testing.assert_close(soft.bias, sign.bias)


def test_equal_loads_leave_only_the_momentum_which_fades():
    balancer = Momentum(2, rate=0.1, beta=0.5)
    one_step(balancer, choices([[0]], 2))
    before = balancer.bias.clone()
    for _ in range(40):
        one_step(balancer, choices([[0], [1]], 2))
    torch.testing.assert_close(balancer.bias, 2 * before)  # m/2 + m/4 + …
    assert balancer.momentum.abs().max() < 1e-9


def test_micro_batches_are_one_step_and_padding_does_not_count():
    whole, parts, padded = (Momentum(2, rate=0.1) for _ in range(3))
    one_step(whole, choices([[0], [0], [0], [1]], 2))
    one_step(parts, choices([[0], [0]], 2), choices([[0]], 2), choices([[1]], 2))
    one_step(padded, choices([[0], [0], [0], [1], [1]], 2, mask=[True] * 4 + [False]))
    assert torch.equal(whole.bias, parts.bias) and torch.equal(whole.bias, padded.bias)
    assert whole.bias.abs().max() > 0.01


def test_a_step_of_padding_alone_moves_nothing_not_even_by_momentum():
    balancer = Momentum(2, rate=0.1)
    one_step(balancer, choices([[0]], 2))
    before = {name: buffer.clone() for name, buffer in balancer.named_buffers()}
    one_step(balancer, choices([[0]], 2, mask=[False]))
    assert all(torch.equal(before[name], buffer) for name, buffer in balancer.named_buffers())


def test_the_bias_moves_the_choice_and_never_the_weights():
    balancer = Momentum(3)
    balancer.bias.copy_(torch.tensor([0.0, 0.0, 5.0]))
    logits = torch.tensor([[2.0, 1.0, -1.0]])
    routing = route(logits, 1, balancer=balancer, score="sigmoid", renormalize=False)
    assert routing.expert_ids.tolist() == [[2]]
    assert routing.weights.item() == pytest.approx(1 / (1 + math.exp(1)))


@pytest.mark.parametrize("options", [{"rate": -1.0}, {"rate": math.inf}, {"kappa": 0.0}, {"beta": 1.0}])
def test_wrong_options(options):
    ((name, value),) = options.items()
    with pytest.raises(ConfigError, match=f"momentum: .*{name} = {value}"):
        Momentum(4, **options)
