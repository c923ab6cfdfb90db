from functools import partial

import pytest
import torch

from himoe import Balancer, Router
from himoe.functional.groups import Groups
from himoe.functional.selection import expert_choice, threshold, top_k, top_p
from himoe.train.statistics import Statistics
from himoe.types import RouterContext, Routing


def routing(expert_ids, logits, kept=None, mask=None):
    expert_ids, logits = torch.tensor(expert_ids), torch.tensor(logits)
    selected = torch.ones_like(expert_ids, dtype=torch.bool)
    selected &= True if mask is None else mask[:, None]
    return Routing(
        logits=logits,
        scores=logits.softmax(-1),
        expert_ids=expert_ids,
        weights=torch.ones(expert_ids.shape),
        selected=selected,
        kept=selected if kept is None else torch.tensor(kept),
        context=RouterContext(mask=mask),
    )


FLAT = [[0.0] * 4]  # uniform over 4 experts in 2 groups: Σm² = 1/2, C = 1/2
SHARP = [[100.0, 0.0, 0.0, 0.0]]  # all mass on one expert: Σm² = 1; C is 1 in its group, 1/2 in the other


def step(statistics, *micro_batches):
    for layers in micro_batches:
        statistics.observe(layers)
    statistics.end_step()


def test_two_steps_by_hand():
    statistics = Statistics([1, 3], Groups.equal(4, 2), window=5)
    # Step 1, two micro-batches: layer 1 gets loads 2 0 0 0, layer 3 gets 1 1 0 0. Step 2: 0 0 0 1 and 0 0 1 0.
    first, second = routing([[0]], FLAT), routing([[1]], SHARP)
    step(statistics, [first, first], [first, second])
    step(statistics, [routing([[3]], SHARP), routing([[2]], SHARP)])
    one, two = statistics.read()
    assert (one["layer"], two["layer"]) == (1, 3)
    assert one["load"] == [2, 0, 0, 1] and two["load"] == [1, 1, 1, 0]
    assert one["max_vio_batch"] == pytest.approx((3 + 3) / 2)
    assert two["max_vio_batch"] == pytest.approx((1 + 3) / 2)
    assert one["max_vio_window"] == pytest.approx(2 / 0.75 - 1)
    assert two["cv_window"] == pytest.approx((3 * 0.25**2 + 0.75**2) ** 0.5 / 2 / 0.75)
    assert one["group_mass"] == pytest.approx((0.5 + 0.5 + 1) / 3)
    assert two["concentration"] == pytest.approx((0.5 + 0.75 + 0.75) / 3)
    assert one["effective_experts"] == pytest.approx(3 / 2 ** (2 / 3))  # of the shares 2/3, 0, 0, 1/3
    assert one["dead_experts"] == [1, 2] and two["dead_experts"] == [3]


def test_an_interval_ends_and_the_window_goes_on():
    statistics = Statistics([0], Groups.equal(4, 2), window=3)
    for expert in (0, 0, 1, 2):
        step(statistics, [routing([[expert]], FLAT)])
    assert statistics.read()[0]["load"] == [2, 1, 1, 0]
    assert statistics.read()[0]["max_vio_window"] == pytest.approx(1 / 0.75 - 1)  # the first step has left the window
    statistics.start_interval()
    step(statistics, [routing([[3]], SHARP)])
    (layer,) = statistics.read()
    assert layer["load"] == [0, 0, 0, 1] and layer["max_vio_batch"] == 3
    assert layer["group_mass"] == pytest.approx(1)
    assert layer["cv_window"] == pytest.approx((0.75**2 + 3 * 0.25**2) ** 0.5 / 2 / 0.75)


def test_load_counts_neither_dropped_pairs_nor_padding():
    statistics = Statistics([0], Groups.equal(4, 2))
    mask = torch.tensor([True, False])
    step(statistics, [routing([[0, 1], [2, 3]], FLAT + SHARP, kept=[[True, False], [False, False]], mask=mask)])
    (layer,) = statistics.read()
    assert layer["load"] == [1, 0, 0, 0] and layer["drop_rate"] == 0.5
    assert layer["group_mass"] == pytest.approx(0.5)


def test_a_capacity_limit_cannot_hide_an_imbalance():
    statistics = Statistics([0], Groups.equal(4, 2))
    kept = [[True], [False], [False], [True]]
    step(statistics, [routing([[0], [0], [0], [1]], FLAT * 4, kept=kept)])
    (layer,) = statistics.read()
    assert layer["load"] == [1, 1, 0, 0] and layer["drop_rate"] == 0.5
    assert layer["max_vio_batch"] == layer["max_vio_window"] == 2  # of 3 1 0 0
    assert layer["cv_window"] == pytest.approx(1.5**0.5)
    statistics.start_interval()
    assert statistics.read()[0]["drop_rate"] == 0


