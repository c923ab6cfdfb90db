"""From configuration to router and model: presets with options, routers spelled out, extra balancers, errors."""

import warnings

import pytest
import torch
from tiny_recipe import DIM, config, parts, router

from himoe import GELUExperts, Groups, moe_layers
from himoe.balance import LogitCorrection, LossFree, Momentum, Quantile, Schedule, Switch, TwoLevelTerms, ZLoss
from himoe.build import build_model
from himoe.config import load_config
from himoe.config.schema import ModelConfig
from himoe.errors import ConfigError, GuardError, HimoeWarning
from himoe.functional import scores
from himoe.models import DecoderLM
from himoe.nn import GELUMLP, SwiGLU


def test_a_preset_takes_its_sizes_from_the_layer_and_its_options_from_the_configuration():
    built = router(options={"lambda_inter": 0.04, "alpha": 0.02, "correction": "none"})
    (terms,) = parts(built, TwoLevelTerms)
    assert (terms.lambda_inter, terms.lambda_intra, terms.groups) == (0.04, 0.01, Groups.equal(8, 4))
    assert parts(built, Switch)[0].weight == 0.02 and not parts(built, LogitCorrection)
    assert built.gate.weight.shape == (8, DIM)
    assert built(torch.zeros(3, DIM)).expert_ids.shape == (3, 4)


@pytest.mark.parametrize("name", ["moge", "switch", "loss_free"])
def test_flat_and_grouped_presets_are_built_alike(name):
    built = router(preset=name, top_k=4)
    assert built(torch.zeros(3, DIM)).expert_ids.shape == (3, 4)


def test_unequal_groups_and_a_k_per_group():
    groups = [[0, 1, 2], [3], [4, 5, 6, 7]]
    for spelled in (
        {},
        {"preset": None, "selector": "top_k_per_group", "balancers": [{"name": "two_level"}, {"name": "switch"}]},
    ):
        built = router(groups=groups, top_k_per_group=[2, 1, 3], **spelled)
        assert parts(built, TwoLevelTerms)[0].groups.members == tuple(map(tuple, groups))
        of = torch.tensor([0, 0, 0, 1, 2, 2, 2, 2])
        assert of[built(torch.randn(5, DIM)).expert_ids].tolist() == [[0, 0, 1, 2, 2, 2]] * 5


def test_weights_are_renormalised_as_the_preset_has_it_unless_the_configuration_says():
    assert router().renormalize and not router(renormalize=False).renormalize
    assert router(renormalize=False, options={"renormalize": True}).renormalize
    for renormalize in (None, True, False):  # one weight per token: left as it is, unless asked for
        assert router(preset="switch", top_k=1, renormalize=renormalize).renormalize is bool(renormalize)


def test_a_single_weight_is_renormalised_only_where_asked_for_and_then_with_a_warning():
    spelled = {"selector": "top_k", "top_k": 1, "balancers": [{"name": "switch"}]}
    built = router(**spelled)
    built(torch.randn(5, DIM)).weights.sum().backward()
    assert built.gate.weight.grad.abs().max() > 1e-3
    assert not router(renormalize=False, **spelled).renormalize
    with pytest.warns(HimoeWarning, match=r"moe.renormalize = true with moe.top_k = 1: every weight is 1, so the gate"):
        assert router(renormalize=True, **spelled).renormalize
    assert router(renormalize=True, **spelled | {"top_k": 2}).renormalize


def test_a_router_spelled_out():
    built = router(
        selector="top_k",
        score="sigmoid",
        top_k=3,
        renormalize=False,
        balancers=[{"name": "loss_free", "rate": 0.04}, {"name": "z_loss", "weight": 0.25}],
    )
    assert [type(p) for p in built.balancer.parts] == [LossFree, ZLoss]
    assert built.balancer.parts[0].rate == 0.04 and built.balancer.parts[1].weight == 0.25
    assert built.score is scores.sigmoid and not built.renormalize
    routing = built(torch.randn(5, DIM))
    assert routing.expert_ids.shape == (5, 3)
    assert torch.equal(routing.scores, routing.logits.sigmoid())


