"""The presets named after models: published coefficients in our conventions, options, and ST-MoE's second expert."""

import inspect

import pytest
import torch
from tiny_recipe import router as router_of
from torch.utils.checkpoint import checkpoint

from himoe import MoE, SwiGLUExperts, presets
from himoe.balance import GlobalBatch, LossFree, SequenceBalance, Switch, ZLoss, step_balancers
from himoe.errors import ConfigError
from himoe.functional import scores
from himoe.registry import PRESETS, load
from himoe.testing import check_balancer

D, E = 6, 16
NAMES = ["olmoe", "mixtral", "qwen3_moe", "st_moe", "switch_transformers", "glm4_moe"]


def tokens(seed=0, count=40):
    return torch.randn(count, D, generator=torch.Generator().manual_seed(seed))


def parts(router):
    return {type(part).__name__: part for part in router.balancer.parts}


@pytest.mark.parametrize(
    ("router", "alpha", "z_loss", "renormalize"),
    [
        (presets.olmoe(D, E), 8 * 0.01, 1e-3, False),
        (presets.olmoe(D, E, 4, alpha=0.01 / 16, z_loss=0, renormalize=True), 0.01 / 16, None, True),
        (presets.mixtral(D, E), 2 * 0.02, None, True),
        (presets.mixtral(D, E, 4, z_loss=0.1, renormalize=False), 4 * 0.02, 0.1, False),
        (presets.st_moe(D, E), 0.01, 1e-3, True),
        (presets.st_moe(D, E, 3, alpha=0.2, z_loss=0), 0.2, None, True),
        (presets.st_moe(D, E, second="random"), 0.01, 1e-3, False),
    ],
)
def test_weights_of_the_losses_and_of_the_experts(router, alpha, z_loss, renormalize):
    found = parts(router)
    assert isinstance(found["Switch"], Switch)
    assert found["Switch"].weight == pytest.approx(alpha)
    assert ("ZLoss" in found) == (z_loss is not None)
    assert z_loss is None or found["ZLoss"].weight == z_loss
    assert router.renormalize == renormalize and router.scaling_factor == 1


def test_qwen3_has_its_loss_with_the_released_weight():
    (part,) = presets.qwen3_moe(D, E).balancer.parts
    assert isinstance(part, GlobalBatch)
    assert part.weight == pytest.approx(8 * 0.001)
    router = presets.qwen3_moe(D, E, 4, alpha=0.5, renormalize=False)
    assert router.balancer.parts[0].weight == 0.5 and not router.renormalize


def test_switch_transformers_has_its_loss_within_sequences():
    found = parts(presets.switch_transformers(D, E, alpha=0.5, z_loss=0.25))
    assert isinstance(found["SequenceBalance"], SequenceBalance) and isinstance(found["ZLoss"], ZLoss)
    assert (found["SequenceBalance"].weight, found["ZLoss"].weight) == (0.5, 0.25)
    assert set(parts(presets.switch_transformers(D, E, z_loss=0))) == {"SequenceBalance"}


def test_glm_is_deepseek_without_a_limit_on_groups():
    router = presets.glm4_moe(D, E, 4, num_groups=8, rate=0.01, sequence_weight=0.25)
    bias, loss = router.balancer.parts
    assert isinstance(bias, LossFree) and isinstance(loss, SequenceBalance)
    assert (bias.rate, loss.weight) == (0.01, 0.25)
    usual_bias, usual_loss = presets.glm4_moe(D, E).balancer.parts
    assert (usual_bias.rate, usual_loss.weight) == (1e-3, 1e-4)
    assert router.score is scores.sigmoid and router.renormalize and router.scaling_factor == 2.5
    one_group = presets.glm4_moe(D, E, 4)
    one_group.gate.load_state_dict(router.gate.state_dict())
    routing = router(tokens())
    assert torch.equal(routing.expert_ids, one_group(tokens()).expert_ids)
    assert torch.equal(routing.expert_ids, routing.scores.topk(4, dim=-1).indices)
    torch.testing.assert_close(routing.weights.sum(-1), torch.full((40,), 2.5))
    limited = presets.glm4_moe(D, E, 4, num_groups=8, keep_groups=2)
    assert limited(tokens()).expert_ids.div(2, rounding_mode="floor").sort(-1).values.diff().ne(0).sum(-1).eq(1).all()
    plain = presets.glm4_moe(D, E, 4, renormalize=False, scaling_factor=3.0)(tokens())
    torch.testing.assert_close(plain.weights, 3 * plain.logits.sigmoid().gather(1, plain.expert_ids))


def test_the_bias_of_glm_stands_still_after_as_many_steps_as_asked_for():
    router = presets.glm4_moe(D, E, 4, freeze_after=2)
    (bias,) = [part for part in router.balancer.modules() if isinstance(part, LossFree)]
    found = []
    for seed in range(4):
        router.balancer.observe(router(tokens(seed)))
        step_balancers([router.balancer])
        found.append(bias.bias.clone())
    assert not torch.equal(found[0], found[1])
    assert torch.equal(found[1], found[3])


@pytest.mark.parametrize("name", NAMES)
def test_a_preset_conforms_and_its_default_trains_the_gate_at_one_expert_per_token(name):
    preset = getattr(presets, name)
    score = "sigmoid" if name == "glm4_moe" else "softmax"
    check_balancer(lambda: preset(D, 8, 2).balancer, num_experts=8, score=score)
    router = preset(D, E, 1)
    router(tokens()).weights.sum().backward()
    assert router.gate.weight.grad.abs().max() > 1e-4


