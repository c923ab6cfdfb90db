"""What each loss is worth at perfect balance, for every K and score function, and that imbalance costs more."""

import dataclasses
import math

import pytest
import torch
from strategies import WITH_LOSSES, E, build, look
from torch import Tensor

from himoe import Balancer, Routing, registry

WEIGHT = 0.3
# As the strategies' files say. The value of a newer one is worked out in its own test; here it must be one value.
CONSTANT = {
    "switch": WEIGHT,
    "sequence": WEIGHT,
    "global_batch": WEIGHT,
    "importance": 0.0,
    "load": 0.0,
    "phi": WEIGHT * (1 - math.log(E)),
    "similarity": 0.0,
}
CLAIMING = [name for name in WITH_LOSSES if registry.load("balancers", name).balances_load]


def wheel(row: Tensor) -> Tensor:
    """Every expert twice in every place, once behind and once before the other one of its pair."""
    turned = torch.stack([row.roll(turn) for turn in range(len(row))])
    return torch.cat([turned, turned.view(len(row), -1, 2).flip(-1).flatten(1)])


def balanced(k: int, score: str, sequences: int = 2, dtype: torch.dtype = torch.float64) -> Routing:
    """Loads, mean probabilities, summed weights, all equal; the gate's rows are orthogonal."""
    row = torch.tensor([2.0, 1.5, 0.7, -0.4, -1.0, -1.2, -1.9, -2.5], dtype=dtype)
    noise = torch.tensor([0.3, -0.2, 0.9, 0.1, -0.8, 0.6, 0.0, -0.5], dtype=dtype)
    std = torch.tensor([0.5, 0.6, 0.7, 0.4, 0.8, 0.9, 1.0, 0.3], dtype=dtype)
    x, noise, std = (wheel(values).repeat(sequences, 1) for values in (row, noise, std))
    routing = look(torch.eye(E, dtype=dtype), x, k, noise=noise, std=std, score=score)
    return routing.replace(context=dataclasses.replace(routing.context, batch_shape=(sequences, 2 * E)))


def value(balancer: Balancer, routing: Routing) -> float:
    (found,) = balancer.losses(routing).values()
    return found.item()


@pytest.mark.parametrize("score", sorted(registry.SCORES))
@pytest.mark.parametrize("k", range(1, E + 1))
@pytest.mark.parametrize("name", sorted({*CLAIMING, *CONSTANT}))
def test_constant_at_perfect_balance(name, k, score):
    for dtype in (torch.float32, torch.float64):
        exact = dtype == torch.float64 and name != "phi"  # whose state is fp32
        routing = balanced(k, score, dtype=dtype)
        for source in ("raw", "corrected"):
            balancer = build(name, weight=WEIGHT, source=source)
            expected = CONSTANT[name] if name in CONSTANT else value(balancer, balanced(1, "softmax"))
            assert value(balancer, routing) == pytest.approx(expected, abs=1e-12 if exact else 1e-6)


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("k", [1, 2, 5])
@pytest.mark.parametrize("name", sorted(set(CONSTANT) - {"phi"}))
def test_a_collapsed_router_costs_more(name, k, score):
    """All tokens want the same experts: E/K − 1 for a CV², E/K for E·Σ f P where P is all on the selected."""
    row = torch.where(torch.arange(E) < k, 60.0, -60.0).double()
    weight = torch.zeros(E, 3, dtype=torch.float64)
    weight[:, 0] = row  # the gate's rows lie on one line
    x = torch.tensor([[1.0, 0.0, 0.0]], dtype=torch.float64).expand(6, 3)
    routing = look(weight, x, k, noise=torch.zeros(6, E).double(), score=score)
    found = value(build(name, weight=WEIGHT), routing)
    expected = {"importance": E / k - 1, "load": E / k - 1, "similarity": E * E - E}.get(name, E / k)
    assert found == pytest.approx(WEIGHT * expected, rel=1e-6)


def test_the_constant_of_phi_asks_nothing_of_the_batch():
    row = torch.where(torch.arange(E) < 1, 9.0, 0.0).double()
    routing = look(torch.eye(E).double(), row.expand(5, E))
    assert value(build("phi", weight=WEIGHT), routing) == pytest.approx(CONSTANT["phi"], abs=1e-6)
