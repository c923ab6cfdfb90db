"""What each preset is made of, its published coefficients in our conventions, and where options go."""

import pytest
import torch

from himoe import Groups, Router, presets
from himoe.balance import LogitCorrection, LossFree, Schedule, Switch, TwoLevelTerms, ZLoss, step_balancers
from himoe.errors import ConfigError
from himoe.functional import scores

D, E, G = 6, 16, 4
published = pytest.mark.filterwarnings("ignore::himoe.errors.HimoeWarning")


def part(router: Router, kind: type):
    """The one part of a kind."""
    (found,) = [module for module in router.balancer.modules() if isinstance(module, kind)]
    return found


def kinds(router: Router) -> list[str]:
    return [type(module).__name__ for module in router.balancer.parts]


def tokens(seed: int = 0, count: int = 20):
    return torch.randn(count, D, generator=torch.Generator().manual_seed(seed))


@published
@pytest.mark.parametrize(
    ("preset", "alpha", "lambdas", "forms", "weights", "mean"),
    [
        (presets.hi_moe, 0.01, (0.01, 0.01), ("group_conditional", "dense", "raw"), (True, False), "previous"),
        (presets.hi_moe_paper, 0.08, (0.1, 0.05), ("global", "selected", "corrected"), (False, False), "same_batch"),
        (presets.hi_moe_official, 0.08, (0.1, 0.05), ("global", "dense", "raw"), (True, True), "same_batch"),
    ],
)
def test_the_three_forms_of_hi_moe(preset, alpha, lambdas, forms, weights, mean):
    router = preset(D, E, 8, num_groups=G)
    assert kinds(router) == ["LogitCorrection", "TwoLevelTerms", "Switch"]
    terms, switch, correction = part(router, TwoLevelTerms), part(router, Switch), part(router, LogitCorrection)
    assert (switch.weight, switch.source) == (pytest.approx(alpha), "raw")
    assert (terms.lambda_intra, terms.lambda_inter) == lambdas
    assert (terms.intra, terms.inter, terms.source) == forms
    assert (router.renormalize, router.expert_scale is not None) == weights
    assert (correction.mean_from, correction.tau, correction.beta, correction.temperature) == (mean, 0.01, 0.9, 1.0)
    assert terms.groups == Groups.equal(E, G)
    assert router.score is scores.softmax and router.scaling_factor == 1
    assert router(tokens()).expert_ids.shape == (20, 8)


@published
@pytest.mark.parametrize("top_k", [4, 8, [1, 2, 3, 4]])
@pytest.mark.parametrize("preset", [presets.hi_moe_paper, presets.hi_moe_official, presets.moge])
def test_published_alpha_counts_f_with_sum_k_so_ours_is_k_times_it(preset, top_k):
    total = top_k if isinstance(top_k, int) else sum(top_k)
    router = preset(D, E, top_k, num_groups=G)
    assert part(router, Switch).weight == pytest.approx(0.01 * total)
    routing = router(tokens())
    p = routing.logits.softmax(-1)
    f = torch.bincount(routing.expert_ids.flatten(), minlength=E) / len(p)  # sums to K
    authors = 0.01 * E * (f * p.mean(0)).sum()
    assert router.balancer.losses(routing)["load_balance"].item() == pytest.approx(authors.item(), rel=1e-5)


def test_published_weights_are_the_raw_softmax_of_the_selected():
    with pytest.warns(UserWarning, match="one group"):
        router = presets.hi_moe_paper(D, E, 4, num_groups=G, tau=0.0)
    routing = router.eval()(tokens())
    assert torch.allclose(routing.weights, routing.logits.softmax(-1).gather(1, routing.expert_ids))
    assert routing.weights.sum(-1).max() < 0.99


@published
def test_options_reach_their_part():
    router = presets.hi_moe_official(
        D, E, 4, num_groups=G, alpha=0.5, lambda_intra=0.2, lambda_inter=0.3, intra="entropy", inter="entropy",
        source="corrected", correction="previous", tau=0.4, beta=0.5, temperature=0.6, renormalize=False,
        expert_scale=False, z_loss=0.7,
    )  # fmt: skip
    terms, correction = part(router, TwoLevelTerms), part(router, LogitCorrection)
    assert (part(router, Switch).weight, part(router, ZLoss).weight) == (0.5, 0.7)
    assert (terms.lambda_intra, terms.lambda_inter) == (0.2, 0.3)
    assert (terms.intra, terms.inter, terms.source) == ("entropy", "entropy", "corrected")
    assert (correction.mean_from, correction.tau, correction.beta, correction.temperature) == (
        "previous",
        0.4,
        0.5,
        0.6,
    )
    assert not router.renormalize and router.expert_scale is None


