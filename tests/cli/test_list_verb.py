"""`himoe list`: a line for every entry, and the card of one, each fact against what the thing itself says."""

import importlib
import json
import re
import sys
import types

import pytest
import torch
from jaxtyping import Int

import himoe
from himoe.balance import Balancer
from himoe.build import build_model
from himoe.cli import main
from himoe.cli.cards import OPTIONS, SETTLED, card
from himoe.cli.catalogue import KINDS, entries
from himoe.cli.docstrings import read_unimported
from himoe.config import load_config
from himoe.errors import ConfigError
from himoe.nn import SwiGLUExperts, moe_layers, non_causal_parts
from himoe.registry import TABLES, fact, having, load

pytestmark = pytest.mark.filterwarnings("ignore::himoe.errors.HimoeWarning")

EVERY = [(table, name) for table, names in TABLES.items() for name in names]
CONFIGURATION = "In a configuration\n"


def printed(capsys, *arguments):
    assert main(["list", *arguments]) == 0
    return capsys.readouterr()


def as_json(capsys, *arguments):
    return json.loads(printed(capsys, *arguments, "--json").out)


def test_every_table_has_a_line_for_each_name(capsys):
    tables = as_json(capsys)
    assert list(tables) == [*TABLES, "recipes"] == list(KINDS)
    for kind, table in tables.items():
        assert all(len(entry["description"]) > 10 for entry in table), table
        if kind != "recipes":
            assert [entry["name"] for entry in table] == list(TABLES[kind])
    text = printed(capsys).out
    assert all(f"  {entry['name']} " in text for table in tables.values() for entry in table)


