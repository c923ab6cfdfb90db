"""Pools of experts, a gated shared expert and orders of capacity, from a configuration to the model."""

from typing import get_args

import pytest
import torch
from tiny_recipe import DIM, config

from himoe import Capacity, GELUExperts, MoE, PooledExperts, SwiGLUExperts, moe_layers, parameter_counts, presets
from himoe.build import build_model, build_moe
from himoe.build.model import DENSE
from himoe.config import load_config
from himoe.config.schema import ModelConfig, MoEConfig
from himoe.errors import ConfigError, HimoeWarning
from himoe.functional.dispatch import ORDERS
from himoe.nn import GELUMLP, ConstantExperts, CopyExperts, GatedNetwork, ReLU2MLP, ReLUMLP, SwiGLU, ZeroExperts

FLAT = {"preset": "switch", "top_k": 3, "num_groups": 1}


def layer(**moe):
    return build_moe(config(**FLAT | moe).moe, DIM)


def test_a_pool_takes_what_it_leaves_out_from_the_layer():
    built = layer(
        expert_dim=24,
        experts="gelu",
        backend="loop",
        pools=[{"num_experts": 3}, {"num_experts": 2, "expert_dim": 12, "experts": "swiglu"}],
    )
    assert isinstance(built.experts, PooledExperts) and built.experts.sizes == (3, 2)
    assert built.router.num_experts == built.experts.num_experts == 5  # moe.num_experts follows from the pools
    first, second = built.experts.pools
    assert type(first) is GELUExperts and type(second) is SwiGLUExperts
    assert [(p.num_experts, p.dim, p.hidden_dim, p.backend) for p in (first, second)] == [
        (3, DIM, 24, "loop"),
        (2, DIM, 12, "loop"),
    ]
    y, routing = built(torch.randn(2, 7, DIM))
    assert y.shape == (2, 7, DIM) and routing.logits.shape == (14, 5)


def test_pools_as_a_file_has_them(tmp_path):
    file = tmp_path / "pools.toml"
    file.write_text(
        """
        recipe = "lm_tiny"
        [moe]
        selector = "top_k_per_group"
        groups = [[0, 1, 2, 3], [4, 5, 6, 7, 8, 9, 10, 11], [12, 13]]
        top_k_per_group = [1, 2, 1]
        [[moe.pools]]
        num_experts = 4
        [[moe.pools]]
        num_experts = 8
        expert_dim = 16
        [[moe.pools]]
        num_experts = 2
        experts = "zero"
        [[moe.balancers]]
        name = "switch"
        """
    )
    loaded = load_config(file)
    assert (loaded.moe.num_experts, loaded.moe.num_groups, loaded.moe.top_k) == (14, 3, 4)
    built = build_moe(loaded.moe, DIM)
    pool_of = torch.tensor([0] * 4 + [1] * 8 + [2] * 2)
    _, routing = built(torch.randn(9, DIM))
    assert pool_of[routing.expert_ids].tolist() == [[0, 1, 1, 2]] * 9
    with torch.device("meta"):
        counts = parameter_counts(build_model(loaded, 300))
    one, half = 3 * 32 * 32, 3 * 32 * 16  # lm_tiny has width 32 and experts of 32, in both layers
    assert counts.total - counts.active == 2 * (3 * one + 6 * half)


def test_a_router_per_pool_is_two_layers_combined():
    groups, each = [[0, 1, 2, 3], [4, 5, 6, 7, 8, 9]], [1, 2]
    built = build_moe(
        config(
            pools=[{"num_experts": 4}, {"num_experts": 6, "expert_dim": 12}],
            groups=groups,
            top_k_per_group=each,
            selector="top_k_per_group",
            score="softmax_per_group",
            renormalize=False,
            balancers=[{"name": "switch", "per_group": True}],
        ).moe,
        DIM,
    ).double()
    x, expected = torch.randn(11, DIM, dtype=torch.float64), 0
    gates = built.router.gate.weight.split([4, 6])
    for pool, gate, k in zip(built.experts.pools, gates, each, strict=True):
        router = presets.switch(DIM, pool.num_experts, k, renormalize=False).double()
        router.gate.weight.data.copy_(gate)
        expected = expected + k * MoE(router, pool)(x)[0] / sum(each)
    torch.testing.assert_close(built(x)[0], expected)


