import math

import pytest
import torch
from free_router import route

from himoe.balance.local_entropy import LocalEntropy
from himoe.errors import ConfigError
from himoe.testing import check_balancer


def loss(logits: list[list[float]], **options) -> float:
    routing = route(torch.tensor(logits, dtype=torch.float64), 1)
    return LocalEntropy(weight=0.5, **options).losses(routing)["local_entropy"].item()


def test_worked_by_hand():
    even, quarter = [0.0, 0.0], [math.log(3), 0.0]  # p = ½, ½ and ¾, ¼
    assert loss([even]) == pytest.approx(0.5 * math.log(2))
    of_quarter = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert loss([even, quarter]) == pytest.approx(0.25 * (math.log(2) + of_quarter))
    assert loss([[0.0, -1e4], [-1e4, 0.0]]) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("source", ["raw", "corrected"])
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_conforms(source, score):
    check_balancer(lambda: LocalEntropy(weight=0.1, source=source), score=score)


def test_options_that_do_not_fit_are_refused():
    for options in ({"weight": -1.0}, {"weight": math.inf}, {"source": "both"}):
        with pytest.raises(ConfigError, match="local_entropy: weight = "):
            LocalEntropy(**options)
