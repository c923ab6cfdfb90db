import math

import pytest
import torch

from himoe.bench.right import complaint, errors, worst_row


def test_one_wrong_expert_among_hundreds_is_seen():
    right = torch.randn(300, 4, 4)
    given = right.clone()
    given[7] *= 1.01
    assert worst_row(given, right) == pytest.approx(0.01, rel=1e-3)


def test_an_expert_with_few_tokens_is_measured_by_its_own_size():
    right = torch.ones(10, 5)
    right[3] = 0.01
    given = right.clone()
    given[3] *= 1.5
    assert worst_row(given, right) == pytest.approx(0.5, rel=1e-5)


def test_an_expert_without_tokens_must_have_no_gradient():
    right = torch.ones(4, 5)
    right[2] = 0
    given = right.clone()
    assert worst_row(given, right) == 0
    given[2] = 1e-3
    assert worst_row(given, right) > 0.5


def test_zero_is_right_where_everything_is_zero():
    assert worst_row(torch.zeros(3, 2), torch.zeros(3, 2)) == 0
    assert worst_row(torch.ones(3, 2), torch.zeros(3, 2)) > 1


@pytest.mark.parametrize("given", [torch.full((2, 2), math.nan), torch.ones(3, 2), torch.full((2, 2), math.inf)])
def test_what_is_not_finite_or_of_another_shape_is_infinitely_wrong(given):
    assert worst_row(given, torch.ones(2, 2)) == math.inf


def test_a_missing_gradient_is_wrong_and_named():
    found = errors({"y": torch.ones(2, 2)}, {"y": torch.ones(2, 2), "x": torch.ones(2, 2)})
    assert found == {"y": 0.0, "x": math.inf}
    assert complaint(found, "fp32") == "relative error of x inf; at most 2e-05 is rounding"
    assert complaint({"y": 0.01}, "bf16") is None and complaint({"y": 0.01}, "fp32")
