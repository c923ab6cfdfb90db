"""Selectors, scores and gates from a configuration: what the layer gives them, their options, and whole models."""

import pytest
import torch
from tiny_recipe import DIM, config, router

import himoe
from himoe import registry
from himoe.build import build_model
from himoe.errors import ConfigError, HimoeWarning
from himoe.functional.scores import softmax_per_group
from himoe.nn import CosineGate, NoisyGate

SWITCH = [{"name": "switch"}]
NAMES = [name for name in registry.SELECTORS if name != "replay"]


def spelled(selector, **moe):
    return {"selector": selector, "balancers": SWITCH, "allow_non_causal": True, **moe}


@pytest.mark.filterwarnings("ignore::himoe.errors.HimoeWarning")
@pytest.mark.parametrize("name", NAMES)
def test_a_language_model_with_each_selector_trains(name):
    torch.manual_seed(0)
    model = build_model(config(**spelled(name)), vocab_size=50)
    ids = torch.randint(50, (2, 9))
    logits, routings = model(ids)
    loss = logits.square().mean() + sum(himoe.aux_losses(model, routings).values())
    loss.backward()
    himoe.observe(model, routings)
    himoe.step(model)
    for routing in routings:
        assert routing.selected.any() and routing.weights.isfinite().all()
        assert routing.top_k == (8 if hasattr(registry.load("selectors", name), "wanted") else 4)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.filterwarnings("ignore:moe.balancers. what Switch moves")
def test_options_of_a_selector_reach_it():
    built = router(**spelled("top_p", selector_options={"p": 0.9, "max_k": 3}))
    assert built.selector.keywords == {"p": 0.9, "max_k": 3} and built.top_k == 3
    assert router(**spelled("threshold")).selector.keywords == {"max_k": 8}
    built = router(**spelled("expert_choice", top_k=2, selector_options={"capacity_factor": 2.0}))
    assert built.selector.keywords == {"k": 2, "capacity_factor": 2.0, "max_k": 8}
    assert router(**spelled("hash", selector_options={"seed": 5})).selector.keywords == {"k": 4, "seed": 5}


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("top_p", {"p": 0.0}, r"moe.selector 'top_p': top_p: p = 0.0 must be above 0"),
        ("top_p", {"k": 2}, r"unknown option k = 2; allowed: p, max_k"),
        ("threshold", {"max_k": 9}, r"moe.selector 'threshold': threshold: max_k = 9 must be between 1 and"),
        ("sinkhorn", {"iterations": 1.5}, r"iterations = 1.5 must be a whole number"),
        (
            "replay",
            {},
            r"^moe.selector 'replay': expert_ids is a tensor, which only Python can give, by functools.partial$",
        ),
        (
            "replay",
            {"expert_ids": [[1]]},
            r"^moe.selector 'replay': expert_ids is a tensor, which only Python can give",
        ),
        ("replay", {"selected": [[True]]}, r"^moe.selector 'replay': selected is a tensor, which only Python can give"),
    ],
)
def test_options_that_do_not_fit_are_one_line(name, options, message):
    with pytest.raises(ConfigError, match=message) as caught:
        router(**spelled(name, selector_options=options))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["expert_choice", "sinkhorn"])
def test_selectors_that_look_ahead_are_refused_in_a_language_model(name):
    moe = spelled(name, allow_non_causal=False)
    with pytest.raises(ConfigError, match=f"{name}.*not causal"):
        build_model(config(**moe), vocab_size=50)
    with pytest.warns(HimoeWarning, match=f"{name}.*not causal"):
        build_model(config(**spelled(name)), vocab_size=50)


def test_selectors_that_balance_by_themselves_need_no_balancer():
    router(**spelled("round_robin", balancers=[]))  # a warning would be an error
    with pytest.warns(HimoeWarning, match="nothing keeps the experts evenly used"):
        router(**spelled("hash", balancers=[]))


def test_softmax_per_group_gets_the_groups_and_how_many_are_taken_from_each():
    groups = {"groups": [[0, 1], [2, 3, 4, 5, 6, 7]], "top_k_per_group": [1, 2]}
    built = router(**spelled("top_k_per_group", score="softmax_per_group", renormalize=False, **groups))
    x = torch.randn(6, DIM)
    routing = built(x)
    expected = softmax_per_group(routing.logits, groups=himoe.Groups(((0, 1), (2, 3, 4, 5, 6, 7))), k=(1, 2))
    torch.testing.assert_close(routing.scores, expected)
    torch.testing.assert_close(routing.scores[:, :2].sum(-1), torch.full((6,), 1 / 3))
    equal = router(**spelled("top_k_per_group", score="softmax_per_group"))
    torch.testing.assert_close(equal(x).scores.unflatten(-1, (4, 2)).sum(-1), torch.full((6, 4), 0.25))
    with pytest.raises(ConfigError, match=r'moe.score = "softmax_per_group": needs selection by group'):
        config(**spelled("top_k", score="softmax_per_group"))


