"""Every loss formula against a table worked by hand, then the identities that tie the formulas together.

The table: E = 4, groups {0, 1} and {2, 3}, two tokens with
    p₁ = (1/2, 1/4, 1/8, 1/8)    m = (3/4, 1/4)    q = (2/3, 1/3), (1/2, 1/2)    C = 5/9, 1/2
    p₂ = (1/4, 1/4, 1/4, 1/4)    m = (1/2, 1/2)    q = (1/2, 1/2), (1/2, 1/2)    C = 1/2, 1/2
and the selections {0, 1} and {1, 3}.
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from routing_builder import make_routing

from himoe.functional import losses
from himoe.functional.groups import Groups
from himoe.functional.losses import INTER, INTRA, load_balance, log_probabilities, z_loss

LN2, LN3 = math.log(2), math.log(3)
P = torch.tensor([[1 / 2, 1 / 4, 1 / 8, 1 / 8], [1 / 4, 1 / 4, 1 / 4, 1 / 4]], dtype=torch.float64)
SELECTED = [[0, 1], [1, 3]]
EQUAL, GENERAL = Groups.equal(4, 2), Groups([[1, 0], [3, 2]])

MEASURES = {f"intra {n}": f for n, f in INTRA.items()} | {f"inter {n}": f for n, f in INTER.items()}
TABLE = {
    "intra global": (11 / 32 + 1 / 4) / 2,  # Σp² = 16/64 + 4/64 + 1/64 + 1/64, and 4·1/16
    "intra group_conditional": ((5 / 9 + 1 / 2) / 2 + 1 / 2) / 2,
    "intra entropy": -(7 / 4 * LN2 + 2 * LN2) / 2,  # H(p₁) = 1/2·1 + 1/4·2 + 2·1/8·3 bits
    "intra group_entropy": -((LN3 - 2 / 3 * LN2 + LN2) / 2 + LN2) / 2,  # H(2/3, 1/3) = ln 3 − 2/3·ln 2
    "inter dense": (9 / 16 + 1 / 16 + 1 / 2) / 2,
    "inter sparse": ((3 / 4) ** 2 + 2 * (1 / 4) ** 2) / 2,  # token 1 has both choices in one group
    "inter selected": (1 / 4 + 1 / 16 + 2 / 16) / 2,
    "inter entropy": -(2 * LN2 - 3 / 4 * LN3 + LN2) / 2,  # H(3/4, 1/4) = 2 ln 2 − 3/4·ln 3
    "inter group_load": 2 * (1 / 8) ** 2,  # mean mass (5/8, 3/8)
}


def table_routing(**options):
    return make_routing(P.log(), SELECTED, **options)


def padded_table_routing():
    logits = torch.cat([P.log()[:1], torch.tensor([[9.0, -3.0, 2.0, 7.0]], dtype=torch.float64), P.log()[1:]])
    return make_routing(logits, [SELECTED[0], [2, 0], SELECTED[1]], mask=[True, False, True])


def random_routing(seed, tokens=5, num_experts=6, k=3, scale=3.0, **options):
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(tokens, num_experts, dtype=torch.float64, generator=generator)
    return make_routing(logits, logits.topk(k).indices, **options)


def test_the_table_is_complete():
    assert TABLE.keys() == MEASURES.keys()


@pytest.mark.parametrize("groups", [EQUAL, GENERAL])
@pytest.mark.parametrize("make", [table_routing, padded_table_routing])
@pytest.mark.parametrize("source", ["raw", "corrected"])
@pytest.mark.parametrize("name", TABLE)
def test_two_level_terms_by_hand(name, source, make, groups):
    routing = make()
    value = MEASURES[name](log_probabilities(routing, source), routing, groups)
    assert value.item() == pytest.approx(TABLE[name], abs=1e-14)


@pytest.mark.parametrize("make", [table_routing, padded_table_routing])
def test_load_balance_by_hand(make):
    # counts 1, 2, 0, 1 of 4 pairs · P = (3/8, 1/4, 3/16, 3/16) · 4·(1/4·3/8 + 1/2·1/4 + 1/4·3/16) = 17/16
    assert load_balance(make()).item() == pytest.approx(17 / 16, abs=1e-14)


def test_load_balance_counts_choices_before_drops():
    kept = [[True, False], [False, True]]
    assert load_balance(table_routing(kept=kept)).item() == pytest.approx(17 / 16, abs=1e-14)


def test_z_loss_by_hand():
    shifts = torch.tensor([[1.0], [-2.0]], dtype=torch.float64)
    assert z_loss(make_routing(P.log() + shifts, SELECTED)).item() == pytest.approx((1 + 4) / 2)
    masked = make_routing(P.log() + shifts, SELECTED, mask=[False, True])
    assert z_loss(masked).item() == pytest.approx(4)


def test_unequal_groups_by_hand():
    # groups {0} and {3, 1, 2}: m₁ = (1/2, 1/2), C = 1 and (1/4 + 1/16 + 1/16)/1 = 3/8 of q = (1/2, 1/4, 1/4);
    # m₂ = (1/4, 3/4), C = 1 and 1/3
    groups, routing = Groups([[0], [3, 1, 2]]), table_routing()
    log_p = log_probabilities(routing, "raw")
    conditional = ((1 + 3 / 8) / 2 + (1 + 1 / 3) / 2) / 2
    dense = (1 / 2 + (1 / 4) ** 2 + (3 / 4) ** 2) / 2
    assert losses.intra_group_conditional(log_p, routing, groups).item() == pytest.approx(conditional)
    assert losses.inter_dense(log_p, routing, groups).item() == pytest.approx(dense)


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_load_balance_is_1_at_perfect_balance(score, k, dtype):
    first = torch.tensor([2.0, 1.5, 0.7, -0.4, -1.0, -2.5], dtype=dtype)
    logits = torch.stack([first.roll(t) for t in range(6)])
    scores = logits.softmax(-1) if score == "softmax" else logits.sigmoid()
    routing = make_routing(logits, scores.topk(k).indices, scores=scores)
    tolerance = 1e-6 if dtype == torch.float32 else 1e-14
    for source in ("raw", "corrected"):
        assert load_balance(routing, source).item() == pytest.approx(1, abs=tolerance)


def test_load_balance_at_its_worst_is_e_over_k():
    logits = torch.tensor([[50.0, 50.0, 0.0, 0.0, 0.0, 0.0]]).repeat(7, 1)
    assert load_balance(make_routing(logits, [[0, 1]] * 7)).item() == pytest.approx(6 / 2)


def test_only_probabilities_carry_the_gradient_of_load_balance():
    routing = random_routing(0)
    logits = routing.logits.requires_grad_()
    (grad,) = torch.autograd.grad(load_balance(routing, "raw"), logits)
    counts = torch.bincount(routing.expert_ids.flatten(), minlength=6)
    f, p = counts / counts.sum(), logits.softmax(-1)
    by_hand = 6 / 5 * p * (f - (f * p).sum(-1, keepdim=True))  # d/dlogits of E·Σ f·mean p
    torch.testing.assert_close(grad, by_hand)


def test_sigmoid_scores_become_a_distribution_before_they_are_averaged():
    scores = torch.tensor([[0.9, 0.3], [0.1, 0.1]], dtype=torch.float64)
    routing = make_routing(scores.logit(), [[0], [1]], scores=scores)
    by_hand = scores / scores.sum(-1, keepdim=True)  # (3/4, 1/4), (1/2, 1/2)
    torch.testing.assert_close(log_probabilities(routing, "corrected").exp(), by_hand)


def test_corrected_probabilities_survive_scores_of_zero():
    scores = torch.tensor([[1.0, 0.0, 0.0]], requires_grad=True)
    routing = make_routing(torch.tensor([[0.0, -200.0, -300.0]]), [[0]], scores=scores)
    value = log_probabilities(routing, "corrected").exp().square().sum()
    (grad,) = torch.autograd.grad(value, scores)
    assert value.item() == 1 and grad.isfinite().all()


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 1000), st.sampled_from([1, 2, 3, 6]), st.floats(0.01, 8))
def test_identities_between_the_measures(seed, num_groups, scale):
    routing, groups = random_routing(seed, scale=scale), Groups.equal(6, num_groups)
    log_p = log_probabilities(routing, "raw")
    p = log_p.exp()
    mass = groups.sum(p)
    share = p / groups.expand(mass)
    concentration = groups.sum(share**2)
    one = {n: f(log_p, routing, groups).item() for n, f in INTRA.items()}
    two = {n: f(log_p, routing, groups).item() for n, f in INTER.items()}
    assert one["global"] == pytest.approx((mass**2 * concentration).sum(-1).mean().item(), rel=1e-9)
    share_entropy = -groups.sum(torch.special.xlogy(share, share))
    assert -one["entropy"] == pytest.approx(-two["entropy"] + (mass * share_entropy).sum(-1).mean().item(), rel=1e-9)
    slack, size = 1e-12, 6 // num_groups
    assert 1 / 6 - slack <= one["global"] <= 1 + slack
    assert 1 / size - slack <= one["group_conditional"] <= 1 + slack
    assert 1 / num_groups - slack <= two["dense"] <= 1 + slack
    assert -slack <= two["group_load"] <= 1 - 1 / num_groups + slack
    assert -math.log(size) - slack <= one["group_entropy"] <= slack
    assert two["selected"] <= two["sparse"] + slack <= two["dense"] + 2 * slack


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 1000), st.sampled_from([(2, 2), (4, 1), (2, 1), (1, 3)]))
def test_theorem_4_1_holds_for_normalised_weights(seed, shape):
    num_groups, per_group = shape
    groups = Groups.equal(8, num_groups)
    generator = torch.Generator().manual_seed(seed)
    p = torch.randn(6, 8, dtype=torch.float64, generator=generator).mul(2).softmax(-1)
    best = p.unflatten(-1, (num_groups, -1)).topk(per_group).indices
    chosen = torch.zeros(6, num_groups, 8 // num_groups, dtype=torch.float64).scatter(-1, best, 1.0).flatten(-2) * p
    normalised = chosen / chosen.sum(-1, keepdim=True)
    r = groups.sum(normalised)
    left, middle = r.mean(0).square().sum(), r.square().sum(-1).mean()
    right = per_group * normalised.square().sum(-1).mean()
    assert left <= middle + 1e-12 and middle <= right + 1e-12


@pytest.mark.parametrize("name", MEASURES)
def test_a_constant_added_to_all_logits_changes_nothing(name):
    routing = random_routing(3)
    moved = make_routing(routing.logits + 5, routing.expert_ids)
    groups = Groups([[5, 0, 2], [1, 3], [4]])
    one, other = (MEASURES[name](log_probabilities(r, "raw"), r, groups).item() for r in (routing, moved))
    assert one == pytest.approx(other, rel=1e-12)


@pytest.mark.parametrize("groups", [EQUAL, GENERAL])
@pytest.mark.parametrize("source", ["raw", "corrected"])
@pytest.mark.parametrize("forms", [INTRA, INTER])
def test_a_group_whose_mass_underflows_stays_finite(groups, source, forms):
    logits = torch.tensor([[0.0, 1.0, -1000.0, -1001.0], [200.0, -200.0, 0.0, 0.0]], requires_grad=True)
    routing = make_routing(logits, [[0, 1], [0, 2]])
    for name, measure in forms.items():
        value = measure(log_probabilities(routing, source), routing, groups)
        (grad,) = torch.autograd.grad(value, logits, retain_graph=True)
        assert value.isfinite() and grad.isfinite().all(), name


def test_shares_inside_a_group_without_mass_are_still_right():
    logits = torch.tensor([[0.0, 0.0, -1000.0, -1001.0]])
    routing = make_routing(logits, [[0]])
    q = 1 / (1 + math.exp(-1))
    conditional = (1 / 2 + q**2 + (1 - q) ** 2) / 2
    value = losses.intra_group_conditional(log_probabilities(routing, "raw"), routing, EQUAL)
    assert value.item() == pytest.approx(conditional, abs=1e-4)  # log p = −1000 has four decimals in fp32


def test_a_batch_of_padding_alone_costs_nothing():
    routing = make_routing(P.log(), SELECTED, mask=[False, False])
    log_p = log_probabilities(routing, "raw")
    values = [f(log_p, routing, EQUAL) for f in (*INTRA.values(), *INTER.values())]
    values += [load_balance(routing), z_loss(routing)]
    assert [v.item() for v in values] == [0.0] * len(values)
