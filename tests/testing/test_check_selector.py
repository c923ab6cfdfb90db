"""Every selector of the table passes its suite, and every kind of broken one is named for what it breaks."""

import inspect
from functools import partial

import pytest
import torch
from broken_selectors import BROKEN, E, sound

from himoe import registry
from himoe.functional.groups import Groups
from himoe.functional.selection import (
    expert_choice,
    hash_tokens,
    replay,
    sinkhorn,
    threshold,
    top_k,
    top_k_in_best_groups,
    top_k_per_group,
    top_p,
)
from himoe.presets.st_moe import top_k_at_random
from himoe.testing import check_selector

GIVEN = torch.randint(5, (1009, 3), generator=torch.Generator().manual_seed(0)) + torch.tensor([[0, 5, 10]])


def replayed(scores, context):
    """Experts per word, since the suite calls with many numbers of tokens."""
    ids = context.token_ids % 1009
    return replay(scores, context, expert_ids=GIVEN[ids], selected=GIVEN[ids] % 2 == 0)


@pytest.mark.parametrize("name", registry.SELECTORS)
def test_every_entry_of_the_table_conforms_with_its_defaults(name):
    if name == "replay":
        check_selector(replayed, num_experts=15)
        return
    selector = registry.load("selectors", name)
    for num_experts, groups, k in ((8, 4, 1), (12, 3, 3), (5, 1, 5)):
        layer = {"groups": Groups.equal(num_experts, groups), "k": k}
        needed = {key: value for key, value in layer.items() if key in inspect.signature(selector).parameters}
        if name == "top_k_per_group" or k * groups <= num_experts or "groups" not in needed:
            check_selector(partial(selector, **needed), num_experts=num_experts)


@pytest.mark.parametrize(
    "selector",
    [
        partial(top_k, k=8),
        partial(top_k_per_group, groups=Groups(((0, 3, 5), (1,), (2, 4, 6, 7))), k=(2, 1, 1)),
        partial(top_k_in_best_groups, groups=Groups.equal(8, 4), k=3, keep=3),
        partial(top_p, p=0.9, max_k=3),
        partial(top_p, p=1.0),
        partial(threshold, threshold=0.2),
        partial(threshold, threshold=-2.0, max_k=2),
        partial(expert_choice, k=2, capacity_factor=1.3, max_k=3),
        partial(expert_choice, k=1, capacity_factor=0.1),
        partial(expert_choice, k=8),
        partial(sinkhorn, k=2, iterations=1),
        partial(hash_tokens, k=8, seed=3),
    ],
    ids=lambda selector: f"{selector.func.__name__} {selector.keywords}",
)
def test_options_conform(selector):
    check_selector(selector, num_experts=8)


def test_the_selector_that_the_broken_ones_break_is_sound():
    check_selector(sound, num_experts=E)


def test_a_selector_that_says_that_it_draws_is_sound():
    check_selector(partial(top_k_at_random, k=3, threshold=0.4))


def test_a_selector_that_needs_sequences_is_offered_them():
    def by_sequence(scores, context):
        rows, length = context.batch_shape
        return sound(scores.view(rows, length, E).flatten(0, 1), context)

    check_selector(by_sequence, num_experts=E, batch_dims=2)
    with pytest.raises(AssertionError, match="not enough values to unpack"):
        check_selector(by_sequence, num_experts=E)


@pytest.mark.parametrize("broken", BROKEN, ids=lambda broken: broken.__name__)
def test_a_broken_selector_is_caught_and_named(broken):
    with pytest.raises(AssertionError) as caught:
        check_selector(broken, num_experts=E)
    assert str(caught.value).startswith(f"{broken.__name__}: ")
    assert BROKEN[broken] in str(caught.value)


def test_what_a_selector_says_of_itself_is_read_through_partial():
    def ahead(scores, context, *, k):
        return top_k(scores.flip(0), context, k=k)

    ahead.causal = False
    with pytest.raises(AssertionError, match="padding changed"):
        check_selector(partial(ahead, k=2))
    ahead.causal = True
    with pytest.raises(AssertionError, match="padding changed"):
        check_selector(partial(ahead, k=2))
