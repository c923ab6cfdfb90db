"""The example of a third party's balancer: its formula by hand, the contract, and that it balances."""

import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from himoe import Gate, Router
from himoe.balance import step_balancers
from himoe.errors import ConfigError
from himoe.functional.scores import sigmoid
from himoe.functional.selection import top_k
from himoe.functional.stats import max_vio, selected_load
from himoe.testing import check_balancer

sys.path.append(str(Path(__file__).parents[2] / "examples"))

from third_party.annealed import AnnealedBias


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("num_groups", [None, 2])
def test_the_contract(score, num_groups):
    check_balancer(lambda: AnnealedBias(8, rate=0.1), score=score, num_groups=num_groups)


def test_moves_worked_by_hand():
    """Counts 7, 1, 0, 0 with mean 2: deficits −2.5, 0.5, 1, 1 of the mean, the first clipped to −1."""
    balancer = AnnealedBias(4, rate=0.5, half=3)
    for rate in (0.5, 0.5 / (4 / 3) ** 0.5, 0.5 / (5 / 3) ** 0.5):
        before = balancer.bias.clone()
        balancer.sums = {"counts": torch.tensor([7, 1, 0, 0])}
        step_balancers([balancer])
        expected = rate * torch.tensor([-1.0, 0.5, 1.0, 1.0])
        assert torch.allclose(balancer.bias - before, expected, atol=1e-6)
    balancer.step()  # nothing was seen
    assert torch.equal(balancer.num_steps, torch.tensor(4)) and balancer.bias[0] == balancer.bias.min()


def test_it_evens_out_a_skewed_gate_and_comes_to_rest():
    torch.manual_seed(0)
    balancer = AnnealedBias(8, rate=0.05)
    router = Router(Gate(6, 8), partial(top_k, k=2), num_experts=8, score=sigmoid, balancer=balancer)
    with torch.no_grad():
        router.gate.weight[:, 0] += torch.linspace(1.5, -1.5, 8)
        found, moves = [], []
        for _ in range(400):
            x = torch.randn(512, 6)
            x[:, 0] = 1.0
            routing = router(x)
            found.append(max_vio(selected_load(routing)).item())
            before = balancer.bias.clone()
            balancer.observe(routing)
            step_balancers([balancer])
            moves.append((balancer.bias - before).abs().max().item())
    assert max(found[-20:]) < 0.5 * found[0]
    assert max(moves[-20:]) < 0.2 * max(moves[:20])


@pytest.mark.parametrize("options", [{"rate": -1.0}, {"half": 0}])
def test_options_that_cannot_work(options):
    with pytest.raises(ConfigError, match=r"^annealed: rate = .* must be ≥ 0 and half = "):
        AnnealedBias(4, **options)
