"""Guards: coefficients known to fail are named with their numbers, warned of or refused."""

import math
import warnings
from functools import partial

import pytest
import torch

from himoe import presets
from himoe.balance import (
    Chain,
    DualAscent,
    ExpertThreshold,
    GlobalBatch,
    Importance,
    LossFree,
    Momentum,
    PerGroup,
    Phi,
    Quantile,
    Schedule,
    SequenceBalance,
    Switch,
    TwoLevelTerms,
)
from himoe.build import build_model
from himoe.config import load_config
from himoe.errors import ConfigError, GuardError, HimoeWarning
from himoe.functional.groups import Groups
from himoe.functional.scores import sigmoid, softmax
from himoe.presets.guards import score_spread

E, G, K = 16, 4, 4  # S/k' = 4


def build(**options):
    return presets.hi_moe(6, E, K, num_groups=G, **options)


def check(*parts, force=False, score=None):
    presets.check_guards(Chain(*parts), top_k=K, force=force, score=score)


def silent(action) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        action()


@pytest.mark.parametrize("form", [("global", "dense"), ("entropy", "entropy")])
def test_global_and_entropy_forms_need_more_inter_than_intra(form):
    intra, inter = form
    for value in (0.0, 0.05, 0.1):
        text = f"{intra} intra with {inter} inter: lambda_inter = {value:g} ≤ lambda_intra = 0.1 rewards putting all"
        with pytest.warns(HimoeWarning, match=text):
            build(intra=intra, inter=inter, lambda_intra=0.1, lambda_inter=value)
    silent(lambda: build(intra=intra, inter=inter, lambda_intra=0.1, lambda_inter=0.11))


def test_global_with_selected_needs_s_over_k_times_as_much():
    text = r"lambda_inter = 0.39 < \(S/k'\)·lambda_intra = 0.4 rewards putting all"
    with pytest.warns(HimoeWarning, match=text):
        build(intra="global", inter="selected", lambda_intra=0.1, lambda_inter=0.39)
    silent(lambda: build(intra="global", inter="selected", lambda_intra=0.1, lambda_inter=0.4))


def test_published_coefficients_warn():
    for preset in (presets.hi_moe_paper, presets.hi_moe_official):
        with pytest.warns(HimoeWarning, match="all of a token's mass on one group"):
            preset(6, E, K, num_groups=G)


def test_the_recommended_defaults_and_their_sweep_pass():
    for lambda_intra in (0.003, 0.01, 0.025):
        for lambda_inter in (0.0, 0.01, 0.05):
            silent(lambda a=lambda_intra, b=lambda_inter: build(lambda_intra=a, lambda_inter=b))


@pytest.mark.parametrize("alpha", [0.001, 0.004, 0.01, 0.02, 0.03, 0.04, 0.08, 0.1])
def test_group_conditional_is_refused_above_two_and_a_half_times_alpha(alpha):
    silent(lambda: build(lambda_intra=2.5 * alpha, alpha=alpha))
    with pytest.raises(GuardError, match=r"> 2.5: one expert per group would take everything") as caught:
        build(lambda_intra=2.6 * alpha, alpha=alpha)
    assert f"lambda_intra/alpha = {2.6 * alpha:g}/{alpha:g} = 2.6" in str(caught.value)
    assert "force" in str(caught.value) and "\n" not in str(caught.value)


def test_group_conditional_without_load_balancing_is_refused():
    with pytest.raises(GuardError, match=r"lambda_intra = 0.01 without any load-balancing part"):
        build(alpha=0.0)
    with pytest.raises(GuardError, match="without any load-balancing part"):
        check(TwoLevelTerms(E, G))
    silent(lambda: build(alpha=0.0, lambda_intra=0.0))


def test_force_turns_the_refusal_into_a_warning():
    with pytest.warns(HimoeWarning, match="lambda_intra/alpha = 0.1/0.01 = 10 > 2.5"):
        build(lambda_intra=0.1, force=True)
    with pytest.warns(HimoeWarning, match="without any load-balancing part"):
        build(alpha=0.0, force=True)


def test_other_parts_that_balance_count():
    silent(lambda: check(TwoLevelTerms(E, G), LossFree(E)))
    silent(lambda: check(Chain(TwoLevelTerms(E, G)), Chain(Switch(weight=0.002), Switch(weight=0.003))))
    with pytest.raises(GuardError, match=r"0.01/0.003 = 3.33333"):
        check(TwoLevelTerms(E, G), Switch(weight=0.003))


