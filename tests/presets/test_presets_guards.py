"""Guards: coefficients known to fail are named with their numbers, warned of or refused."""

import warnings

import pytest

from himoe import presets
from himoe.balance import Chain, DualAscent, LossFree, Schedule, Switch, TwoLevelTerms
from himoe.errors import GuardError, HimoeWarning
from himoe.functional.scores import sigmoid, softmax

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


def test_terms_inside_other_balancers_are_found():
    for wrapped in (
        Schedule(TwoLevelTerms(E, G), "warmup", steps=5),
        DualAscent(TwoLevelTerms(E, G), epsilon_inter=0.3, epsilon_intra=0.5),
    ):
        with pytest.raises(GuardError, match="without any load-balancing part"):
            check(wrapped)


def test_other_forms_are_not_refused():
    silent(lambda: check(TwoLevelTerms(E, G, intra="global", inter="dense", lambda_intra=0.01, lambda_inter=0.02)))


def test_a_loss_free_rate_beside_softmax_scores():
    """A softmax score is 1/E on average: u = 1e-3 is half of it at E = 512."""
    with pytest.warns(HimoeWarning, match=r"rate = 0.001 is 0.512 times the mean softmax score 1/512"):
        check(LossFree(512), score=softmax)
    silent(lambda: check(LossFree(256), score=softmax))
    silent(lambda: check(LossFree(512, rate=1e-4), score=softmax))
    silent(lambda: check(LossFree(512), score=sigmoid))
    silent(lambda: check(LossFree(512, multiplicative=True), score=softmax))
    silent(lambda: check(LossFree(512)))
