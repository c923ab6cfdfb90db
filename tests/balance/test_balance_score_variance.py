import math

import pytest
import torch
from free_router import route

from himoe.balance.score_variance import ScoreVariance
from himoe.errors import ConfigError
from himoe.testing import check_balancer


def loss(logits: list[list[float]], **options) -> float:
    routing = route(torch.tensor(logits, dtype=torch.float64), 1)
    return ScoreVariance(weight=0.5, **options).losses(routing)["score_variance"].item()


def test_worked_by_hand():
    much, little = [math.log(3), 0.0], [0.0, math.log(3)]  # p = ¾, ¼ and ¼, ¾: ¼ from the mean of ½ each
    assert loss([much, little]) == pytest.approx(-0.5 / 16)
    assert loss([much, much, little]) == pytest.approx(-0.5 / 18)  # the mean is 7/12: (2·1/36 + 1/9) / 3
    assert loss([much, much]) == pytest.approx(0, abs=1e-15)
    assert loss([[0.0, -1e4], [-1e4, 0.0]]) == pytest.approx(-0.5 / 4)  # the lowest that two experts can have


@pytest.mark.parametrize("source", ["raw", "corrected"])
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_conforms(source, score):
    check_balancer(lambda: ScoreVariance(weight=0.1, source=source), score=score)


def test_options_that_do_not_fit_are_refused():
    for options in ({"weight": -1.0}, {"weight": math.inf}, {"source": "both"}):
        with pytest.raises(ConfigError, match="score_variance: weight = "):
            ScoreVariance(**options)