@pytest.mark.parametrize("name", NAMES)
def test_k_is_checked(name):
    for top_k in (0, E + 1):
        with pytest.raises(ConfigError, match=rf"\bk = {top_k}\b|top_k = {top_k} must be between 1 and num_experts"):
            getattr(presets, name)(D, E, top_k)


@pytest.mark.parametrize("name", NAMES)
def test_a_configuration_builds_it_with_its_options(name):
    built = router_of(preset=name, top_k=3)
    assert built.top_k == 3
    option = {"glm4_moe": "sequence_weight", "switch_transformers": "z_loss"}.get(name, "alpha")
    built = router_of(preset=name, top_k=2, options={option: 0.25})
    assert 0.25 in [getattr(part, "weight", None) for part in built.balancer.parts]


def test_every_preset_says_its_source():
    for name, where in PRESETS.items():
        preset = load("presets", name)
        module = inspect.getmodule(preset)
        assert "arXiv 2" in module.__doc__ or "arXiv 1" in module.__doc__, where
        documented = inspect.getdoc(preset)
        for option in inspect.signature(preset).parameters:
            assert f"{option}: " in documented or "**options" in documented, f"{name}: {option}"


# ST-MoE's second expert


def by_hand(first, second, rest=0.01):
    """A gate that gives token i the probabilities of its row."""
    p = torch.tensor([[first, second, rest]]).log()
    router = presets.st_moe(3, 3, 2, second="random")
    torch.nn.init.eye_(router.gate.weight)
    return router, p


def test_the_second_expert_is_used_with_a_probability_that_grows_with_its_weight():
    router, logits = by_hand(0.89, 0.1)  # weights 89/99 and 10/99, probability (10/99)/0.2
    torch.manual_seed(0)
    routing = router(logits.repeat(20_000, 1))
    assert routing.selected[:, 0].all()
    assert routing.selected[:, 1].float().mean().item() == pytest.approx(10 / 99 / 0.2, abs=0.015)
    used = routing.selected[:, 1]
    # A first expert that stays alone keeps its share of the two.
    torch.testing.assert_close(routing.weights[:, 0], torch.full((20_000,), 89 / 99))
    torch.testing.assert_close(routing.weights[:, 1], torch.where(used, 10 / 99, 0.0))


def test_a_second_weight_above_the_threshold_is_always_used_and_every_one_in_evaluation():
    router, logits = by_hand(0.7, 0.29)
    assert router(logits.repeat(2000, 1)).selected.all()
    router, logits = by_hand(0.98, 0.01, 0.001)
    assert not router(logits.repeat(2000, 1)).selected.all()
    routing = router.eval()(logits.repeat(2000, 1))
    assert routing.selected.all()
    torch.testing.assert_close(routing.weights[0], torch.tensor([98 / 99, 1 / 99]))
    threshold = presets.st_moe(3, 3, 2, second="random", second_threshold=0.005)
    torch.nn.init.eye_(threshold.gate.weight)
    assert threshold(logits.repeat(2000, 1)).selected.all()


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_where_all_are_used_both_policies_are_the_same(top_k):
    usual, random = (presets.st_moe(D, E, top_k, second=second).double() for second in ("all", "random"))
    random.gate.load_state_dict(usual.gate.state_dict())
    outputs = []
    for router in (usual.eval(), random.eval()):
        layer = MoE(router, SwiGLUExperts(E, D, 4).double())
        torch.manual_seed(0)
        layer.experts.reset_parameters()
        y, routing = layer(tokens().double())
        loss = sum(router.balancer.losses(routing).values())
        (y.square().sum() + loss).backward()
        outputs.append((y, loss, router.gate.weight.grad, routing.expert_ids))
    for one, other in zip(*outputs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-8)


def test_a_recomputed_forward_pass_uses_the_same_second_experts():
    layer = MoE(presets.st_moe(D, E, second="random", second_threshold=0.9), SwiGLUExperts(E, D, 4)).double()
    grads = []
    for recompute in (False, True):
        layer.zero_grad()
        torch.manual_seed(1)
        x = tokens().double().requires_grad_()
        y = checkpoint(lambda x: layer(x)[0], x, use_reentrant=False) if recompute else layer(x)[0]
        y.square().sum().backward()
        grads.append([x.grad, *(parameter.grad for parameter in layer.parameters())])
    for one, other in zip(*grads, strict=True):
        assert torch.equal(one, other)


def test_skipped_second_experts_count_for_no_loss_and_cost_no_pair():
    router, logits = by_hand(0.98, 0.01, 0.001)
    torch.manual_seed(0)
    routing = router(logits.repeat(50, 1))
    assert routing.kept.equal(routing.selected)
    share = routing.selected.sum(0) / routing.selected.sum()
    probabilities = torch.tensor([0.98, 0.01]) / 0.991
    by_formula = 0.01 * 3 * (share * probabilities).sum()
    assert router.balancer.losses(routing)["load_balance"].item() == pytest.approx(by_formula.item(), rel=1e-5)


@pytest.mark.parametrize("options", [{"second": "some"}, {"second": "random", "second_threshold": 0.0}])
def test_wrong_options_of_st_moe(options):
    with pytest.raises(ConfigError, match=r"must be all or random, second_threshold = .* above 0"):
        presets.st_moe(D, E, **options)
