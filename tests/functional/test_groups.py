"""The partition of experts into groups: what is refused, and that both paths of the sums agree with plain loops."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from himoe import Groups
from himoe.errors import ConfigError


def random_partition(num_experts, num_groups, seed):
    generator = torch.Generator().manual_seed(seed)
    experts = torch.randperm(num_experts, generator=generator).tolist()
    cuts = sorted((torch.randperm(num_experts - 1, generator=generator)[: num_groups - 1] + 1).tolist())
    return Groups(tuple(tuple(experts[a:b]) for a, b in itertools.pairwise([0, *cuts, num_experts])))


def test_equal_groups_are_contiguous():
    groups = Groups.equal(6, 3)
    assert groups.members == ((0, 1), (2, 3), (4, 5))
    assert (groups.num_experts, groups.num_groups, groups.sizes) == (6, 3, (2, 2, 2))
    assert groups.group_of == (0, 0, 1, 1, 2, 2)
    assert groups.is_equal


def test_explicit_groups_may_be_unequal_and_in_any_order():
    groups = Groups([[3, 0], [1], [4, 2, 5]])
    assert (groups.num_experts, groups.num_groups, groups.sizes) == (6, 3, (2, 1, 3))
    assert groups.group_of == (0, 1, 2, 0, 2, 2)
    assert not groups.is_equal


@pytest.mark.parametrize("members", [[[0, 1], [2, 3]], [[0], [1], [2]], [[0, 1, 2]]])
def test_a_list_of_contiguous_equal_groups_takes_the_fast_path(members):
    assert Groups(members).is_equal
    assert Groups(members) == Groups.equal(sum(map(len, members)), len(members))


@pytest.mark.parametrize("members", [[[1, 0], [2, 3]], [[2, 3], [0, 1]], [[0, 1, 2], [3]], [[0, 2], [1, 3]]])
def test_any_other_list_does_not(members):
    assert not Groups(members).is_equal


@pytest.mark.parametrize("members", [[], [[]], [[0], []], [[0, 0]], [[0, 1], [1, 2]], [[1, 2]], [[0], [2]], [[-1, 0]]])
def test_what_is_no_partition_is_refused(members):
    with pytest.raises(ConfigError, match="every expert 0 … E-1 must stand in exactly one group"):
        Groups(members)


@pytest.mark.parametrize(("num_experts", "num_groups"), [(8, 3), (8, 0), (8, -2), (2, 4)])
def test_groups_that_do_not_divide_are_refused(num_experts, num_groups):
    with pytest.raises(ConfigError, match=f"num_groups = {num_groups} must divide num_experts = {num_experts}"):
        Groups.equal(num_experts, num_groups)


def test_of_takes_a_number_a_list_or_groups():
    assert Groups.of(2, 4) == Groups.of([[0, 1], [2, 3]], 4) == Groups.of(Groups.equal(4, 2), 4)
    with pytest.raises(ConfigError, match="groups name 4 experts, the layer has num_experts = 6"):
        Groups.of([[0, 1], [2, 3]], 6)


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 9), st.integers(1, 4), st.integers(0, 1000), st.booleans())
def test_sums_over_groups_are_the_plain_loops(num_experts, num_groups, seed, equal):
    num_groups = min(num_groups, num_experts)
    if equal:
        groups = Groups.equal(num_experts * num_groups, num_groups)
    else:
        groups = random_partition(num_experts, num_groups, seed)
    values = torch.randn(2, 3, groups.num_experts, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    by_hand = torch.stack([sum(values[..., e] for e in group) for group in groups.members], dim=-1)
    torch.testing.assert_close(groups.sum(values), by_hand)
    torch.testing.assert_close(groups.log_sum(values), groups.sum(values.exp()).log())
    torch.testing.assert_close(groups.shares(values), values.exp() / groups.expand(groups.sum(values.exp())))
    squares = groups.shares(values).square()
    torch.testing.assert_close(groups.concentration(values), groups.sum(squares))
    expanded = groups.expand(by_hand)
    for g, group in enumerate(groups.members):
        for e in group:
            assert torch.equal(expanded[..., e], by_hand[..., g])


def test_fast_and_general_path_agree_with_gradients():
    equal, general = Groups.equal(6, 2), Groups([[2, 1, 0], [5, 4, 3]])
    assert equal.is_equal and not general.is_equal
    values = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    for name in ("sum", "log_sum", "shares"):
        one, other = getattr(equal, name)(values), getattr(general, name)(values)
        torch.testing.assert_close(one, other)
        upstream = torch.randn_like(one)
        torch.testing.assert_close(
            *(torch.autograd.grad(y, values, upstream)[0] for y in (one, other)),
        )


@pytest.mark.parametrize("members", [[[0, 1], [2, 3]], [[3, 0], [2, 1]]])
def test_log_sums_and_shares_are_finite_where_the_sum_underflows(members):
    groups = Groups(members)
    values = torch.full((1, 4), -1000.0)
    torch.testing.assert_close(groups.log_sum(values), torch.full((1, 2), -1000.0 + 0.693147))
    torch.testing.assert_close(groups.shares(values), torch.full((1, 4), 0.5))


def test_groups_are_values():
    assert len({Groups.equal(4, 2), Groups([[0, 1], [2, 3]]), Groups([[1, 0], [2, 3]])}) == 2
