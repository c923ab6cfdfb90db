"""Loss-Free Balancing: hand-worked moves of the bias, and what the bias may and may not touch."""

import math
from functools import partial

import pytest
import torch
from free_router import choices, free_router, one_step, random_logits, route

from himoe.balance import LossFree, Momentum
from himoe.errors import ConfigError

E = 4
COUNTS_4211 = [[0, 1], [0, 1], [0, 2], [0, 3]]  # loads 4, 2, 1, 1; the mean is 2


def move(routing=None, **options) -> list[float]:
    """The bias after one step that saw loads 4, 2, 1, 1."""
    balancer = LossFree(E, **options)
    one_step(balancer, routing or choices(COUNTS_4211, E))
    return balancer.bias.tolist()


RMS = math.sqrt((4 + 0 + 1 + 1) / 4)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"rate": 0.1}, [-0.1, 0.0, 0.1, 0.1]),
        ({"rate": 0.1, "update": "proportional"}, [-0.1, 0.0, 0.05, 0.05]),
        ({"rate": 0.1, "update": "rms"}, [-0.2 / RMS, 0.0, 0.1 / RMS, 0.1 / RMS]),
        ({"rate": 0.1, "centred": True}, [-0.125, -0.025, 0.075, 0.075]),
        ({"rate": 0.1, "update": "rms", "centred": True}, [-0.2 / RMS, 0.0, 0.1 / RMS, 0.1 / RMS]),
        ({"rate": 0.1, "multiplicative": True}, [0.9, 1.0, 1.1, 1.1]),
        ({"rate": 0.1, "multiplicative": True, "update": "proportional"}, [0.9, 1.0, 1.05, 1.05]),
        ({}, [-0.001, 0.0, 0.001, 0.001]),
    ],
)
def test_one_move_worked_by_hand(options, expected):
    assert move(**options) == pytest.approx(expected, abs=1e-7)


@pytest.mark.parametrize("update", ["sign", "proportional", "rms"])
def test_equal_loads_move_nothing_even_where_the_mean_is_no_float(update):
    three = choices([[0], [1], [2]], 3)
    for repeats in (1, 10, 49):
        balancer = LossFree(3, update=update)
        one_step(balancer, *[three] * repeats)
        assert balancer.bias.tolist() == [0.0, 0.0, 0.0]


def test_moves_add_up_over_steps_and_return_when_the_loads_turn_round():
    balancer = LossFree(2, rate=0.25)
    to_first, to_second = choices([[0]], 2), choices([[1]], 2)
    one_step(balancer, to_first)
    one_step(balancer, to_first)
    assert balancer.bias.tolist() == [-0.5, 0.5]
    one_step(balancer, to_second)
    assert balancer.bias.tolist() == [-0.25, 0.25]


def test_micro_batches_are_one_step():
    balancer = LossFree(2, rate=0.25)
    one_step(balancer, choices([[0], [0]], 2), choices([[0], [1]], 2), choices([[1]], 2))  # loads 3, 2
    assert balancer.bias.tolist() == [-0.25, 0.25]


def test_counts_of_an_earlier_step_are_forgotten():
    balancer = LossFree(2, rate=0.25)
    one_step(balancer, choices([[0]] * 100, 2))
    one_step(balancer, choices([[1]], 2))
    assert balancer.bias.tolist() == [0.0, 0.0]


def test_padding_is_not_counted():
    routing = choices([[0], [1], [0], [0]], 2, mask=[True, True, False, False])
    balancer = LossFree(2)
    one_step(balancer, routing)
    assert balancer.bias.tolist() == [0.0, 0.0]


def test_the_selected_pairs_are_counted_also_those_that_capacity_drops():
    routing = choices([[0], [0], [0], [1]], 2)
    dropped = routing.replace(kept=torch.tensor([[True], [False], [False], [True]]))
    balancer = LossFree(2, rate=0.5)
    one_step(balancer, dropped)
    assert balancer.bias.tolist() == [-0.5, 0.5]