def test_experts_without_hidden_layer_beside_ordinary_ones():
    kinds = {"swiglu": SwiGLUExperts, "zero": ZeroExperts, "copy": CopyExperts, "constant": ConstantExperts}
    built = layer(pools=[{"num_experts": 2, "experts": kind} for kind in kinds])
    assert [type(pool) for pool in built.experts.pools] == list(kinds.values())
    assert built.experts.pools[3].constant.weight.shape == (2, DIM)
    assert built(torch.randn(5, DIM))[0].shape == (5, DIM)


@pytest.mark.parametrize(
    ("moe", "text"),
    [
        ({"pools": [{"num_experts": 4}], "num_experts": 8}, "moe.pools.*: hold 4 experts, but moe.num_experts is 8"),
        ({"pools": [{"num_experts": 4, "experts": "swiglo"}]}, r"must be one of swiglu, .*; did you mean 'swiglu'\?"),
        ({"pools": []}, "moe.pools"),
        ({"pools": [{"num_experts": 0}]}, "moe.pools.*num_experts = 0: must be ≥ 1"),
        ({"pools": [{"expert_dim": 8}]}, "moe.pools.*num_experts"),
        ({"pools": [{"num_experts": 4, "hidden": 8}]}, "moe.pools.*hidden"),
        ({"pools": [{"num_experts": 2}]}, r"moe.top_k = 3: must be ≤ moe.num_experts \(2\)"),
        ({"shared_gate": True}, "moe.shared_gate = true: needs a shared expert: set moe.shared_dim"),
        ({"capacity_order": "by_score"}, "moe.capacity_order = .by_score.: must be .*batch_prioritised"),
        (
            {"pools": [{"num_experts": 4, "experts": "torch.nn:Identity"}]},
            "^moe.pools: pooled experts: pool 0, Identity, must have num_experts, ",
        ),
    ],
)
def test_what_cannot_be_is_named(moe, text):
    with pytest.raises(ConfigError, match=text):
        layer(**moe)


@pytest.mark.parametrize(("experts", "kind"), [("relu2", ReLU2MLP), ("gelu", GELUMLP), ("zero", SwiGLU)])
def test_a_shared_expert_is_of_the_kind_of_the_others_where_it_can_be(experts, kind):
    assert type(layer(shared_dim=20, experts=experts).shared_expert) is kind


def test_a_shared_expert_with_a_gate():
    plain, gated = layer(shared_dim=20), layer(shared_dim=20, shared_gate=True)
    assert type(plain.shared_expert) is SwiGLU and type(gated.shared_expert) is GatedNetwork
    assert gated.shared_expert.network.down_proj.in_features == 20
    x = torch.randn(6, DIM)
    shared = gated.shared_expert
    without = layer()
    without.load_state_dict({n: v for n, v in gated.state_dict().items() if not n.startswith("shared_expert")})
    expected = without(x)[0] + torch.sigmoid(x @ shared.gate.weight.T) * shared.network(x)
    torch.testing.assert_close(gated(x)[0], expected)


@pytest.mark.parametrize("order", ORDERS)
def test_every_order_of_capacity(order):
    built = layer(capacity_factor=0.7, capacity_order=order)
    assert isinstance(built.dispatcher, Capacity) and built.dispatcher.order == order
    wanted = {"capacity_factor": 0.7, "capacity_order": order}
    if ORDERS[order].causal:
        build_model(config(**FLAT | wanted), 300)
        return
    with pytest.raises(ConfigError, match=r"^Capacity.* not causal as configured"):
        build_model(config(**FLAT | wanted), 300)
    with pytest.warns(HimoeWarning, match=r"^Capacity.* not causal as configured"):
        build_model(config(**FLAT | wanted, allow_non_causal=True), 300)


@pytest.mark.parametrize(("ffn", "kind"), [("relu", ReLUMLP), ("relu2", ReLU2MLP)])
def test_dense_layers_with_relu(ffn, kind):
    built = build_model(load_config("lm_tiny", overrides={"model": {"ffn": ffn}, "moe": {"layers": [1]}}), 300)
    assert type(built.blocks[0].feed_forward) is kind and len(moe_layers(built)) == 1


def test_the_names_a_configuration_accepts_are_those_of_the_tables():
    assert get_args(MoEConfig.model_fields["capacity_order"].annotation) == tuple(ORDERS)
    assert get_args(ModelConfig.model_fields["ffn"].annotation) == tuple(DENSE)