@pytest.mark.parametrize("columns", [80, 120])
def test_the_lines_fit_the_terminal_and_tell_the_paper(capsys, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    lines = printed(capsys).out.splitlines()
    assert max(map(len, lines)) <= columns
    (moge,) = [line for line in lines if line.startswith("  moge ")]
    assert moge.endswith("2505.21411")
    assert as_json(capsys, "presets")["presets"][list(TABLES["presets"]).index("moge")]["paper"] == "2505.21411"


@pytest.mark.parametrize(("table", "name"), EVERY)
def test_what_is_read_without_an_import_is_the_docstring(table, name):
    entry = load(table, name)
    doc, opening = read_unimported(TABLES[table][name])
    assert doc == importlib.import_module("inspect").getdoc(entry)
    assert opening == importlib.import_module("inspect").getdoc(sys.modules[entry.__module__])


@pytest.mark.parametrize("table", TABLES)
def test_first_lines_are_whole_sentences_without_numbers_of_papers(table):
    for entry in entries(table):
        assert not re.search(r"arXiv|\d{4}\.\d{4}", entry.description), entry
        assert entry.description.count("(") == entry.description.count(")"), entry
        assert entry.description.endswith((".", "?")), entry


def test_the_card_of_a_balancer(capsys):
    found = as_json(capsys, "balancers", "loss_free")
    assert found["where"] == "himoe.balance.loss_free:LossFree" and found["papers"][0] == "2408.15664"
    assert found["facts"]["state"] == {"bias": "(E,) float32"} and found["facts"]["parameters"] == {}
    assert (found["facts"]["balances_load"], found["facts"]["causal"]) == (True, True)
    options = {option.pop("name"): option for option in found["options"]}
    assert list(options)[:3] == ["rate", "update", "centred"]
    assert options["rate"]["kind"] == "number" and options["rate"]["default"] == "0.001"
    assert options["rate"]["meaning"].startswith("u per optimizer step.")
    assert options["update"]["default"] == '"sign"' and options["centred"]["kind"] == "true or false"
    text = printed(capsys, "balancers", "loss_free").out
    assert "https://arxiv.org/abs/2408.15664" in text and "u·sign(mean(c) − c)" in text
    assert "update" in text and "true or false: keep the sum of the biases" in text
    frozen = next(o for o in as_json(capsys, "presets", "deepseek_v3")["options"] if o["name"] == "freeze_after")
    assert frozen["kind"] == "whole number or none"
    assert '[[moe.balancers]]\n  name = "loss_free"\n  rate = 0.001' in text


def test_the_card_of_a_preset_shows_what_it_is_made_of(capsys):
    found = as_json(capsys, "presets", "hi_moe")
    parts = {
        "gates": ["linear"],
        "scores": ["softmax"],
        "selectors": ["top_k_per_group"],
        "balancers": ["logit_correction", "two_level", "switch"],
    }
    assert found["facts"]["made_of"] == parts
    assert found["facts"]["parameters"] == {"gate.weight": "(E, D) float32"}
    assert found["facts"]["state"] == {"balancer.parts.0.mean_logits": "(E,) float32"}
    text = printed(capsys, "presets", "hi_moe").out
    assert "balancers logit_correction, two_level, switch" in text
    assert re.search(r"^balances load +yes$", text, re.M) and re.search(r"^causal +yes$", text, re.M)


def test_options_that_are_as_in_another_are_explained_with_their_own_defaults(capsys):
    found = as_json(capsys, "presets", "hi_moe_paper")
    options = {option["name"]: option for option in found["options"]}
    assert options["lambda_intra"]["default"] == "0.1" and options["lambda_intra"]["meaning"]
    assert any("`alpha` is K·0.01" in block for block in found["text"])
    assert found["facts"]["causal"] is False and "allow_non_causal = true" in found["configuration"]
    assert "no: refused in a language model unless allowed" in printed(capsys, "hi_moe_paper").out


@pytest.mark.parametrize(("table", "name"), EVERY)
def test_every_card_is_whole(capsys, monkeypatch, table, name):
    found = card(table, name)
    assert all(option.meaning and option.kind and option.name not in SETTLED for option in found.options), found
    assert found.facts.causal is not None, "it could not be built by itself"
    assert (found.facts.balances_load is None) == (table not in ("balancers", "selectors", "presets"))
    assert found.opening and found.description
    for columns in ("80", "120"):
        monkeypatch.setenv("COLUMNS", columns)
        text = printed(capsys, table, name).out
        assert all(f" {option.name} " in text for option in found.options)
        prose = text.partition("How it works")[0] + text.partition("\nOptions")[2]
        lines = [line for line in prose.splitlines() if not line.startswith("defined in")]
        assert max(map(len, lines)) <= int(columns)


@pytest.mark.parametrize(("table", "name"), EVERY)
def test_a_card_shows_a_configuration_that_builds_and_names_its_options(capsys, tmp_path, table, name):
    file = tmp_path / "my.toml"
    text = printed(capsys, table, name).out.partition(CONFIGURATION)[2]
    if not card(table, name).configuration:
        assert "In Python only" in text and {option.kind for option in card(table, name).options} & {"tensor"}
        return
    file.write_text('recipe = "lm_tiny"\n' + text, encoding="utf-8")
    moe = load_config(file).moe
    pools = {pool.experts for pool in moe.pools or ()}
    assert name in (
        moe.preset,
        moe.selector,
        moe.score,
        moe.experts,
        moe.gate,
        *(b.name for b in moe.balancers),
        *pools,
    )
    model = build_model(load_config(file), 300)
    assert bool(non_causal_parts(model)) == moe.allow_non_causal
    if table in OPTIONS:
        given = getattr(moe, OPTIONS[table].removeprefix("moe."))
        assert bool(given) == any(o.default not in ("none", "must be given") for o in card(table, name).options)


@pytest.mark.parametrize(("table", "name"), [(table, name) for table in TABLES for name in having(table, "goes_with")])
def test_a_card_shows_an_entry_beside_what_it_is_made_for(tmp_path, table, name):
    wanted = dict(fact(table, name, "goes_with"))
    (tmp_path / "my.toml").write_text(f'recipe = "lm_tiny"\n{card(table, name).configuration}', encoding="utf-8")
    moe = load_config(tmp_path / "my.toml").moe
    assert wanted.pop("balancer", moe.balancers[0].name) == moe.balancers[0].name
    assert {key: getattr(moe, key) for key in wanted} == wanted
    model = build_model(load_config(tmp_path / "my.toml"), 300)
    _, routings = model(torch.randint(300, (1, 9)))
    balanced = name in ("load", "relu_sparsity") or table in ("scores", "selectors")
    assert balanced == bool(himoe.aux_losses(model, routings))


@pytest.mark.parametrize(("table", "name"), [("balancers", "hi_moe"), ("scores", "swiglu"), ("presets", "linear")])
def test_a_name_that_stands_in_another_table_is_shown_from_there(capsys, table, name):
    found, err = printed(capsys, table, name)
    home = next(kind for kind in TABLES if name in TABLES[kind])
    assert err.startswith(f"himoe: {name} is not in {table}; it is a ") and err.count("\n") == 1
    assert found == printed(capsys, home, name).out
    assert as_json(capsys, table, name)["table"] == home


@pytest.mark.parametrize("name", ["zero", "copy", "constant"])
def test_experts_without_hidden_layer_stand_beside_ordinary_ones(tmp_path, name):
    (tmp_path / "my.toml").write_text(f'recipe = "lm_tiny"\n{card("experts", name).configuration}', encoding="utf-8")
    model = build_model(load_config(tmp_path / "my.toml"), 300)
    for layer in moe_layers(model):
        assert [type(pool) for pool in layer.experts.pools] == [SwiGLUExperts, load("experts", name)]
    y, _ = model(torch.randint(300, (1, 9)))
    assert y.any()


def test_only_the_copy_cites_longcat_flash():
    cited = {name: card("experts", name).papers for name in ("zero", "copy", "constant")}
    assert cited == {"zero": ["2410.07348"], "copy": ["2410.07348", "2509.01322"], "constant": ["2410.07348"]}


def test_the_name_of_a_table_is_no_entry(capsys):
    assert main(["list", "balancers", "gates"]) == 2
    assert "gates is a table: himoe list gates" in capsys.readouterr().err


def test_first_lines_say_what_an_entry_is_and_not_what_it_raises():
    assert not [entry for table in TABLES for entry in entries(table) if "raises" in entry.description]


def test_a_name_alone_is_enough_where_one_table_has_it(capsys):
    out, err = printed(capsys, "two_level")
    assert (out, err) == (printed(capsys, "balancers", "two_level").out, "")
    assert printed(capsys, "lm_tiny").out == printed(capsys, "recipes", "lm_tiny").out


class Mine(Balancer):
    """Mine (arXiv 1234.56789).

    Args:
        strength: how much.
    """

    causal = False

    def __init__(self, num_experts: int, strength: float = 0.5) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(num_experts))