def test_counts_are_integers_beyond_what_fp32_can_count():
    balancer = LossFree(2, update="proportional", rate=1.0)
    routing = choices([[0], [1]], 2)
    balancer.observe(routing)
    balancer.sums["counts"] += 2**24
    one_step(balancer, choices([[0]], 2))
    assert balancer.bias.tolist() == pytest.approx([-0.5 / (2**24 + 1.5), 0.5 / (2**24 + 1.5)], rel=1e-6)


def test_a_multiplicative_bias_stays_positive():
    balancer = LossFree(2, rate=0.7, multiplicative=True)
    for _ in range(5):
        one_step(balancer, choices([[0]], 2))
    assert balancer.bias.min() > 0
    assert balancer.bias[1] == pytest.approx(1 + 5 * 0.7)


def test_the_bias_moves_the_choice_and_never_the_weights():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    balancer = LossFree(E)
    balancer.bias.copy_(torch.tensor([0.0, 0.0, 0.0, 5.0]))
    routing = route(logits, 2, balancer=balancer, score="sigmoid")
    assert routing.expert_ids.tolist() == [[3, 0]]
    s = [1 / (1 + math.exp(1.0)), 1 / (1 + math.exp(-2.0))]
    assert routing.weights.tolist()[0] == pytest.approx([w / sum(s) for w in s], abs=1e-6)
    assert torch.equal(routing.scores, logits.sigmoid())


def test_a_multiplicative_bias_ranks_by_the_product():
    balancer = LossFree(3, multiplicative=True)
    balancer.bias.copy_(torch.tensor([0.5, 1.0, 3.0]))
    routing = route(torch.tensor([[3.0, 0.0, -0.5]]), 1, balancer=balancer, score="sigmoid")
    assert routing.expert_ids.tolist() == [[2]]  # 0.95·0.5 = 0.48, 0.5, 0.38·3 = 1.13
    assert routing.scores[0, 2].item() == pytest.approx(1 / (1 + math.exp(0.5)))


def test_the_bias_gets_no_gradient_and_makes_no_loss():
    balancer = LossFree(E)
    logits = random_logits(0, 5, E).requires_grad_()
    routing = route(logits, 2, balancer=balancer, score="sigmoid")
    routing.weights.square().sum().backward()
    assert balancer.losses(routing) == {}
    assert balancer.bias.grad is None and not balancer.bias.requires_grad


def test_centred_moves_keep_the_sum_of_the_biases():
    balancer = LossFree(E, rate=0.1, centred=True)
    for seed in range(5):
        one_step(balancer, route(random_logits(seed, 7, E), 2))
    assert balancer.bias.abs().max() > 0.1
    assert balancer.bias.sum().item() == pytest.approx(0, abs=1e-6)


def test_start_and_reset():
    for multiplicative in (False, True):
        balancer = LossFree(E, multiplicative=multiplicative)
        start = balancer.bias.clone()
        assert start.tolist() == [float(multiplicative)] * E
        assert balancer.bias.dtype == torch.float32
        one_step(balancer, choices(COUNTS_4211, E))
        balancer.reset_parameters()
        assert torch.equal(balancer.bias, start)


def test_fp64_routing_keeps_an_fp32_bias():
    balancer = LossFree(E)
    one_step(balancer, free_router(E, 2, balancer=balancer)(random_logits(0, 9, E)))
    assert balancer.bias.dtype == torch.float32


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"update": "adam"}, "loss_free: update = 'adam' must be sign, proportional or rms"),
        ({"rate": -1.0}, "loss_free: rate = -1.0 must be ≥ 0"),
    ],
)
def test_wrong_options(options, text):
    with pytest.raises(ConfigError, match=text):
        LossFree(E, **options)


@pytest.mark.parametrize("made_for", [1, 4, 16])
@pytest.mark.parametrize(
    ("name", "make"),
    [("loss_free", LossFree), ("loss_free", partial(LossFree, multiplicative=True)), ("momentum", Momentum)],
)
def test_a_bias_for_another_number_of_experts_is_refused(name, make, made_for):
    message = f"{name}: made for num_experts = {made_for}, but the router has 8"
    with pytest.raises(ConfigError, match=f"^{message}$"):
        route(random_logits(0, 5, 8), 2, balancer=make(made_for))