def test_balancing_that_a_schedule_ends_does_not_count_unless_the_terms_end_with_it():
    def ending(*parts):
        return Schedule(Chain(*parts), "off_after", steps=5)

    for part in (Switch(weight=0.01), LossFree(E)):
        silent(lambda part=part: check(TwoLevelTerms(E, G), part))
        with pytest.raises(GuardError, match="without any load-balancing part"):
            check(TwoLevelTerms(E, G), ending(part))
    other = Schedule(Chain(LossFree(E), Switch(weight=0.01)), "off_after", steps=5, scales="moves")
    silent(lambda: check(TwoLevelTerms(E, G), other))  # the loss goes on
    longer = Schedule(Switch(weight=0.01), "off_after", steps=9)
    silent(lambda: check(ending(TwoLevelTerms(E, G)), longer))
    only = Schedule(Chain(TwoLevelTerms(E, G), Switch(weight=0.01)), "off_after", steps=5, only=("load_balance",))
    with pytest.raises(GuardError, match="without any load-balancing part"):
        check(only)
    silent(lambda: check(ending(TwoLevelTerms(E, G), Switch(weight=0.01))))
    silent(lambda: check(ending(TwoLevelTerms(E, G)), Switch(weight=0.01)))


@pytest.mark.parametrize("kind", ["warmup", "two_stage"])
def test_balancing_that_comes_later_than_the_terms_does_not_count(kind):
    for part in (Switch(weight=0.01), LossFree(E)):
        with pytest.raises(GuardError, match="without any load-balancing part"):
            check(TwoLevelTerms(E, G), Schedule(part, kind, steps=5))
    silent(lambda: check(Schedule(Chain(TwoLevelTerms(E, G), Switch(weight=0.01)), kind, steps=5)))
    silent(lambda: check(Schedule(TwoLevelTerms(E, G), kind, steps=5, only=("intra",)), Switch(weight=0.01)))


