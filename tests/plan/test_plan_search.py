"""Slices of one model, and shapes within a budget."""

from fractions import Fraction

import pytest

from himoe.config import load_config
from himoe.errors import ConfigError
from himoe.plan import Ranks, flops, memory, named_shape, parameters, search, shape_of, sliced, summarize
from himoe.plan.cautions import FEW_TOKENS
from himoe.plan.routing import log2_combinations
from himoe.plan.search import parse_budget


@pytest.mark.parametrize(
    ("name", "sparsity", "printed", "half_a_unit"),
    [
        ("sd_10m", 64, 15e6, 0.5e6),
        ("sd_20m", 64, 48e6, 0.5e6),
        ("sd_50m", 256, 930e6, 5e6),
        ("sd_300m", 64, 6.58e9, 5e6),
    ],
)
def test_the_captions_of_slicing_and_dicing(name, sparsity, printed, half_a_unit):
    counts = parameters(sliced(named_shape(name), sparsity=Fraction(sparsity)))
    assert abs(counts.total - printed) <= half_a_unit


def test_slices_keep_what_a_token_uses_but_for_the_gate():
    whole = named_shape("sd_50m")
    for inverse in (1, 2, 4, 8, 16):
        shape = sliced(whole, sparsity=Fraction(8), granularity=Fraction(1, inverse))
        experts = shape.experts
        assert (experts.num_experts, experts.top_k) == (8 * inverse, inverse)
        gate = 5 * 240 * (8 * inverse - 1)
        assert parameters(shape).active == parameters(whole).active + gate
        assert flops(shape, 64).forward == flops(whole, 64).forward + 2 * gate


def test_slices_of_a_model_with_groups_biases_and_dense_layers():
    shape = sliced(named_shape("gpt_oss_120b"), granularity=Fraction(1, 8))
    assert (shape.experts.num_experts, shape.experts.top_k) == (256, 8)
    assert shape.experts.gate_parameters == 256 * 2880 + 256  # with the router's biases
    deep = sliced(named_shape("deepseek_v3"), sparsity=Fraction(16))
    assert [layer.count for layer in deep.layers] == [3, 58] and deep.experts.group_sizes == (16,) * 8
    assert sliced(named_shape("himoe_paper_7b"), sparsity=Fraction(4)).experts.group_top_k == (2,) * 4
    with pytest.raises(ConfigError, match=r"lead to 8 experts, 2 for each token, which do not divide over 4 groups"):
        sliced(named_shape("himoe_paper_7b"), sparsity=Fraction(4), granularity=Fraction(1, 2))


@pytest.mark.parametrize("variant", [["moe.every=0"], ["moe.pools=[{num_experts=4}, {num_experts=4, expert_dim=8}]"]])
def test_only_experts_of_one_kind_are_sliced(variant):
    with pytest.raises(ConfigError, match="need a model with experts"):
        sliced(shape_of(load_config("lm_tiny", sets=variant)), sparsity=Fraction(2))


@pytest.mark.parametrize(
    ("text", "limits"),
    [
        ("active=50M", {"active": 50e6}),
        ("total=7B,memory=24GB", {"total": 7e9, "memory": 24e9}),
        ("memory=24GiB", {"memory": 24 * 2**30}),
        ("memory=512", {"memory": 512}),
        ("memory=512B", {"memory": 512}),
        ("compute=1e21, active=1.5b", {"compute": 1e21, "active": 1.5e9}),
        ("memory=80 gb", {"memory": 80e9}),
    ],
)
def test_budgets_are_read(text, limits):
    assert parse_budget(text) == limits


@pytest.mark.parametrize("text", ["active", "active=", "active=0", "active=-5M", "active=5X", "memory=5GiBB", "=5", ""])
def test_budgets_that_are_none(text):
    with pytest.raises(ConfigError, match=r"^--budget"):
        parse_budget(text)


LIMITS = {"active": 20e6, "memory": 4e9, "compute": 2e17}


@pytest.fixture(scope="module")
def found():
    return search(load_config("lm_small"), LIMITS)


def test_every_shape_found_is_the_plan_of_its_keys(found):
    assert len(found) > 10
    for one in found:
        config = load_config("lm_small", sets=[f"{key}={value}" for key, value in one.set.items()])
        shape = shape_of(config)
        plan = summarize(shape, config.train, config=config)
        assert (one.total, one.active) == (plan["parameters"]["total"], plan["parameters"]["active"])
        assert one.memory == plan["memory"]["total"] == memory(shape, config.train).total
        assert one.flops_per_token == plan["flops_per_token"]["total"]
        assert one.compute == plan["training"]["chinchilla_flops"]
        assert one.log2_combinations == plan["routing"]["log2_combinations"]["grouped"]
        assert (one.granularity, one.sparsity) == (plan["shape"]["granularity"], plan["shape"]["sparsity"])
        assert plan["shape"]["width"] == 1


def test_every_shape_found_keeps_the_limits_and_feeds_its_experts(found):
    for one in found:
        assert 0.8 * LIMITS["active"] <= one.active <= LIMITS["active"]
        assert one.memory <= LIMITS["memory"] and one.compute <= LIMITS["compute"]
        assert one.tokens_per_expert_per_step >= FEW_TOKENS


def test_no_shape_found_beats_another(found):
    values = [(one.total, one.log2_combinations, -one.memory, -one.flops_per_token) for one in found]
    for one in values:
        assert not any(other != one and all(a >= b for a, b in zip(other, one, strict=True)) for other in values)
    assert [one.total for one in found] == sorted((one.total for one in found), reverse=True)


def test_a_larger_budget_of_memory_finds_a_larger_model(found):
    more = search(load_config("lm_small"), LIMITS | {"memory": 40e9})
    assert more[0].total > found[0].total


def test_ranks_that_share_experts_make_room(found):
    config = load_config("lm_small")
    shared = search(config, LIMITS, Ranks(4, 4))
    assert shared[0].total > found[0].total
    assert all(one.set["moe.num_experts"] % 4 == 0 for one in shared)


def test_grouped_routing_stays_grouped():
    for one in search(load_config("lm_small"), {"active": 20e6}):
        keys = one.set
        assert keys["moe.top_k"] % keys["moe.num_groups"] == 0 == keys["moe.num_experts"] % keys["moe.num_groups"]
    flat = search(load_config("lm_small_switch"), {"active": 20e6})
    assert {one.set["moe.num_groups"] for one in flat} == {1}
    experts = shape_of(load_config("lm_small_switch", sets=[f"{k}={v}" for k, v in flat[0].set.items()])).experts
    assert log2_combinations(experts) == log2_combinations(experts, flat=True)


def test_without_an_active_budget_every_width_is_tried():
    found = search(load_config("lm_small"), {"total": 1e9})
    assert len({one.set["model.dim"] for one in found}) > 5 and max(one.total for one in found) > 0.8e9


@pytest.mark.parametrize(
    "sets",
    [["moe.pools=[{num_experts=8}]"], ["moe.groups=[[0,1,2,3],[4,5,6,7]]"], ["moe.every=0"], ["moe.layers=[0]"]],
)
def test_what_is_not_searched_is_refused(sets):
    with pytest.raises(ConfigError, match=r"^--budget searches "):
        search(load_config("lm_tiny", sets=sets), {"active": 1e6})


def test_nothing_fits():
    with pytest.raises(ConfigError, match=r"^--budget memory=1000: no shape fits; raise a limit, or change what"):
        search(load_config("lm_small"), {"memory": 1000})
