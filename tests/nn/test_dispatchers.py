"""Dropless and Capacity: who is computed, who is dropped, and who may influence whom."""

import math

import pytest
import torch
from small_layers import E, make_moe, tokens

from himoe import Capacity, Dropless
from himoe.errors import ConfigError
from himoe.functional import reference, stats
from himoe.functional.dispatch import ORDERS

NOT_CAUSAL = [name for name, order in ORDERS.items() if not order.causal]


def test_dropless_keeps_everything_and_says_so():
    _, routing = make_moe(dispatcher=Dropless())(tokens(40))
    assert routing.kept.all() and stats.drop_rate(routing).item() == 0


@pytest.mark.parametrize("backend", ["loop", "grouped"])
def test_dropless_output_does_not_depend_on_the_rest_of_the_batch(backend):
    moe = make_moe(backend=backend)
    batch, others = tokens(8, 6), tokens(8, 6, seed=1) * 4
    together = moe(batch)[0]
    for i in range(8):
        alone = moe(batch[i : i + 1])[0][0]
        torch.testing.assert_close(together[i], alone)
        company = others.clone()
        company[i] = batch[i]
        torch.testing.assert_close(moe(company)[0][i], alone)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("factor", [8.0, 1e30, math.inf])
def test_a_capacity_without_limit_is_dropless(order, factor):
    x = tokens(30)
    y, routing = make_moe("switch", top_k=2, dispatcher=Capacity(factor, order=order))(x)
    expected, same = make_moe("switch", top_k=2)(x)
    assert torch.equal(y, expected) and torch.equal(routing.kept, same.kept)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("factor", "multiple"), [(0.5, 1), (1.0, 1), (0.8, 3), (0.01, 1)])
def test_capacity_keeps_who_comes_first(order, masked, factor, multiple):
    moe = make_moe("switch", top_k=2, dispatcher=Capacity(factor, order=order, multiple=multiple))
    mask = torch.rand(40, generator=torch.Generator().manual_seed(0)) < 0.7 if masked else None
    _, routing = moe(tokens(40), mask)
    real = 40 if mask is None else int(mask.sum())
    places = max(1, math.ceil(math.floor(2 * factor * real / E) / multiple) * multiple)
    expected = reference.keep_within_capacity(routing.expert_ids, routing.selected, routing.weights, places, order)
    assert torch.equal(routing.kept, expected)
    assert stats.load(routing).max() <= places < stats.selected_load(routing).max()
    assert stats.drop_rate(routing).item() == pytest.approx(1 - expected.sum().item() / (2 * real))


def test_weights_are_not_renormalised_after_a_drop():
    x = tokens(40)
    y, routing = make_moe("switch", top_k=2, dispatcher=Capacity(0.7))(x)
    moe = make_moe("switch", top_k=2)
    whole = moe(x)[1]
    assert torch.equal(routing.weights, whole.weights)
    arguments = (moe.experts.gate_up_proj, moe.experts.down_proj, "swiglu")
    torch.testing.assert_close(y, reference.moe(x, whole.expert_ids, whole.weights, routing.kept, *arguments))
    empty = ~routing.kept.any(-1)
    assert empty.any() and not y[empty].any()


def test_a_dropped_pair_trains_neither_its_expert_nor_its_weight():
    moe = make_moe("switch", top_k=1, renormalize=False, dispatcher=Capacity(0.01))
    with torch.no_grad():
        moe.router.gate.weight.zero_()[3] = 1.0
    x = tokens(6).abs().requires_grad_()
    y, routing = moe(x)
    y.sum().backward()
    assert routing.kept.sum() == 1 and routing.kept[0].all()
    assert x.grad[0].any() and not x.grad[1:].any()
    assert [e for e in range(E) if moe.experts.down_proj.grad[e].any()] == [3]


@pytest.mark.parametrize("order", ORDERS)
def test_dropped_pairs_cost_no_product(order, monkeypatch):
    rows, product = [], torch.mm

    def spy(left, right, **options):
        rows.append(left.shape[0])
        return product(left, right, **options)

    monkeypatch.setattr(torch, "mm", spy)
    _, routing = make_moe("switch", top_k=2, backend="loop", dispatcher=Capacity(0.5, order=order))(tokens(40))
    assert 0 < routing.kept.sum() < routing.selected.sum()
    assert sum(rows) == 2 * routing.kept.sum()  # up and down, one row of each for a kept pair


