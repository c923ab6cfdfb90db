"""Dual ascent: hand-worked moves of both multipliers, clipping, and bounds that nothing can satisfy."""

import pytest
import torch
from free_router import one_step, random_logits, route

from himoe import Groups
from himoe.balance import DualAscent, LossFree, TwoLevelTerms
from himoe.errors import ConfigError

# p = (1/2, 1/4, 1/8, 1/8) in two groups: m = (3/4, 1/4), B = 5/8; C = (5/9, 1/2), A = 19/36.
ONE_TOKEN = torch.tensor([[0.5, 0.25, 0.125, 0.125]]).log()
B, OVERLAP = 5 / 8, 17 / 36


def dual(terms=None, *, epsilon_inter=0.6, epsilon_intra=0.4, **options) -> DualAscent:
    terms = terms or TwoLevelTerms(4, 2, lambda_intra=0.1, lambda_inter=0.2)
    return DualAscent(terms, epsilon_inter=epsilon_inter, epsilon_intra=epsilon_intra, **options)


def test_one_move_worked_by_hand():
    balancer = dual(rate=0.5)
    assert balancer.multipliers.tolist() == pytest.approx([0.1, 0.2])
    one_step(balancer, route(ONE_TOKEN, 1, groups=2))
    assert balancer.multipliers.tolist() == pytest.approx([0.1 + 0.5 * (OVERLAP - 0.4), 0.2 + 0.5 * (B - 0.6)])


def test_a_satisfied_constraint_lowers_its_multiplier():
    balancer = dual(rate=0.5, epsilon_inter=0.7, epsilon_intra=0.5)
    one_step(balancer, route(ONE_TOKEN, 1, groups=2))
    assert balancer.multipliers.tolist() == pytest.approx([0.1 + 0.5 * (OVERLAP - 0.5), 0.2 + 0.5 * (B - 0.7)])


def test_multipliers_stay_between_zero_and_the_maximum():
    violated = dual(rate=100.0, maximum=0.7)
    one_step(violated, route(ONE_TOKEN, 1, groups=2))
    assert violated.multipliers.tolist() == pytest.approx([0.7, 0.7])
    satisfied = dual(rate=100.0, epsilon_inter=0.9, epsilon_intra=0.5)
    one_step(satisfied, route(ONE_TOKEN, 1, groups=2))
    assert satisfied.multipliers.tolist() == [0.0, 0.0]


def test_the_losses_use_the_multipliers_in_force():
    balancer, routing = dual(), route(ONE_TOKEN, 1, groups=2)
    balancer.multipliers.copy_(torch.tensor([3.0, 7.0]))
    found = {name: value.item() for name, value in balancer.losses(routing).items()}
    assert found == pytest.approx({"intra": -3 * (1 - OVERLAP), "inter": 7 * B})


def test_it_starts_as_the_terms_it_steers():
    terms = TwoLevelTerms(8, 4, lambda_intra=0.3, lambda_inter=0.4)
    routing = route(random_logits(0, 9, 8), 1, groups=4)
    started = dual(terms).losses(routing)
    for name, value in terms.losses(routing).items():
        assert started[name].item() == pytest.approx(value.item(), rel=1e-6)


def test_micro_batches_count_by_their_tokens_and_padding_not_at_all():
    logits = random_logits(0, 9, 4)
    mask = torch.arange(9) < 7
    whole, parts = dual(rate=1.0), dual(rate=1.0)
    one_step(whole, route(logits[:7], 1, groups=2))
    one_step(parts, route(logits[:2], 1, groups=2), route(logits[2:], 1, groups=2, mask=mask[2:]))
    assert parts.multipliers.tolist() == pytest.approx(whole.multipliers.tolist(), abs=1e-7)


def test_a_step_without_tokens_moves_nothing():
    balancer = dual(rate=1.0)
    one_step(balancer)
    one_step(balancer, route(ONE_TOKEN, 1, groups=2, mask=torch.tensor([False])))
    assert balancer.multipliers.tolist() == pytest.approx([0.1, 0.2])


def test_reset_returns_to_the_starting_values():
    balancer = dual(rate=0.5)
    one_step(balancer, route(ONE_TOKEN, 1, groups=2))
    balancer.reset_parameters()
    assert balancer.multipliers.tolist() == pytest.approx([0.1, 0.2])


