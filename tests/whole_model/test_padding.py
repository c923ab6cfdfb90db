"""Padding changes no loss term, count, bias, correction, capacity place or gradient; of a whole model."""

import pytest
import torch
from router_zoo import V, capacity, loss_of, make_model, same, state_of, token_ids

import himoe
from himoe.functional import stats
from himoe.functional.dispatch import ORDERS

pytestmark = pytest.mark.filterwarnings("ignore::himoe.errors.HimoeWarning")
DISPATCHERS = {"dropless": None, **{order: capacity(order) for order in sorted(ORDERS)}}


def step_with(model, ids, mask):
    """Loss, gradients, loads, drops, then the state after two steps."""
    loss, routings = loss_of(model, ids, mask)
    loss.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    for _ in range(2):
        himoe.observe(model, routings)
        himoe.step(model)
    loads = {f"{i}": stats.load(r) for i, r in enumerate(routings)}
    chosen = {f"{i}": stats.selected_load(r) for i, r in enumerate(routings)}
    return loss.detach(), grads, loads, chosen, state_of(model), loss_of(model, ids, mask)[0].detach()


@pytest.mark.parametrize("dispatcher", DISPATCHERS)
def test_padding_changes_nothing(dispatcher):
    ids = token_ids(2, 9)
    short = torch.ones(2, 9, dtype=torch.bool)
    short[1, 6:] = False  # the second text is shorter
    padding = token_ids(2, 7, seed=5)
    longer = torch.cat([short, torch.zeros(2, 7, dtype=torch.bool)], dim=1)
    results = [
        step_with(make_model("everything", dispatcher=DISPATCHERS[dispatcher]), x, mask)
        for x, mask in ((ids, short), (torch.cat([ids, padding], dim=1), longer))
    ]
    (loss, grads, loads, chosen, state, after), (loss_p, grads_p, loads_p, chosen_p, state_p, after_p) = results
    assert torch.allclose(loss, loss_p, atol=1e-9) and torch.allclose(after, after_p, atol=1e-9)
    assert same(grads, grads_p, 1e-9)
    assert same(loads, loads_p) and same(chosen, chosen_p)
    assert same(state, state_p, 1e-6)
    if dispatcher != "dropless":
        assert sum(loads["0"]) < sum(chosen["0"])  # capacity did drop


@pytest.mark.parametrize("dispatcher", DISPATCHERS)
def test_what_stands_in_the_padding_does_not_matter(dispatcher):
    mask = torch.arange(12).expand(2, -1) < torch.tensor([[9], [4]])
    outcomes = []
    for filler in (0, V - 1):
        ids = token_ids(2, 12).masked_fill(~mask, filler)
        outcomes.append(step_with(make_model("everything", dispatcher=DISPATCHERS[dispatcher]), ids, mask))
    (loss, grads, *_, state, after), (loss_p, grads_p, *_, state_p, after_p) = outcomes
    assert torch.equal(loss, loss_p) and torch.allclose(after, after_p, atol=1e-12)
    assert same(state, state_p, 1e-7)
    assert same(grads, grads_p, 1e-12)


def test_a_text_that_ends_early_has_the_places_of_its_own_tokens():
    """Capacity counts real tokens: 8 of them among 20 leave as many places as 8 without padding."""
    moe = make_model("switch", dispatcher=capacity()).blocks[0].feed_forward
    x = torch.randn(20, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    scattered = torch.zeros(20, dtype=torch.bool)
    scattered[[1, 2, 5, 8, 11, 12, 17, 19]] = True
    y, padded = moe(x, scattered)
    y_alone, alone = moe(x[scattered])
    assert torch.equal(padded.kept[scattered], alone.kept)
    assert not padded.kept[~scattered].any() and not padded.selected[~scattered].any()
    assert not alone.kept.all()
    assert torch.allclose(y[scattered], y_alone, atol=1e-12)
    assert y[~scattered].abs().max() == 0