def test_without_the_correction_the_temperature_is_not_applied_either():
    router = presets.hi_moe(D, E, 4, num_groups=G, correction="none", temperature=0.1, tau=5.0)
    assert kinds(router) == ["TwoLevelTerms", "Switch"]
    routing = router(tokens())
    assert torch.equal(routing.scores, routing.logits.softmax(-1))


def test_every_group_gets_exactly_its_share_of_pairs():
    routing = presets.hi_moe(D, E, 8, num_groups=G)(tokens())
    assert torch.bincount(routing.expert_ids.flatten() // 4, minlength=G).tolist() == [40] * G


def test_unequal_groups_with_their_own_k():
    groups = [[0, 5, 7], [1], [2, 3, 4, 6]]
    for preset in (presets.hi_moe, presets.moge):
        router = preset(D, 8, [2, 1, 3], groups=groups)
        routing = router(tokens())
        assert routing.expert_ids.shape == (20, 6)
        of = torch.tensor(Groups(tuple(map(tuple, groups))).group_of)
        assert of[routing.expert_ids].tolist() == [[0, 0, 1, 2, 2, 2]] * 20
        assert all(len(set(row)) == 6 for row in routing.expert_ids.tolist())
    assert part(presets.hi_moe(D, 8, [2, 1, 3], groups=groups), TwoLevelTerms).groups.members == (
        (0, 5, 7),
        (1,),
        (2, 3, 4, 6),
    )


def test_explicit_equal_groups_route_as_the_fast_path_does():
    torch.manual_seed(0)
    fast = presets.hi_moe(D, E, 8, num_groups=G)
    slow = presets.hi_moe(D, E, [2] * G, groups=[[3, 2, 1, 0], [4, 5, 6, 7], [8, 9, 10, 11], [12, 13, 14, 15]])
    slow.gate.load_state_dict(fast.gate.state_dict())
    one, other = fast(tokens()), slow(tokens())
    assert torch.equal(one.expert_ids.sort(-1).values, other.expert_ids.sort(-1).values)
    terms, terms_slow = fast.balancer.losses(one), slow.balancer.losses(other)
    assert {k: v.item() for k, v in terms.items()} == pytest.approx(
        {k: v.item() for k, v in terms_slow.items()}, rel=1e-5
    )


def test_schedules_scale_the_intra_term_alone():
    plain = presets.hi_moe(D, E, 4, num_groups=G)
    torch.manual_seed(0)
    for kind, factors in (("warmup", [0, 0.5, 1, 1]), ("two_stage", [0, 0, 1, 1])):
        router = presets.hi_moe(D, E, 4, num_groups=G, schedule=kind, schedule_steps=2)
        assert kinds(router) == ["LogitCorrection", "Schedule", "Switch"]
        assert part(router, Schedule).only == ("intra",)
        for factor in factors:
            routing = router(tokens())
            found, whole = router.balancer.losses(routing), plain.balancer.losses(routing)
            assert found["intra"].item() == pytest.approx(factor * whole["intra"].item())
            assert found["inter"].item() == whole["inter"].item()
            assert found["load_balance"].item() == whole["load_balance"].item()
            step_balancers([router.balancer])


def test_the_two_stages_of_the_review_can_be_spelled_out():
    router = presets.hi_moe(
        D, E, 4, num_groups=G, intra="group_entropy", inter="group_load", schedule="two_stage", schedule_steps=1
    )
    routing = router(tokens())
    first = router.balancer.losses(routing)
    m = Groups.equal(E, G).sum(routing.logits.softmax(-1)).mean(0)
    assert first["intra"].item() == 0
    assert first["inter"].item() == pytest.approx(0.01 * (m - 1 / G).square().sum().item(), rel=1e-4)
    step_balancers([router.balancer])
    assert router.balancer.losses(routing)["intra"].item() > 0  # +λ·H: decisiveness is rewarded


def test_moge_is_grouped_selection_with_the_load_term():
    router = presets.moge(D, E, 8, num_groups=G)
    assert kinds(router) == ["Switch"] and router.renormalize and router.expert_scale is None
    assert part(presets.moge(D, E, 8, num_groups=G, alpha=0.3), Switch).weight == 0.3
    assert not presets.moge(D, E, 8, num_groups=G, renormalize=False).renormalize
    routing = router(tokens())
    assert torch.bincount(routing.expert_ids.flatten() // 4, minlength=G).tolist() == [40] * G


def test_switch_is_top_k_with_the_load_term():
    router = presets.switch(D, E)
    assert kinds(router) == ["Switch"] and part(router, Switch).weight == 0.01
    routing = router(tokens())
    assert routing.expert_ids.shape == (20, 1)
    assert torch.allclose(routing.weights[:, 0], routing.logits.softmax(-1).amax(-1))  # one weight is not renormalised
    several = presets.switch(D, E, 4, alpha=0.2, z_loss=0.1)
    assert kinds(several) == ["Switch", "ZLoss"]
    assert torch.allclose(several(tokens()).weights.sum(-1), torch.ones(()))
    assert presets.switch(D, E, 1, renormalize=True).renormalize


def test_loss_free_is_sigmoid_top_k_with_a_bias():
    router = presets.loss_free(D, E, 4)
    assert isinstance(router.balancer, LossFree) and router.balancer.rate == 1e-3
    assert (router.balancer.update, router.balancer.centred, router.balancer.multiplicative) == ("sign", False, False)
    assert router.score is scores.sigmoid and router.renormalize
    routing = router(tokens())
    assert router.balancer.losses(routing) == {}
    other = presets.loss_free(D, E, 4, rate=0.05, update="rms", centred=True, multiplicative=True, renormalize=False)
    assert (other.balancer.rate, other.balancer.update, other.balancer.centred) == (0.05, "rms", True)
    assert other.balancer.multiplicative and not other.renormalize


@pytest.mark.parametrize("preset", [presets.switch, presets.loss_free])
def test_one_expert_per_token_still_trains_the_gate_from_the_task(preset):
    router = preset(D, E, 1)
    router(tokens()).weights.sum().backward()
    assert router.gate.weight.grad.abs().max() > 1e-4


@pytest.mark.parametrize("preset", [presets.hi_moe, presets.moge])
@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"top_k": 6, "num_groups": 4}, "top_k = 6 must be a positive multiple of num_groups = 4, or a list"),
        ({"top_k": 0, "num_groups": 4}, "top_k = 0 must be a positive multiple"),
        ({"top_k": 20, "num_groups": 4}, r"top_k per group \(5, 5, 5, 5\): must be between 1 and the group's size"),
        ({"top_k": [1, 2], "num_groups": 4}, r"top_k per group \(1, 2\): .* sizes \(4, 4, 4, 4\)"),
        ({"top_k": [1, 2, 0, 1], "num_groups": 4}, r"top_k per group \(1, 2, 0, 1\)"),
        ({"top_k": 4, "num_groups": 3}, "num_groups = 3 must divide num_experts = 16"),
        ({"top_k": 4}, "give num_groups, or an explicit list of groups: one of the two"),
        ({"top_k": 4, "num_groups": 4, "groups": [[0]]}, "one of the two"),
        ({"top_k": 2, "groups": [[0, 1], [1, 2]]}, "every expert 0 … E-1 must stand in exactly one group"),
        ({"top_k": 2, "groups": [[0, 1], [2]]}, "groups name 3 experts, the layer has num_experts = 16"),
        ({"top_k": 2, "groups": [list(range(16)), []]}, "no group be empty"),
    ],
)
def test_numbers_that_do_not_fit(preset, options, text):
    with pytest.raises(ConfigError, match=text):
        preset(D, E, **options)


@pytest.mark.parametrize("preset", [presets.switch, presets.loss_free])
@pytest.mark.parametrize("top_k", [0, 17])
def test_flat_presets_check_k(preset, top_k):
    with pytest.raises(ConfigError, match=f"top_k = {top_k} must be between 1 and num_experts = 16"):
        preset(D, E, top_k)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"schedule": "cosine"}, "schedule = 'cosine' must be joint, warmup or two_stage"),
        ({"schedule": "two_stage"}, "schedule = 'two_stage' needs schedule_steps ≥ 1"),
        ({"correction": "next"}, "mean_from = 'next' must be previous or same_batch"),
        ({"intra": "l2"}, "intra = 'l2' must be one of"),
        ({"alpha": -1}, "weight = -1 must be ≥ 0"),
    ],
)
def test_wrong_options_of_hi_moe(options, text):
    with pytest.raises(ConfigError, match=text):
        presets.hi_moe(D, E, 4, num_groups=G, **options)