def kept_before(moe, change_at, seed):
    x, later = tokens(24), tokens(24, seed=seed) * 3
    changed = torch.cat([x[:change_at], later[change_at:]])
    return moe(x)[1].kept[:change_at], moe(changed)[1].kept[:change_at]


def test_later_tokens_take_no_place_from_earlier_ones():
    moe = make_moe("switch", top_k=2, dispatcher=Capacity(0.6))
    assert moe.dispatcher.causal
    for seed in range(1, 20):
        one, other = kept_before(moe, 12, seed)
        assert torch.equal(one, other)


@pytest.mark.parametrize("order", NOT_CAUSAL)
def test_in_other_orders_they_do_and_it_is_labelled(order):
    moe = make_moe("switch", top_k=2, dispatcher=Capacity(0.6, order=order))
    assert not moe.dispatcher.causal
    assert any(not torch.equal(*kept_before(moe, 12, seed)) for seed in range(1, 20))


def test_column_order_is_token_order_where_each_expert_has_one_column():
    x = tokens(40)
    orders = ("token_major", "column_major")
    kept = [make_moe("hi_moe", dispatcher=Capacity(0.6, order=order))(x)[1].kept for order in orders]
    assert torch.equal(*kept) and not kept[0].all()


def test_by_score_the_pairs_that_an_expert_keeps_weigh_more_than_those_it_drops():
    _, routing = make_moe("switch", top_k=2, dispatcher=Capacity(0.5, order="score"))(tokens(40))
    for e in range(E):
        of_expert = routing.expert_ids == e
        kept, dropped = (routing.weights[of_expert & which] for which in (routing.kept, ~routing.kept))
        assert not len(dropped) or kept.min() >= dropped.max()


def test_batch_prioritised_with_one_choice_is_by_score():
    x = tokens(40)
    kept = [
        make_moe("switch", top_k=1, renormalize=False, dispatcher=Capacity(0.5, order=order))(x)[1].kept
        for order in ("score", "batch_prioritised")
    ]
    assert torch.equal(*kept) and not kept[0].all()


@pytest.mark.parametrize("order", ORDERS)
def test_padding_takes_no_place_and_moves_nobody(order):
    moe = make_moe("switch", top_k=2, dispatcher=Capacity(0.6, order=order))
    x, mask = tokens(20), torch.arange(50) % 5 < 2
    padded = tokens(50, seed=3) * 9
    padded[mask] = x
    y, routing = moe(x)
    padded_y, with_padding = moe(padded, mask)
    assert torch.equal(with_padding.kept[mask], routing.kept) and not routing.kept.all()
    torch.testing.assert_close(padded_y[mask], y)
    assert not with_padding.kept[~mask].any() and not padded_y[~mask].any()
    assert torch.equal(stats.drop_rate(with_padding), stats.drop_rate(routing))


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((0,), {}, "factor = 0 must be above 0"),
        ((-1.0,), {}, "factor = -1.0 must be above 0"),
        ((math.nan,), {}, "factor = nan must be above 0"),
        ((1.0,), {"multiple": 0}, "multiple = 0 at least 1"),
        (
            (1.0,),
            {"order": "row_major"},
            "order = 'row_major' must be token_major or column_major or score or batch_prioritised",
        ),
    ],
)
def test_capacity_refuses_what_cannot_work(arguments, options, message):
    with pytest.raises(ConfigError, match=message):
        Capacity(*arguments, **options)


@pytest.mark.parametrize("order", ORDERS)
def test_in_eval_nothing_is_dropped_so_a_token_is_what_it_is_alone(order):
    moe, x = make_moe("switch", top_k=2, dispatcher=Capacity(0.5, order=order)), tokens(30)
    _, training = moe(x)
    assert stats.drop_rate(training) > 0
    y, routing = moe.eval()(x)
    assert torch.equal(routing.kept, routing.selected)
    torch.testing.assert_close(torch.cat([moe(token)[0] for token in x.split(1)]), y)
    moe.dispatcher = Capacity(0.5, order=order, drop_in_eval=True)
    assert torch.equal(moe(x)[1].kept, training.kept)
