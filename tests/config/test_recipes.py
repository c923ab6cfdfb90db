"""The recipes: siblings that differ in their routing alone, and sizes that are the published ones."""

import warnings

import pytest
import torch

from himoe.build import build_model
from himoe.config import load_config, recipe_description, recipe_names
from himoe.config.recipes import recipe_text
from himoe.models import parameter_counts

FAMILIES = ["lm_small", "nanogpt_1b", "olmoe_7b"]
SIBLINGS = ["moge", "switch", "loss_free", "dense"]


def build(name):
    """Build a recipe in full size, without memory for its weights."""
    config = load_config(name)
    with torch.device("meta"):
        return build_model(config, config.data.vocab_size)


def router_size(model):
    return sum(parameter.numel() for name, parameter in model.named_parameters() if ".router." in name)


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_builds_without_a_warning_and_is_described(name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        build(name)
    assert 20 < len(recipe_description(name)) < 120


def test_every_family_is_complete():
    assert {f"{family}_{sibling}" for family in FAMILIES for sibling in SIBLINGS} < set(recipe_names())


@pytest.mark.parametrize("family", FAMILIES)
def test_siblings_have_equal_active_parameters_up_to_the_router(family):
    """Hence equal multiplications per token: two per active weight, and an attention that is the same."""
    models = [build(name) for name in (family, *(f"{family}_{sibling}" for sibling in SIBLINGS))]
    active = {parameter_counts(model).active - router_size(model) for model in models}
    assert len(active) == 1
    assert router_size(models[0]) < 0.01 * active.pop()
    assert router_size(models[-1]) == 0  # the dense one
    assert len({parameter_counts(model).total for model in models[:-1]}) == 1


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("sibling", SIBLINGS)
def test_siblings_differ_in_routing_alone(family, sibling):
    ours, other = load_config(family).model_dump(), load_config(f"{family}_{sibling}").model_dump()
    assert (ours["data"], ours["train"], ours["seed"]) == (other["data"], other["train"], other["seed"])
    width = {"ffn_dim"} if sibling == "dense" else set()
    assert {key for key in ours["model"] if ours["model"][key] != other["model"][key]} <= width
    routing = {"preset", "options", "balancers", "renormalize", "every"}
    assert {key for key in ours["moe"] if ours["moe"][key] != other["moe"][key]} <= routing
    assert other["name"] == f"{family}_{sibling}"


def test_the_seven_billion_are_those_of_olmoe():
    counts = parameter_counts(build("olmoe_7b"))
    assert round(counts.total / 1e6) == 6919
    assert round(counts.active / 1e6) == 1282


def test_the_paper_calls_its_nanogpt_one_billion():
    counts = parameter_counts(build("nanogpt_1b"))
    expert, layers = 2 * 1024 * 4096, 24
    norms, embedding = (2 * layers + 1) * 1024, 50_304 * 1024
    dense = embedding + norms + layers * 4 * 1024**2 + 12 * (expert + 8 * 1024)
    assert (counts.total, counts.active) == (dense + 12 * 8 * expert, dense + 12 * 4 * expert)
    assert round(counts.total / 1e9, 1) == 1.1


def test_ten_million_are_active_in_the_small_one():
    assert 9.5e6 < parameter_counts(build("lm_small")).active < 10.5e6


def test_a_recipe_lies_over_the_one_it_names():
    assert recipe_text("lm_small_switch").count("\n") < 15
    config = load_config("lm_small_switch")
    assert config.moe.balancers == []  # those of lm_small went with its preset
    assert config.moe.options == {"alpha": 0.02}
    assert config.train == load_config("lm_small").train


def test_a_file_lies_over_both(tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text('recipe = "lm_small_moge"\n[moe.options]\nalpha = 0.05\n[train]\nsteps = 700\n', encoding="utf-8")
    config = load_config(file)
    assert (config.name, config.moe.preset, config.moe.options) == ("mine", "moge", {"alpha": 0.05})
    assert (config.train.steps, config.train.seq_len) == (700, 512)
    assert [entry.name for entry in config.moe.balancers] == ["loss_free"]
