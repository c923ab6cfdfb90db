"""Sets of experts, tokens of an expert, drops and warnings: by hand, by enumeration, by simulation, by the guards."""

import inspect
import itertools
import math
import re
import warnings

import numpy as np
import pytest
from planned import planned

from himoe.balance import Balancer
from himoe.build import build_router
from himoe.config import load_config
from himoe.errors import HimoeWarning
from himoe.plan import Ranks, named_shape, shape_of, summarize
from himoe.plan.bias_step import SCORES, score_spread, step_faults
from himoe.plan.of_config import experts_of
from himoe.plan.routing import combinations, expected_drop, log2_combinations, tokens_per_expert
from himoe.presets.guards import score_spread as measured_spread
from himoe.registry import BALANCERS, PRESETS, SELECTORS, having, load


def experts(**moe):
    return experts_of(planned("", model={}).moe.model_copy(update=moe), 32)


def warned(*sets, ranks=None, recipe="lm_tiny"):
    config = load_config(recipe, sets=list(sets))
    return summarize(shape_of(config), config.train, config=config, ranks=ranks)["warnings"]


@pytest.mark.parametrize(
    ("moe", "allowed"),
    [
        ({"preset": "switch", "num_experts": 7, "top_k": 3}, lambda chosen, _: True),
        ({"preset": "moge", "num_experts": 8, "num_groups": 4, "top_k": 4}, lambda _, met: sorted(met) == [0, 1, 2, 3]),
        (
            {"preset": "deepseek_v3", "num_experts": 12, "num_groups": 4, "top_k": 4},
            lambda _, met: len(set(met)) <= 2,
        ),
        (
            {"preset": "deepseek_v3", "num_experts": 12, "num_groups": 4, "top_k": 3, "options": {"keep_groups": 3}},
            lambda _, met: len(set(met)) <= 3,
        ),
        (
            {"preset": None, "selector": "top_k_in_best_groups", "num_experts": 9, "num_groups": 3, "top_k": 2},
            lambda _, met: len(set(met)) == 1,
        ),
        ({"preset": "glm4_moe", "num_experts": 8, "num_groups": 4, "top_k": 3}, lambda *_: True),
    ],
)
def test_sets_of_experts_are_those_that_can_be_chosen(moe, allowed):
    found = experts(**{"options": {}, **moe})
    size = moe["num_experts"] // moe.get("num_groups", 1)
    every = list(itertools.combinations(range(moe["num_experts"]), moe["top_k"]))
    possible = sum(allowed(chosen, [expert // size for expert in chosen]) for chosen in every)
    assert combinations(found) == possible
    assert combinations(found, flat=True) == len(every)
    assert log2_combinations(found) == pytest.approx(math.log2(possible))


@pytest.mark.parametrize(
    "moe", [{"preset": "remoe"}, {"preset": None, "selector": "top_p"}, {"preset": "expert_choice"}]
)
@pytest.mark.parametrize("max_k", [2, 6])
def test_sets_of_any_number_of_experts(moe, max_k):
    where = "options" if moe["preset"] else "selector_options"
    found = experts(num_experts=6, top_k=2, **moe, **{where: {"max_k": max_k}})
    every = [chosen for size in range(1, max_k + 1) for chosen in itertools.combinations(range(6), size)]
    assert combinations(found) == combinations(found, flat=True) == len(every)
    assert log2_combinations(found, flat=True) == pytest.approx(math.log2(len(every)))


def test_sets_of_more_experts_than_can_be_counted_are_known_by_their_logarithm():
    many = experts(preset="switch", num_experts=2**20, top_k=8)
    assert combinations(many) is None
    assert log2_combinations(many) == pytest.approx(8 * 20 - math.log2(math.factorial(8)), abs=1e-3)
    slow = experts(preset="deepseek_v3", num_experts=4096, num_groups=64, top_k=1024, options={})
    assert combinations(slow) is None and math.isnan(log2_combinations(slow))
    assert log2_combinations(experts(preset="moge", num_experts=64, num_groups=4, top_k=4)) == 16


def test_tokens_of_an_expert():
    assert tokens_per_expert(experts(preset="switch", num_experts=8, top_k=2), 64) == [16]
    assert tokens_per_expert(experts(preset="expert_choice", num_experts=8, top_k=2), 64) == [16]  # of 8 places each
    one_per_pool = shape_of(planned("router_per_pool")).experts
    assert tokens_per_expert(one_per_pool, 64) == [16, 16, 16]
    uneven = planned("per_group").moe.model_copy(update={"groups": [[*range(4)], [*range(4, 8)]]})
    assert tokens_per_expert(experts_of(uneven, 32), 64) == [24]


@pytest.mark.parametrize("cv", [0.0, 0.3])
@pytest.mark.parametrize(("factor", "num_experts", "top_k"), [(1.0, 16, 2), (1.25, 16, 2), (0.75, 8, 1), (1.1, 64, 8)])
def test_drops_are_those_of_simulated_routing(factor, num_experts, top_k, cv):
    found, tokens = experts(preset="switch", num_experts=num_experts, top_k=top_k), 512
    draw = np.random.default_rng(0)
    mean = tokens * top_k / num_experts
    share = (top_k / num_experts) * (1 + cv * draw.standard_normal((4000, num_experts)))
    load = draw.binomial(tokens, share.clip(0, 1))
    dropped = (load - math.floor(factor * mean)).clip(min=0).sum() / load.sum()
    assert expected_drop(found, factor, tokens, cv=cv) == pytest.approx(dropped, abs=0.004)


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("num_experts", [1, 2, 8, 64, 512])
def test_the_spread_of_scores_is_the_guards(score, num_experts):
    mine, guards = score_spread(score, num_experts), measured_spread(load("scores", score), num_experts)
    assert mine == pytest.approx(guards, rel=0.03, abs=1e-9)


def test_rates_and_scores_are_those_of_the_parts():
    balancers = {name: load("balancers", name) for name in BALANCERS}
    signatures = {name: inspect.signature(one).parameters for name, one in balancers.items()}
    biases = [name for name, one in balancers.items() if one.adjust_choice is not Balancer.adjust_choice]
    rates = {name: signatures[name]["rate"].default for name in biases if "rate" in signatures[name]}
    assert rates == having("balancers", "bias_rate")
    of_presets = {name: inspect.signature(load("presets", name)).parameters for name in PRESETS}
    assert {name: p["rate"].default for name, p in of_presets.items() if "rate" in p} == having("presets", "bias_rate")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        moes = {name: planned(name).moe for name in PRESETS}
        built = {name: build_router(moe, 32).score.__name__ for name, moe in moes.items()}
    assert {name: score for name, score in built.items() if score != "softmax"} == having("presets", "score")


def test_what_limits_a_token_to_few_groups_is_the_option_of_the_parts():
    for table, names in (("selectors", SELECTORS), ("presets", PRESETS)):
        parameters = {name: inspect.signature(load(table, name)).parameters for name in names}
        options = {name: {"keep", "keep_groups"} & parameters[name].keys() for name in names}
        said = {name: {option} for name, (option, _) in having(table, "keep_groups").items()}
        assert said == {name: option for name, option in options.items() if option}


BIASES = [
    ["moe.selector=top_k", "moe.num_experts=512", 'moe.balancers=[{name="loss_free"}]'],
    ["moe.selector=top_k", "moe.num_experts=256", 'moe.balancers=[{name="loss_free"}]'],
    ["moe.selector=top_k", "moe.num_experts=512", "moe.score=sigmoid", 'moe.balancers=[{name="loss_free"}]'],
    ["moe.selector=top_k", "moe.num_experts=1024", 'moe.balancers=[{name="momentum"}, {name="loss_free", rate=1e-6}]'],
    ["moe.selector=top_k", 'moe.balancers=[{name="loss_free", rate=0.5, multiplicative=true}]'],
    ["moe.preset=loss_free", "moe.options={rate=0.5}"],
    ["moe.preset=deepseek_v3", "moe.options={rate=0.2}"],
    ["moe.preset=loss_free", "moe.options={multiplicative=true, rate=0.2}"],
    ["moe.preset=hi_moe", "moe.num_experts=1024", 'moe.balancers=[{name="loss_free", rate=1e-3}]'],
]


@pytest.mark.parametrize("sets", BIASES)
def test_a_bias_that_moves_too_fast_is_warned_of_as_the_guard_does(sets):
    moe = load_config("lm_tiny", sets=sets).moe
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", HimoeWarning)
        build_router(moe, 32)
    guarded = [str(one.message) for one in caught if "the bias moves by" in str(one.message)]
    found = list(step_faults(moe))
    assert len(found) == len(guarded)
    for mine, theirs in zip(found, guarded, strict=True):
        numbers = [
            re.findall(r"(?<![\w.])\d[\d.e-]*", line.partition("the bias moves by")[2]) for line in (mine, theirs)
        ]
        assert len(numbers[0]) == len(numbers[1]) >= 4
        for one, other in zip(*numbers, strict=True):
            assert float(one) == pytest.approx(float(other), rel=0.02)


def test_the_biases_above_are_of_both_kinds():
    faults = [len(list(step_faults(load_config("lm_tiny", sets=sets).moe))) for sets in BIASES]
    assert faults == [1, 0, 0, 1, 1, 1, 1, 1, 1]


def test_recipes_have_no_warning_but_where_the_vocabulary_outweighs_the_experts():
    assert warned(recipe="lm_demo") == warned(recipe="olmoe_7b") == warned(recipe="nanogpt_1b") == warned() == []
    assert warned("data.tokenizer=bpe", "data.vocab_size=100000")[0].startswith(
        "feed-forward networks are 0.8% of the active parameters"
    )


def test_warnings_of_load_groups_places_and_drops():
    assert warned("moe.num_experts=64") == [
        "an expert gets 32 tokens a step when all are used alike: too few for its gradient; raise train.batch_size, or "
        "have fewer experts"
    ]
    assert "does not divide the 4 groups" in warned(ranks=Ranks(8, 8))[0]
    assert warned(ranks=Ranks(8, 4)) == []
    assert warned("moe.preset=switch", ranks=Ranks(8, 8)) == []
    unequal = "moe.groups=[[0,1],[2,3,4,5,6,7]]", "moe.top_k=2"
    assert "of unequal size" in warned(*unequal, ranks=Ranks(2, 2))[0]
    assert warned("moe.capacity_factor=1.1")[0].startswith(
        "moe.capacity_factor = 1.1 drops 0.0% of the pairs where exp"
    )
    assert warned("moe.capacity_factor=3.0") == []
    assert warned("moe.preset=remoe", "moe.top_k=2")[0].startswith(
        "'remoe' gives a token 2 experts on average and up to 8"
    )
    assert warned("moe.selector=top_p")[0].startswith("'top_p' gives a token up to 8 experts, and all of them are")
    assert warned("moe.selector=mine:select")[0].startswith("mine:select: counted as a linear gate and moe.top_k = 4")


def test_a_published_model_has_no_configuration_to_warn_of():
    found = summarize(named_shape("himoe_paper_7b"), load_config("olmoe_7b").train)
    assert found["warnings"] == [] and found["routing"]["combinations"]["grouped"] == math.comb(16, 2) ** 4
