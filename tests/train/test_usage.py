import numpy as np
import pytest
import torch

from himoe.functional.groups import Groups
from himoe.train.usage import BLOCKS, Usage, domain_information, mutual_information
from himoe.types import RouterContext, Routing

GROUPS = Groups.equal(4, 2)


def routing(experts, *, real=None, kept=None):
    """One expert per token, chosen with certainty."""
    experts = torch.tensor(experts)
    selected = torch.ones(len(experts), 1, dtype=torch.bool) if real is None else torch.tensor(real)[:, None]
    logits = torch.nn.functional.one_hot(experts, 4) * 50.0
    return Routing(
        logits=logits,
        scores=logits.softmax(-1),
        expert_ids=experts[:, None],
        weights=torch.ones(len(experts), 1),
        selected=selected,
        kept=selected if kept is None else torch.tensor(kept)[:, None],
        context=RouterContext(mask=None if real is None else torch.tensor(real)),
    )


def usage_of(experts, documents=None):
    usage = Usage([3], GROUPS)
    usage.observe([routing(experts)], torch.arange(len(experts)) if documents is None else torch.tensor(documents))
    return usage


def test_a_hand_worked_layer():
    usage = Usage([3], GROUPS)
    usage.observe([routing([0, 0, 0, 1])], torch.tensor([0, 0, 1, 1]))
    usage.observe([routing([0, 0, 2, 3], real=[True, True, True, False])], torch.tensor([1, 1, 40, 40]))
    (record,) = usage.records()
    assert (record["layer"], record["load"], record["dead_experts"]) == (3, [5, 1, 1, 0], [3])
    assert record["max_vio_global"] == pytest.approx(5 / (7 / 4) - 1)
    assert record["cv_global"] == pytest.approx(np.std([5, 1, 1, 0]) / (7 / 4))
    entropy = -sum(share * np.log(share) for share in (5 / 7, 1 / 7, 1 / 7))
    assert record["effective_experts"] == pytest.approx(np.exp(entropy))
    assert record["normalized_entropy"] == pytest.approx(entropy / np.log(4))
    assert record["experts_per_token"] == 1
    assert (record["group_mass"], record["concentration"]) == (pytest.approx(1), pytest.approx(0.75))  # 1 and 1/2


def test_dropped_pairs_count_for_the_balance_and_not_for_the_load():
    usage = Usage([0], GROUPS)
    usage.observe([routing([0, 0, 1, 2], kept=[True, False, True, True])], torch.zeros(4, dtype=torch.int64))
    (record,) = usage.records()
    assert (record["load"], record["drop_rate"], record["max_vio_global"]) == ([1, 1, 1, 0], 0.25, 1.0)


def test_usages_add_up():
    one, other = usage_of([0, 0, 1]), usage_of([2, 3, 3, 3])
    assert (one + other).records()[0]["load"] == [2, 1, 1, 3]
    assert one.records()[0]["load"] == [2, 1, 0, 0]


@pytest.mark.parametrize(
    ("load", "bits"),
    [
        ([[4, 0, 0, 0], [0, 9, 0, 0]], 1),  # the expert gives the domain away, whatever the sizes
        ([[2, 2, 0, 0], [0, 0, 5, 5]], 1),
        ([[3, 1, 0, 0], [300, 100, 0, 0]], 0),
        ([[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]], 2),
        ([[2, 2, 0, 0], [4, 0, 0, 0]], 0.311278),  # H(3/4, 1/4) − 1/2
        ([[4, 0, 0, 0], [0, 9, 0, 0], [0, 0, 0, 0]], 1),  # an empty domain is none
    ],
)
def test_mutual_information_by_hand(load, bits):
    assert mutual_information(np.array(load)) == pytest.approx(bits, abs=1e-6)


def test_domains_that_use_other_experts_are_far_above_the_floor():
    draws = np.random.default_rng(0)
    usages = {
        "a": usage_of(draws.choice(4, size=6400, p=[0.7, 0.1, 0.1, 0.1]), np.arange(6400) // 100),
        "b": usage_of(draws.choice(4, size=6400, p=[0.1, 0.1, 0.1, 0.7]), np.arange(6400) // 100),
    }
    (found,) = domain_information(usages)
    assert found["domain_information_maximum"] == 1
    assert found["domain_information"] > 0.3
    assert found["domain_information_floor"] < 0.05
    assert domain_information(usages) == [found]


@pytest.mark.parametrize(
    ("sizes", "lengths"),
    [((BLOCKS, BLOCKS), (50, 50)), ((12, 500), (10, 10)), ((320, 20, 20), (5, 5, 5)), ((BLOCKS, BLOCKS), (5, 100))],
)
def test_the_floor_holds_documents_together_whatever_the_size_of_domains(sizes, lengths):
    # Every document uses one expert, drawn at random: tokens would call that a difference between the domains.
    draws = np.random.default_rng(1)
    above = []
    for _ in range(20):
        usages = {
            str(i): usage_of(np.repeat(draws.integers(4, size=size), length), np.repeat(np.arange(size), length))
            for i, (size, length) in enumerate(zip(sizes, lengths, strict=True))
        }
        (found,) = domain_information(usages)
        above.append(found["domain_information"] / found["domain_information_floor"])
    assert sum(ratio > 1 for ratio in above) <= 4
    assert max(above) > 0.5  # nor is the floor out of reach


def test_memory_does_not_grow_with_the_documents():
    usage = Usage([0], GROUPS)
    for first in range(0, 5000, 50):
        usage.observe([routing([0] * 50)], torch.arange(first, first + 50))
    assert usage.blocks.shape == (1, BLOCKS, 4)
    assert usage.blocks.sum() == 5000


def test_one_domain_has_no_information():
    assert domain_information({"a": usage_of([0, 1])})[0]["domain_information"] is None
    assert domain_information({"a": Usage([], GROUPS), "b": Usage([], GROUPS)}) == []