@pytest.mark.parametrize(
    ("intra", "inter", "bounds", "text"),
    [
        # 8 experts in 4 groups: 1/G = 1/4, 1 − 1/S = 1/2, 1 − 1/E = 7/8, one expert per group at least 1/16
        (
            "group_conditional",
            "dense",
            (0.25, 0.3),
            r"epsilon_inter = 0.25 is infeasible for dense: must be above 0.25",
        ),
        ("group_conditional", "dense", (1.01, 0.3), r"epsilon_inter = 1.01 .* at most 1$"),
        ("group_conditional", "dense", (0.3, 0.0), r"epsilon_intra = 0.0 is infeasible .* must be above 0"),
        ("group_conditional", "dense", (0.3, 0.51), r"epsilon_intra = 0.51 .* group_conditional: .* at most 0.5$"),
        ("global", "dense", (0.3, 0.88), r"epsilon_intra = 0.88 .* global: .* at most 0.875$"),
        ("global", "dense", (0.3, 0.6), r"asks for Σp² ≥ 0.4, but dense ≤ epsilon_inter = 0.3 allows at most 0.3"),
        ("global", "selected", (0.0625, 0.5), r"infeasible for selected: must be above 0.0625"),
        ("global", "sparse", (0.06, 0.5), r"infeasible for sparse: must be above 0.0625"),
        ("global", "selected", (0.25, 0.49), r"Σp² ≥ 0.51, but selected ≤ epsilon_inter = 0.25 allows at most 0.5"),
        ("global", "selected", (0.5, 0.29), r"Σp² ≥ 0.71, but selected ≤ epsilon_inter = 0.5 allows at most 0.707107"),
        ("global", "sparse", (0.07, 0.85), r"Σp² ≥ 0.15, but sparse ≤ epsilon_inter = 0.07 allows at most 0.14"),
        ("entropy", "entropy", (0.3, 0.3), "only the l2 forms have bounds"),
        ("group_entropy", "dense", (0.3, 0.3), "only the l2 forms have bounds"),
        ("global", "group_load", (0.3, 0.3), "only the l2 forms have bounds"),
    ],
)
def test_bounds_that_nothing_satisfies_are_refused(intra, inter, bounds, text):
    terms = TwoLevelTerms(8, 4, intra=intra, inter=inter, source="corrected")
    with pytest.raises(ConfigError, match=text):
        dual(terms, epsilon_inter=bounds[0], epsilon_intra=bounds[1])


@pytest.mark.parametrize(
    ("intra", "inter", "bounds"),
    [
        ("group_conditional", "dense", (0.2501, 0.5)),
        ("group_conditional", "dense", (1.0, 0.001)),
        ("global", "dense", (0.3, 0.7)),  # 0.3 + 0.7 = 1: one expert per group, masses with Σm² = 0.3
        ("global", "selected", (0.25, 0.5)),  # two experts of one group share everything: Σp² = 1/2, selected 1/4
        ("global", "selected", (0.5, 0.3)),
        ("global", "sparse", (0.07, 0.86)),
    ],
)
def test_bounds_at_the_edge_of_what_is_possible_are_accepted(intra, inter, bounds):
    terms = TwoLevelTerms(8, 4, intra=intra, inter=inter, source="corrected")
    dual(terms, epsilon_inter=bounds[0], epsilon_intra=bounds[1])


def test_terms_of_two_different_distributions_bound_each_other_not_at_all():
    """With source raw, `selected` still looks at corrected probabilities, which may be far more even."""
    terms = TwoLevelTerms(8, 4, intra="global", inter="selected", source="raw")
    dual(terms, epsilon_inter=0.25, epsilon_intra=0.1)


def test_selected_bounds_hold_for_every_distribution():
    """The inequality behind the refusal: Σp² ≤ min(√B, S·B) for B of one selected expert per group."""
    for intra, inter in (("global", "selected"), ("global", "sparse")):
        terms = TwoLevelTerms(8, 4, intra=intra, inter=inter, source="corrected")
        for seed in range(200):
            logits = random_logits(seed, 1, 8, scale=0.2 + seed / 20)
            found = terms.measures(route(logits, 1 + seed % 2, groups=4))
            assert found["intra"] <= min(found["inter"] ** 0.5, 2 * found["inter"]) + 1e-12


def test_bounds_of_unequal_groups():
    groups = Groups(((0,), (1, 2, 3)))
    terms = TwoLevelTerms(4, groups)
    with pytest.raises(ConfigError, match=r"at most 0.333333"):  # 1 − (1 + 1/3)/2
        dual(terms, epsilon_intra=0.34)
    dual(terms, epsilon_intra=0.33)
    selected = TwoLevelTerms(4, groups, intra="group_conditional", inter="selected")
    with pytest.raises(ConfigError, match=r"must be above 0.1 "):  # 1/(1 + 9), all mass spread as S_g²
        dual(selected, epsilon_inter=0.1, epsilon_intra=0.33)


def test_other_wrong_options():
    with pytest.raises(ConfigError, match="needs two-level terms, got LossFree"):
        dual(LossFree(4))
    with pytest.raises(ConfigError, match="rate = -1 must be ≥ 0"):
        dual(rate=-1)
    with pytest.raises(ConfigError, match="maximum = 0 above 0"):
        dual(maximum=0)


def test_ascent_finds_a_weight_that_satisfies_the_constraint():
    """Free logits that start on one group: λ_inter grows until Σm² falls to its bound."""
    logits = torch.zeros(8, 8, dtype=torch.float64)
    logits[:, :2] = 3.0
    logits.requires_grad_()
    terms = TwoLevelTerms(8, 4, lambda_intra=0.0, lambda_inter=0.0)
    balancer = DualAscent(terms, epsilon_inter=0.4, epsilon_intra=0.5, rate=0.05)
    for _ in range(150):
        routing = route(logits, 1, groups=4)
        (grad,) = torch.autograd.grad(balancer.losses(routing)["inter"], logits)
        with torch.no_grad():
            logits -= 10 * grad
        one_step(balancer, routing)
    assert terms.measures(route(logits, 1, groups=4))["inter"] < 0.41