class Logs(torch.nn.Module):
    """A gate whose logits are the logarithm of what it is given."""

    def forward(self, x):
        return x.log()


SHARES = torch.tensor([[0.4, 0.3, 0.2, 0.1], [0.1, 0.2, 0.6, 0.1], [0.3, 0.3, 0.2, 0.2]])


def routed(selector, mask=None, shares=SHARES, **options):
    router = Router(Logs(), selector, num_experts=4, **options)
    statistics = Statistics([0], Groups.equal(4, 2), routers=[router])
    step(statistics, [router(shares, mask)])
    return statistics.read()[0]


def test_experts_per_token_and_what_a_limit_cuts_off_by_hand():
    # At p = 0.85 the tokens want 3, 3 and 4 experts, which hold 0.9, 0.9 and 1.
    layer = routed(partial(top_p, p=0.85))
    assert (layer["experts_per_token"], layer["truncated_mass"]) == (pytest.approx(10 / 3), 0)
    layer = routed(partial(top_p, p=0.85, max_k=2))
    assert layer["experts_per_token"] == 2
    assert layer["truncated_mass"] == pytest.approx((0.2 + 0.1 + 0.4) / 3)
    mask = torch.tensor([True, True, False])
    layer = routed(partial(top_p, p=0.85, max_k=3), mask)
    assert (layer["experts_per_token"], layer["truncated_mass"]) == (3, 0)
    layer = routed(partial(top_p, p=0.85, max_k=1), mask)
    assert layer["truncated_mass"] == pytest.approx((0.5 + 0.3) / 2)
    layer = routed(partial(threshold, threshold=0.25, max_k=1))  # 2, 1 and 2 are above
    assert (layer["experts_per_token"], layer["truncated_mass"]) == (1, pytest.approx((0.3 + 0 + 0.3) / 3))


def test_a_fixed_number_of_experts_has_nothing_cut_off():
    layer = routed(partial(top_k, k=2))
    assert (layer["experts_per_token"], layer["truncated_mass"]) == (2, 0)


def test_what_experts_lose_to_a_limit_of_the_tokens():
    # Each takes one of three tokens: the first, the first, the second, the last. So the first keeps one of two.
    shares = torch.tensor([[0.5, 0.4, 0.05, 0.05], [0.2, 0.1, 0.6, 0.1], [0.3, 0.2, 0.1, 0.4]])
    assert routed(partial(expert_choice, k=1), shares=shares)["experts_per_token"] == pytest.approx(4 / 3)
    layer = routed(partial(expert_choice, k=1, max_k=1), shares=shares)
    assert (layer["experts_per_token"], layer["truncated_mass"]) == (1, pytest.approx(0.4 / 3))


def test_what_is_wanted_is_what_the_balancers_let_the_selector_see():
    class Shift(Balancer):
        def adjust_choice(self, scores, context):
            return scores - 0.15

    layer = routed(partial(threshold, max_k=1), balancer=Shift())  # 3, 2 and 4 are above, of the scores without shift
    assert layer["truncated_mass"] == pytest.approx((0.5 + 0.2 + 0.7) / 3)


def test_micro_batches_and_steps_are_averaged():
    router = Router(Logs(), partial(top_p, p=0.85, max_k=2), num_experts=4)
    statistics = Statistics([0], Groups.equal(4, 2), routers=[router])
    step(statistics, [router(SHARES[:1])], [router(SHARES[1:2])])
    step(statistics, [router(SHARES[2:])], [router(torch.tensor([[0.97, 0.01, 0.01, 0.01]]))])
    (layer,) = statistics.read()
    assert layer["experts_per_token"] == 7 / 4 and layer["truncated_mass"] == pytest.approx(0.7 / 4)
    statistics.start_interval()
    assert statistics.read()[0]["experts_per_token"] == statistics.read()[0]["truncated_mass"] == 0


def test_state_goes_through_a_checkpoint():
    steps = [[routing([[e]], FLAT if e % 2 else SHARP)] for e in (0, 1, 3, 2, 2, 0)]
    whole, first, second = (Statistics([0], Groups.equal(4, 2), window=4) for _ in range(3))
    for layers in steps:
        step(whole, layers)
    for layers in steps[:3]:
        step(first, layers)
    second.load_tensors({name: tensor.clone() for name, tensor in first.tensors().items()})
    for layers in steps[3:]:
        step(second, layers)
    assert second.read() == whole.read()


def test_memory_is_of_the_order_of_experts():
    statistics = Statistics([0], Groups.equal(64, 4), window=5)
    before = sum(tensor.numel() for tensor in statistics.tensors().values())
    step(statistics, [routing([[0]] * 1000, [[0.0] * 64] * 1000)])
    assert sum(tensor.numel() for tensor in statistics.tensors().values()) == before < 10 * 64