def given(scores, context, *, expert_ids: Int[torch.Tensor, "T K"]):
    """Whatever was given."""
    return expert_ids, torch.ones_like(expert_ids, dtype=torch.bool)


class Needy(Balancer):
    """Cannot be built without being told something."""

    def __init__(self, needed: int) -> None:
        super().__init__()


@pytest.fixture
def reader(monkeypatch):
    """Make this file importable as somebody's module."""
    module = types.ModuleType("reader", doc="What the reader says.")
    module.Mine, module.Needy, module.given = Mine, Needy, given
    monkeypatch.setitem(sys.modules, "reader", module)


def test_a_readers_own_has_a_card_too(capsys, reader):
    found = as_json(capsys, "balancers", "reader:Mine")
    assert (found["description"], found["papers"]) == ("Mine.", ["1234.56789"])
    assert found["options"] == [{"name": "strength", "kind": "number", "default": "0.5", "meaning": "how much."}]
    assert found["facts"]["state"] == {"seen": "(E,) float32"}
    assert (found["facts"]["balances_load"], found["facts"]["causal"]) == (False, False)
    assert found["configuration"].endswith('[[moe.balancers]]\nname = "reader:Mine"\nstrength = 0.5')
    assert as_json(capsys, "balancers", "reader:Needy")["facts"]["causal"] is None
    assert "# needed = …  # must be given" in printed(capsys, "balancers", "reader:Needy").out
    given = as_json(capsys, "selectors", "reader:given")
    assert (given["options"][0]["kind"], given["configuration"]) == ("tensor", "")
    assert (given["facts"]["causal"], given["facts"]["balances_load"]) == (True, False)
    assert "In Python only" in printed(capsys, "selectors", "reader:given").out


class Silent(Balancer):
    def __init__(self, rate: "float" = 0.5, name: "Unknown | None" = None) -> None:
        super().__init__()


class Postponed(Balancer):
    """Its annotations are text."""

    def __init__(self, rate: "float" = 0.5, ids: "torch.Tensor | None" = None) -> None:
        super().__init__()


def test_a_class_without_docstring_is_not_described_by_its_base(capsys, reader):
    sys.modules["reader"].Silent = Silent
    found = as_json(capsys, "balancers", "reader:Silent")
    assert (found["description"], found["text"]) == ("", [])
    assert [option["kind"] for option in found["options"]] == ["any", "any"]  # one cannot be read, so none is
    assert "It has no docstring." in printed(capsys, "balancers", "reader:Silent").out


def test_postponed_annotations_are_read(capsys, reader):
    sys.modules["reader"].Postponed = Postponed
    kinds = {option["name"]: option["kind"] for option in as_json(capsys, "balancers", "reader:Postponed")["options"]}
    assert kinds == {"rate": "number", "ids": "tensor or none"}
    moe = {"selector": "top_k", "balancers": [{"name": "reader:Postponed", "rate": "fast"}]}
    with pytest.raises(ConfigError, match=r"rate = 'fast' must be a number$"):
        build_model(load_config("lm_tiny", overrides={"moe": moe}), 300)


def test_a_readers_own_name_alone_needs_its_table(capsys, reader):
    assert main(["list", "reader:Mine"]) == 2
    assert "himoe list balancers reader:Mine" in capsys.readouterr().err


def test_a_list_in_a_docstring_is_wrapped_to_the_terminal(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    lines = printed(capsys, "st_moe").out.splitlines()
    assert max(map(len, lines)) <= 80
    assert len([line for line in lines if line.startswith("  - ")]) == 3


def test_list_of_a_recipe_is_its_file(capsys, tmp_path):
    assert main(["list", "recipes", "lm_tiny"]) == 0
    (tmp_path / "my.toml").write_text(capsys.readouterr().out, encoding="utf-8")
    assert main(["train", str(tmp_path / "my.toml"), "--dry-run"]) == 0
    assert main(["train", "lm_tiny", "--set", "name=my", "--dry-run"]) == 0
    first, second = capsys.readouterr().out.split("name = ")[1:]
    assert first.replace("none", "") == second.replace("none", "")