def test_a_spelled_out_grouped_router_shares_k_over_the_groups():
    built = router(selector="top_k_per_group", balancers=[{"name": "two_level"}, {"name": "switch"}])
    assert built.score is scores.softmax
    assert (built(torch.randn(5, DIM)).expert_ids // 2).tolist() == [[0, 1, 2, 3]] * 5


@pytest.mark.parametrize("balancers", [[], [{"name": "z_loss"}]])
def test_a_router_spelled_out_without_balancing_warns(balancers):
    with pytest.warns(HimoeWarning, match=r"moe.selector without moe.balancers that balance load: nothing keeps"):
        built = router(selector="top_k", balancers=balancers)
    assert "load_balance" not in built.balancer.losses(built(torch.randn(5, DIM)))
    assert len(warned(selector="top_k", balancers=balancers)) == 1


def test_balancers_beside_a_preset_join_its_own():
    built = router(balancers=[{"name": "z_loss", "weight": 0.5}, {"name": "switch", "weight": 0.25}])
    assert [module.weight for module in parts(built, ZLoss)] == [0.5]
    assert [module.weight for module in parts(built, Switch)] == [0.01, 0.25]
    routing = built(torch.randn(9, DIM))
    found = built.balancer.losses(routing)
    assert set(found) == {"intra", "inter", "load_balance", "z_loss"}
    assert found["load_balance"].item() == pytest.approx(
        0.26 * router().balancer.losses(routing)["load_balance"].item() / 0.01
    )


@pytest.mark.parametrize(
    ("moe", "text"),
    [
        (
            {"options": {"lamda_intra": 0.1}},
            r"preset 'hi_moe': unknown option lamda_intra = 0.1; allowed: .*; did you mean 'lambda_intra'\?",
        ),
        ({"options": {"dim": 3}}, "unknown option dim = 3; allowed: "),
        ({"options": {"force": True}}, "unknown option force = True; allowed: "),
        (
            {"balancers": [{"name": "switch"}, {"name": "z_loss", "wieght": 1}]},
            r"moe.balancers\[1\] 'z_loss': unknown option wieght = 1; allowed: weight; did you mean 'weight'\?",
        ),
        (
            {"balancers": [{"name": "two_level", "groups": 4}]},
            "'two_level': unknown option groups = 4; allowed: lambda",
        ),
        ({"options": {"alpha": "x"}}, "^moe.options of preset 'hi_moe': alpha = 'x' must be a number$"),
        ({"options": {"alpha": True}}, "alpha = True must be a number$"),
        ({"options": {"intra": 1}}, "intra = 1 must be text in quotes$"),
        ({"options": {"schedule_steps": 2.5}}, "schedule_steps = 2.5 must be a whole number$"),
        ({"preset": "switch", "options": {"renormalize": 1}}, "'switch': renormalize = 1 must be true or false$"),
        (
            {"balancers": [{"name": "z_loss", "weight": "big"}]},
            r"^moe.balancers\[0\] 'z_loss': weight = 'big' must be a number$",
        ),
        (
            {"preset": "loss_free", "options": {"rate": float("nan")}},
            "'loss_free': rate = nan must be a finite number$",
        ),
        (
            {"balancers": [{"name": "z_loss", "weight": -float("inf")}]},
            r"^moe.balancers\[0\] 'z_loss': weight = -inf must be a finite number$",
        ),
        (
            {"balancers": [{"name": "loss_free", "update": "adam"}]},
            r"^moe.balancers\[0\] 'loss_free': loss_free: update = 'adam' must be sign",
        ),
        ({"options": {"schedule": "two_stage"}}, "^moe.options of preset 'hi_moe': .*needs schedule_steps ≥ 1"),
        ({"balancers": [{"name": "himoe.balance:Nothing"}]}, "cannot load 'himoe.balance:Nothing' for balancers: "),
        ({"balancers": [{"name": "no.such.module:X"}]}, "cannot load 'no.such.module:X' for balancers: No module"),
    ],
)
def test_options_that_cannot_work(moe, text):
    with pytest.raises(ConfigError, match=text) as caught:
        router(**moe)
    assert "\n" not in str(caught.value)


def test_a_balancer_beside_a_preset_counts_for_its_guard():
    router(options={"alpha": 0.0}, balancers=[{"name": "loss_free"}])
    router(options={"alpha": 0.001}, balancers=[{"name": "switch", "weight": 0.01}])
    with pytest.raises(GuardError, match="without any load-balancing part"):
        router(options={"alpha": 0.0}, balancers=[{"name": "z_loss"}])


def test_a_warning_is_given_once_beside_extra_balancers():
    with pytest.warns(HimoeWarning) as caught:
        router(preset="hi_moe_official", balancers=[{"name": "z_loss"}])
    assert len(caught) == 1


def test_a_loss_free_rate_is_held_against_softmax_scores():
    many = {"num_experts": 512, "selector": "top_k", "balancers": [{"name": "loss_free"}]}
    with pytest.warns(HimoeWarning, match=r"0.001 a step, 0.395 times the spread 0.00253 of softmax scores over 512"):
        router(**many)
    router(score="sigmoid", **many)


def test_guards_look_at_the_whole_composition_and_force_overrides_them():
    with pytest.raises(
        GuardError, match=r"^moe.options of preset 'hi_moe': .*lambda_intra/alpha = 0.1/0.01 = 10 > 2.5"
    ):
        router(options={"lambda_intra": 0.1})
    with pytest.raises(GuardError, match="without any load-balancing part"):
        router(selector="top_k_per_group", balancers=[{"name": "two_level"}])
    with pytest.raises(GuardError, match=r"0.91/0.01 = 91 > 2.5"):
        router(balancers=[{"name": "two_level", "lambda_intra": 0.9}])
    with pytest.warns(HimoeWarning, match=r"0.1/0.01 = 10 > 2.5"):
        router(options={"lambda_intra": 0.1}, force=True)


def warned(**moe) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        build_model(config(**moe), 300)
    return [str(warning.message) for warning in caught if issubclass(warning.category, HimoeWarning)]


def test_every_key_of_the_model_and_of_its_layers_reaches_its_place(monkeypatch):
    model = {
        "dim": 48, "num_layers": 3, "num_heads": 6, "num_kv_heads": 3, "ffn_dim": 20, "ffn": "gelu",
        "tie_embeddings": False, "rope_theta": 123.0, "qk_norm": False,
    }  # fmt: skip
    moe = {"layers": [1], "expert_dim": 24, "shared_dim": 12, "experts": "gelu", "backend": "loop",
           "capacity_factor": 1.5, "capacity_order": "batch_prioritised", "allow_non_causal": True}  # fmt: skip
    usual = load_config("lm_tiny")
    assert set(model) == set(ModelConfig.model_fields)
    assert all(getattr(usual.model, key) != value for key, value in model.items())
    assert all(getattr(usual.moe, key) != value for key, value in moe.items())
    given = {}

    def spy(**arguments):
        given.update(arguments)
        return DecoderLM(**arguments)

    monkeypatch.setattr("himoe.build.model.DecoderLM", spy)
    with pytest.warns(HimoeWarning, match="^Capacity .*: not causal"):
        built = build_model(load_config("lm_tiny", overrides={"model": model, "moe": moe}), 300)
    feed_forward = given.pop("feed_forward")
    assert given == {key: value for key, value in model.items() if not key.startswith("ffn")} | {"vocab_size": 300}
    assert [feed_forward(layer).down_proj.in_features for layer in (0, 2)] == [20, 20]
    dense = build_model(load_config("lm_tiny", overrides={"moe": {"every": 2}}), 300).blocks[0].feed_forward
    assert type(feed_forward(0)) is GELUMLP and type(dense) is SwiGLU
    (layer,) = moe_layers(built)
    assert layer is built.blocks[1].feed_forward
    assert type(layer.experts) is GELUExperts
    assert (layer.experts.num_experts, layer.experts.dim, layer.experts.hidden_dim) == (8, 48, 24)
    assert layer.experts.backend == "loop"
    assert (layer.dispatcher.factor, layer.dispatcher.order) == (1.5, "batch_prioritised")
    assert (layer.shared_expert.down_proj.in_features, layer.shared_expert.down_proj.out_features) == (12, 48)


def test_a_model_has_a_router_of_its_own_in_every_layer_and_is_a_function_of_the_seed():
    one, same = build_model(config(), 300), build_model(config(), 300)
    other = build_model(load_config("lm_tiny", sets=["seed=1"]), 300)
    gates = [layer.router.gate.weight for layer in moe_layers(one)]
    assert len(gates) == 2 and not torch.equal(*gates)
    assert len({id(layer.router.balancer) for layer in moe_layers(one)}) == 2
    for (name, a), b, c in zip(one.named_parameters(), same.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
        assert a.ndim < 2 or not torch.equal(a, c), name


def quantile_of(*, per_group: bool = False, **moe):
    """The quantile balancers of a configuration."""
    return parts(router(balancers=[{"name": "quantile", "per_group": per_group}], **moe), Quantile)


def test_a_quantile_balancer_knows_how_experts_are_chosen():
    (flat,) = quantile_of(selector="top_k")
    assert (flat.num_groups, flat.chosen, flat.size) == (1, 4, 8)
    for grouped in ({"selector": "top_k_per_group"}, {"preset": "moge"}):
        (found,) = quantile_of(**grouped)
        assert (found.num_groups, found.chosen, found.size) == (4, 1, 2)
    with pytest.raises(ConfigError, match=r"moe.balancers\[0\] 'quantile': .*for others set per_group = true"):
        quantile_of(selector="top_k_per_group", groups=[[0, 1, 2], [3, 4, 5, 6, 7]], top_k=4, top_k_per_group=[1, 3])
    each = quantile_of(
        selector="top_k_per_group", groups=[[0, 1, 2], [3, 4, 5, 6, 7]], top_k=4, top_k_per_group=[1, 3],
        per_group=True,
    )  # fmt: skip
    assert [(part.num_groups, part.chosen, part.size) for part in each] == [(1, 1, 3), (1, 3, 5)]


def test_beside_a_flat_selector_a_balancer_per_group_gets_the_share_of_its_group():
    unequal = {"groups": [[0, 1], [2, 3, 4, 5, 6, 7]], "selector": "top_k"}
    each = quantile_of(**unequal, top_k=4, per_group=True)
    assert [(part.chosen, part.size) for part in each] == [(1, 2), (3, 6)]
    assert len(parts(router(**unequal, top_k=3, balancers=[{"name": "switch", "per_group": True}]), Switch)) == 2
    refused = r"^moe.balancers\[0\] 'quantile': .*moe.top_k = 3 does not divide over groups of "
    for moe in (unequal, {"selector": "top_k", "num_groups": 2}, {"preset": "switch", "num_groups": 2}):
        with pytest.raises(ConfigError, match=refused) as caught:
            quantile_of(**moe, top_k=3, per_group=True)
        assert "\n" not in str(caught.value)


def test_a_schedule_of_a_configuration_may_scale_moves():
    schedule = {"kind": "off_after", "steps": 7, "scales": "moves"}
    built = router(selector="top_k", score="sigmoid", balancers=[{"name": "momentum", "schedule": schedule}])
    (found,) = built.balancer.parts
    assert (found.kind, found.steps, found.scales) == ("off_after", 7, "moves")
    assert isinstance(found.balancer, Momentum)


def test_a_schedule_of_a_configuration_scales_what_there_is():
    for name, scales in (("loss_free", "moves"), ("switch", "losses")):
        entry = {"name": name, "schedule": {"kind": "off_after", "steps": 5}}
        (found,) = parts(router(selector="top_k", score="sigmoid", balancers=[entry]), Schedule)
        assert found.scales == scales
    entry["schedule"]["scales"] = "moves"
    with pytest.raises(ConfigError, match=r"^moe.balancers\[0\] 'switch': .*Switch has no moves to scale"):
        router(selector="top_k", balancers=[entry])
