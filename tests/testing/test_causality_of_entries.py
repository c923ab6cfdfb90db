"""Every entry of the tables in a language model: what it says of its causality is what the suffix test measures."""

import pytest
import torch

from himoe import observe, step
from himoe.build import build_model
from himoe.cli.cards import card
from himoe.config import load_config
from himoe.registry import TABLES, load
from himoe.testing import suffix_test

pytestmark = pytest.mark.filterwarnings("ignore::himoe.errors.HimoeWarning")

V = 31
EVERY = [(table, name) for table, names in TABLES.items() for name in names]


def texts(rows, length, seed):
    return torch.randint(V, (rows, length), generator=torch.Generator().manual_seed(seed))


def toy_options(table, name):
    options = getattr(load(table, name), "toy_options", None) if table == "selectors" else None
    return {"moe": {"selector_options": options}} if options else {}


def trained(configuration, tmp_path, options):
    """Build the model of a card on the tiny recipe, make its routing uneven, and move its balancers' state."""
    file = tmp_path / "card.toml"
    file.write_text('recipe = "lm_tiny"\n' + configuration, encoding="utf-8")
    model = build_model(load_config(file, sets=["model.dim=16", "moe.expert_dim=8"], overrides=options), V)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(8)
    for number in range(3):
        routings = model(texts(4, 12, seed=number))[1]
        observe(model, routings)
        step(model)
    return model


@pytest.mark.parametrize(("table", "name"), EVERY)
def test_an_entry_is_causal_where_it_says_so_and_only_there(table, name, tmp_path):
    found = card(table, name)
    if not found.configuration:
        pytest.skip("it cannot be named in a configuration")
    test = suffix_test(trained(found.configuration, tmp_path, toy_options(table, name)), texts(2, 24, seed=9))
    assert test.causal == found.facts.causal == (not test.labelled), test.leaks or test.suffixes
    assert all(test.labelled.values()), "says it is not causal, and not why"
