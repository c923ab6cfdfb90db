import pytest
import torch
from routing_builder import make_routing

from himoe.functional.groups import Groups
from himoe.functional.losses import group_measures, inter_dense, intra_group_conditional, log_probabilities

EQUAL, ONE, UNEQUAL = Groups.equal(8, 4), Groups.equal(8, 1), Groups(((0, 3, 5), (1,), (2, 4, 6, 7)))


@pytest.mark.parametrize("groups", [EQUAL, ONE, Groups.equal(8, 8), UNEQUAL])
@pytest.mark.parametrize("scale", [0.0, 1.0, 300.0])  # at 300 the mass of most groups underflows in fp32
@pytest.mark.parametrize("masked", [False, True])
def test_both_measures_are_those_of_the_losses(groups, scale, masked):
    torch.manual_seed(0)
    mask = torch.rand(50) < 0.6 if masked else None
    routing = make_routing(scale * torch.randn(50, 8), torch.zeros(50, 1, dtype=torch.int64), mask=mask)
    log_p = log_probabilities(routing, "raw")
    expected = inter_dense(log_p, routing, groups), intra_group_conditional(log_p, routing, groups)
    assert torch.allclose(torch.stack(group_measures(routing, groups)), torch.stack(expected), rtol=1e-5)


def test_padding_alone_and_no_token_at_all_count_for_nothing():
    padding = make_routing(
        torch.randn(3, 8), torch.zeros(3, 1, dtype=torch.int64), mask=torch.zeros(3, dtype=torch.bool)
    )
    nothing = make_routing(torch.randn(0, 8), torch.zeros(0, 1, dtype=torch.int64))
    for routing in (padding, nothing):
        assert [value.item() for value in group_measures(routing, EQUAL)] == [0, 0]