def test_the_terms_of_every_group_add_up():
    groups = Groups.equal(E, G)
    parts = [TwoLevelTerms(E // G, 2, lambda_intra=0.01) for _ in range(G)]
    with pytest.raises(GuardError, match=r"0.04/0.01 = 4 > 2.5"):
        check(PerGroup(groups, parts), Switch(weight=0.01))


def test_dual_ascent_can_reach_what_the_terms_do_not_start_with():
    with pytest.warns(HimoeWarning, match="lambda_inter = 0 ≤ lambda_intra = 0.025"):
        build(intra="global", lambda_inter=0.02, epsilon_intra=0.7, epsilon_inter=0.5)


def test_terms_inside_other_balancers_are_found():
    for wrapped in (
        Schedule(TwoLevelTerms(E, G), "warmup", steps=5),
        DualAscent(TwoLevelTerms(E, G), epsilon_inter=0.3, epsilon_intra=0.5),
    ):
        with pytest.raises(GuardError, match="without any load-balancing part"):
            check(wrapped)


def test_other_forms_are_not_refused():
    silent(lambda: check(TwoLevelTerms(E, G, intra="global", inter="dense", lambda_intra=0.01, lambda_inter=0.02)))


def step(balancer, score, num_experts):
    """Check one balancer's step against the scores."""
    presets.check_guards(balancer, top_k=K, score=score, num_experts=num_experts)


def test_the_spread_of_scores_is_what_theory_says():
    """softmax(z)_e ≈ e^z/(E·e^½) for many experts: deviation √(e − 1)/E. E[σ(z)²] − ¼ = 0.0434 for the sigmoid."""
    for num_experts in (256, 2048):
        mean, deviation = score_spread(softmax, num_experts)
        assert mean == pytest.approx(1 / num_experts)
        assert deviation == pytest.approx(math.sqrt(math.e - 1) / num_experts, rel=0.05)
    mean, deviation = score_spread(sigmoid, 256)
    assert (mean, deviation) == (pytest.approx(0.5, abs=0.005), pytest.approx(0.2083, rel=0.01))
    assert score_spread(sigmoid, 256) == (mean, deviation)  # the same numbers again


def test_a_step_beside_softmax_scores():
    text = (
        r"LossFree: the bias moves by 0.001 a step, 0.395 times the spread 0.00253 of softmax scores over 512 experts "
        r".*use a rate below 0.00063, or scores that lie further apart, such as sigmoid"
    )
    with pytest.warns(HimoeWarning, match=text):
        step(LossFree(512), softmax, 512)
    for num_experts in (2, 8, 64, 256):
        silent(lambda e=num_experts: step(LossFree(e), softmax, e))
    silent(lambda: step(LossFree(512, rate=6e-4), softmax, 512))


@pytest.mark.parametrize("num_experts", [2, 8, 64, 512, 4096])
def test_a_usual_step_beside_sigmoid_scores_is_small_for_every_number_of_experts(num_experts):
    silent(lambda: step(LossFree(num_experts), sigmoid, num_experts))
    with pytest.warns(HimoeWarning, match=r"LossFree: the bias moves by 0.1 a step, .* of sigmoid scores"):
        step(LossFree(num_experts, rate=0.1), sigmoid, num_experts)


@pytest.mark.parametrize(
    "balancer",
    [
        *(LossFree(512, update=update) for update in ("sign", "proportional", "rms")),
        LossFree(512, centred=True),
        Momentum(512, rate=1e-3),
        Schedule(LossFree(512), "off_after", steps=5, scales="moves"),
        PerGroup(Groups.equal(512, 8), [LossFree(64) for _ in range(8)]),
    ],
    ids=lambda balancer: f"{type(balancer).__name__}-{getattr(balancer, 'update', '')}",
)
def test_every_controller_with_a_rate_is_judged_wherever_it_stands(balancer):
    with pytest.warns(HimoeWarning, match="the bias moves by 0.001 a step, 0.395 times"):
        step(balancer, softmax, 512)
    silent(lambda: step(balancer, sigmoid, 512))


def test_a_multiplicative_step_counts_against_the_relative_spread():
    silent(lambda: step(LossFree(512, multiplicative=True), softmax, 512))
    with pytest.warns(HimoeWarning, match=r"0.5 a step, .* times the spread relative to their mean 1.3 of softmax"):
        step(LossFree(512, multiplicative=True, rate=0.5), softmax, 512)


def test_the_advice_fits_the_scores():
    with pytest.warns(HimoeWarning, match="such as sigmoid"):
        step(LossFree(64, rate=0.5), softmax, 64)
    with pytest.warns(HimoeWarning, match=r"use a rate below 0.05\d?$"):
        step(LossFree(64, rate=0.5), sigmoid, 64)


def test_what_has_no_rate_or_no_score_is_not_judged():
    silent(lambda: step(Chain(Quantile(512, 8), ExpertThreshold(512, 8), LossFree(512, rate=0.0)), softmax, 512))
    silent(lambda: check(LossFree(512, rate=5.0)))
    with pytest.raises(ConfigError, match="score needs num_experts"):
        check(LossFree(512), score=softmax)


def narrow(logits, width):
    """Scores of any spread."""
    return 0.5 + width * logits.tanh()


def test_other_scores_are_judged_by_their_own_spread_also_through_partial():
    with pytest.warns(HimoeWarning, match="of narrow scores over 16 experts"):
        step(LossFree(16), partial(narrow, width=1e-3), 16)
    silent(lambda: step(LossFree(16), partial(narrow, width=1e-2), 16))


def test_random_scores_are_judged_alike_every_time_and_leave_random_numbers_alone():
    before = torch.get_rng_state()
    spreads = [score_spread(lambda logits: logits.sigmoid() + torch.rand_like(logits), 16) for _ in range(2)]
    assert spreads[0] == spreads[1] and spreads[0][1] > 0.3
    assert torch.equal(before, torch.get_rng_state())


def test_one_expert_leaves_nothing_to_decide_and_equal_scores_everything():
    silent(lambda: step(LossFree(1, rate=1.0), softmax, 1))
    with pytest.warns(HimoeWarning, match="of narrow scores"):
        step(LossFree(4), partial(narrow, width=0.0), 4)


def test_presets_and_configurations_are_judged():
    with pytest.warns(HimoeWarning, match=r"LossFree: .* of sigmoid scores over 8 experts"):
        presets.loss_free(6, 8, 2, rate=0.2)
    with pytest.warns(HimoeWarning, match=r"LossFree: .* of sigmoid scores over 16 experts"):
        presets.deepseek_v3(6, 16, 2, rate=0.2)
    silent(lambda: presets.loss_free(6, 8, 2))
    silent(lambda: presets.deepseek_v3(6, 16, 2))
    for extra in ('moe.balancers=[{name="momentum", rate=0.2}]', 'moe.balancers=[{name="loss_free", rate=0.2}]'):
        for router in ("moe.preset=moge", "moe.selector=top_k"):
            with pytest.warns(HimoeWarning, match=r"the bias moves by 0.2 a step, .* of softmax scores"):
                build_model(load_config("lm_tiny", sets=[router, extra]), 257)


def test_controllers_count_as_load_balancing_beside_two_level_terms():
    for controller in (Quantile(E, K), Momentum(E)):
        silent(lambda part=controller: check(TwoLevelTerms(E, G), part))
    for nothing in (Momentum(E, rate=0.0), LossFree(E, rate=0.0)):
        with pytest.raises(GuardError, match="without any load-balancing part"):
            check(TwoLevelTerms(E, G), nothing)


@pytest.mark.parametrize("kind", [GlobalBatch, SequenceBalance, partial(Phi, E)])
def test_losses_that_pull_as_switch_does_count_with_their_weight(kind):
    silent(lambda: check(TwoLevelTerms(E, G, lambda_intra=0.01), kind(weight=0.01)))
    with pytest.raises(GuardError, match=r"lambda_intra/alpha = 0.01/0.002 = 5 > 2.5"):
        check(TwoLevelTerms(E, G, lambda_intra=0.01), kind(weight=0.002))


def test_of_other_losses_that_balance_no_ratio_is_known():
    silent(lambda: check(TwoLevelTerms(E, G), Importance(weight=0.1)))
    with pytest.raises(GuardError, match="without any load-balancing part"):
        check(TwoLevelTerms(E, G), Importance(weight=0.0))