def test_weights_are_divided_by_their_sum_where_the_authors_do_so():
    grouped = {"score": "softmax_per_group", "top_k_per_group": [1, 1, 1, 1]}
    for moe in (spelled("threshold", score="relu"), spelled("top_p"), spelled("top_k_per_group", **grouped)):
        assert not router(**moe).renormalize and router(**moe, renormalize=True).renormalize
    assert router(**spelled("top_k", score="softmax_over_selected")).renormalize
    with pytest.warns(HimoeWarning, match="moe.score 'softmax_over_selected' with moe.top_k = 1: every weight is 1"):
        assert router(**spelled("top_k", score="softmax_over_selected", top_k=1)).renormalize


def test_a_capacity_that_can_never_be_reached_is_told():
    with pytest.warns(
        HimoeWarning, match=r"moe.capacity_factor = 1 with up to 8 of 8 experts a token: .* nothing is ever dropped"
    ):
        build_model(config(**spelled("top_p", capacity_factor=1.0)), vocab_size=50)
    build_model(config(**spelled("top_p", capacity_factor=1.0, selector_options={"max_k": 2})), vocab_size=50)


def test_gates_are_named_and_take_options():
    built = router(**spelled("top_k", gate="noisy", gate_options={"noise_floor": 0.5}))
    assert isinstance(built.gate, NoisyGate) and built.gate.noise_floor == 0.5
    built = router(**spelled("top_k", gate="cosine", gate_options={"proj_dim": 3}))
    assert isinstance(built.gate, CosineGate) and built.gate.weight.shape == (8, 3)
    with pytest.raises(ConfigError, match=r"moe.gate 'cosine': unknown option floor = 1"):
        router(**spelled("top_k", gate="cosine", gate_options={"floor": 1}))


@pytest.mark.parametrize("per_group", [False, True])
@pytest.mark.parametrize("preset", ["switch", "hi_moe", None])
def test_a_balancer_that_needs_noise_needs_a_gate_that_adds_it(preset, per_group):
    balancers = [{"name": "load", "per_group": per_group}]
    moe = {"preset": preset} if preset else {"selector": "top_k"}
    with pytest.raises(ConfigError, match=r'^moe.balancers: Load needs a gate .* moe.gate = "noisy"$') as caught:
        router(balancers=balancers, **moe)
    assert (f"moe.preset ({preset!r})" in str(caught.value)) == bool(preset)
    if not preset:
        built = router(balancers=balancers, gate="noisy", **moe)
        assert built.balancer.losses(built(torch.randn(9, DIM)))["smooth_load"] > 0


@pytest.mark.filterwarnings("ignore:moe.balancers. what Switch moves")
def test_a_gate_of_ones_own_beside_hash_is_tried_out_with_a_token_id():
    router(**spelled("hash", gate="himoe.nn:CosineGate"))


@pytest.mark.filterwarnings("ignore::himoe.errors.HimoeWarning")
@pytest.mark.parametrize("name", NAMES)
def test_the_prefix_of_a_text_gets_the_same_experts_from_every_selector_that_says_so(name):
    torch.manual_seed(0)
    model = build_model(config(**spelled(name)), vocab_size=50)
    with torch.no_grad():
        model.embedding.weight.mul_(50)
        for layer in himoe.moe_layers(model):
            layer.router.gate.weight.mul_(50)
    ids = torch.randint(50, (1, 24))
    other = torch.cat([ids[:, :12], (ids[:, 12:] + 17) % 50], dim=1)
    same = torch.allclose(model(ids)[0][:, :12], model(other)[0][:, :12], atol=1e-5)
    assert same == (name not in ("expert_choice", "sinkhorn"))


def test_a_single_weight_that_is_always_one_is_told_of_without_renormalisation_too():
    with pytest.warns(HimoeWarning, match="moe.score 'softmax_over_selected' with moe.top_k = 1: every weight is 1"):
        router(**spelled("top_k", score="softmax_over_selected", top_k=1), renormalize=False)


@pytest.mark.parametrize("selector", ["hash", "round_robin", "threshold"])
@pytest.mark.parametrize("balancer", ["loss_free", "switch", "quantile"])
def test_balancing_that_the_selector_does_not_look_at_is_told_of(selector, balancer):
    moe = spelled(selector, balancers=[{"name": balancer}])
    if (selector, balancer) == ("threshold", "loss_free"):  # a bias lifts scores over a threshold of 0, or under it
        router(**moe)
    else:
        told = f"moves makes no difference to what moe.selector '{selector}' chooses"
        with pytest.warns(HimoeWarning, match=told):
            router(**moe)
    if selector == "threshold":
        router(**moe, selector_options={"threshold": 0.1})
