import math

import pytest
import torch
from free_router import route

from himoe.balance.global_entropy import GlobalEntropy
from himoe.errors import ConfigError
from himoe.testing import check_balancer


def loss(logits: list[list[float]], **options) -> float:
    routing = route(torch.tensor(logits, dtype=torch.float64), 1)
    return GlobalEntropy(weight=0.5, **options).losses(routing)["global_entropy"].item()


def test_worked_by_hand():
    three_quarters = [math.log(3), 0.0]  # p = ¾, ¼
    lack = math.log(2) + 0.75 * math.log(0.75) + 0.25 * math.log(0.25)
    assert loss([three_quarters]) == pytest.approx(0.5 * lack)
    assert loss([three_quarters, three_quarters[::-1]]) == pytest.approx(0, abs=1e-12)  # together they are even
    assert loss([three_quarters], experts=1.1) == 0  # as many as 1.1 experts it has
    assert loss([three_quarters], experts=1.9) == pytest.approx(0.5 * (lack - math.log(2) + math.log(1.9)))
    assert loss([[0.0, -1e4]] * 3) == pytest.approx(0.5 * math.log(2))  # one expert has everything


@pytest.mark.parametrize("options", [{}, {"source": "raw"}, {"experts": 3.5}], ids=str)
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_conforms(options, score):
    check_balancer(lambda: GlobalEntropy(weight=0.1, **options), score=score)


def test_options_that_do_not_fit_are_refused():
    for options in ({"weight": -1.0}, {"weight": math.inf}, {"source": "both"}, {"experts": 0.5}, {"experts": 0.0}):
        with pytest.raises(ConfigError, match="global_entropy: weight = "):
            GlobalEntropy(**options)
