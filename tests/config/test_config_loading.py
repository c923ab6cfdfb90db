"""Where values come from, and that a resolved configuration comes back the same."""

import json

import pytest

from himoe.config import Config, format_document, load_config, recipe_description, recipe_names
from himoe.config.loading import merge, parse_sets
from himoe.errors import ConfigError


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return path


def test_defaults_then_recipe_then_file_then_set(tmp_path):
    recipe = load_config("lm_tiny")
    assert recipe.train.weight_decay == 0.1  # the default, which the recipe leaves alone
    assert recipe.train.steps == 20  # the recipe's
    file = write(tmp_path / "mine.toml", 'recipe = "lm_tiny"\n[train]\nsteps = 30\nseq_len = 16\n')
    assert (load_config(file).train.steps, load_config(file).train.seq_len, load_config(file).model.dim) == (30, 16, 32)
    changed = load_config(file, sets=["train.steps=40"])
    assert (changed.train.steps, changed.train.seq_len) == (40, 16)
    over = load_config(file, sets=["data.path=a"], overrides={"data": {"path": "b"}})
    assert over.data.path == "b"


def test_a_file_that_names_no_recipe_lies_over_the_default_one(tmp_path):
    config = load_config(write(tmp_path / "my first.toml", "[train]\nsteps = 70\n"))
    assert config == load_config(sets=["train.steps=70", "name=my-first"])


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("100", 100),
        ("1e-3", 0.001),
        ("[1, 2]", [1, 2]),
        ("true", True),
        ("moge", "moge"),
        ('"7"', "7"),
        ("a b", "a b"),
        ('[{name = "z_loss"}]', [{"name": "z_loss"}]),
        ("a=b", "a=b"),
        ("1\nx = 2", "1\nx = 2"),
    ],
)
def test_set_reads_toml_and_else_text(text, value):
    assert parse_sets([f"a.b={text}"]) == {"a": {"b": value}}


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ('data.weights."example.com"', "example.com"),
        ("data.weights.'a = \"b\"'", 'a = "b"'),
        ('data . weights . "\\u00e9 \\"x\\""', 'é "x"'),
        ("data.weights.my-web", "my-web"),
        ("data.weights.the web's", "the web's"),
    ],
)
def test_a_name_with_a_dot_is_quoted_as_in_toml(key, name):
    assert parse_sets([f"{key}=0.5", "data.weights.b=0.5"]) == {"data": {"weights": {name: 0.5, "b": 0.5}}}
    assert load_config("lm_tiny", sets=[f"{key}=0.5", "data.weights.b=0.5"]).data.weights == {name: 0.5, "b": 0.5}


@pytest.mark.parametrize(
    "text", ["steps", "=3", "train..steps=3", ".=1", 'data.weights."a=1', 'data.weights."a"b=1', '""=1', '"\\x"=1']
)
def test_set_without_key_and_value_says_how_it_looks(text):
    with pytest.raises(ConfigError, match=r"must look like key=value, as in --set train\.steps=100"):
        parse_sets([text])


def test_none_switches_off_what_a_lower_layer_set(tmp_path):
    assert load_config("lm_tiny", sets=["data.eval_tokens=none"]).data.eval_tokens is None
    file = write(tmp_path / "mine.toml", '[data]\neval_tokens = "none"\n')
    assert load_config(file).data.eval_tokens is None
    with pytest.raises(ConfigError, match=r'train.steps = "none": must be a whole number'):
        load_config("lm_tiny", sets=["train.steps=none"])


def test_another_preset_drops_the_options_of_the_one_before():
    below = {"moe": {"preset": "hi_moe", "options": {"inter": 0.1}, "top_k": 4}}
    assert merge(below, {"moe": {"preset": "moge"}}) == {"moe": {"preset": "moge", "top_k": 4}}
    more = merge(below, {"moe": {"options": {"intra": 0.2}}})
    assert more["moe"]["options"] == {"inter": 0.1, "intra": 0.2}
    assert below["moe"]["options"] == {"inter": 0.1}  # layers are left as they were


def test_other_data_drops_what_was_said_of_the_data_before():
    mixture = {"data": {"sources": {"a": "x"}, "weights": {"a": 1.0}, "vocab_size": 300}}
    assert merge(mixture, {"data": {"path": "y"}}) == {"data": {"path": "y", "vocab_size": 300}}
    one_path = {"data": {"path": "y", "domain_column": "kind", "weights": {"z": 1.0}}}
    assert merge(one_path, mixture) == mixture
    assert merge(mixture, {"data": {"weights": {"a": 0.5, "b": 0.5}}})["data"]["sources"] == {"a": "x"}
    assert merge(mixture, {"data": {"path": "none"}})["data"]["sources"] == {"a": "x"}


def test_a_source_that_lies_elsewhere_keeps_its_share_and_a_new_one_asks_for_new_shares():
    mixture = {"sources": {"a": "x", "b": "y"}, "weights": {"a": 0.25, "b": 0.75}}
    moved = merge({"data": mixture}, parse_sets(["data.sources.a=one.jsonl"]))["data"]
    assert moved == {"sources": {"a": "one.jsonl", "b": "y"}, "weights": {"a": 0.25, "b": 0.75}}
    assert "weights" not in merge({"data": mixture}, parse_sets(["data.sources.c=z"]))["data"]
    assert merge({"data": {"path": "x", "weights": {"a": 1.0}}}, {"data": {"sources": {"a": "x"}}})["data"] == {
        "sources": {"a": "x"}
    }


def test_what_one_command_line_says_belongs_together():
    weights = ["data.weights={a = 0.5, b = 0.5}"]
    data = load_config("lm_tiny", sets=weights, overrides={"data": {"path": "corpus"}}).data
    assert (data.path, data.weights) == ("corpus", {"a": 0.5, "b": 0.5})


def test_sources_and_their_weights_from_a_file(tmp_path):
    text = '[data.sources]\n"the web" = "web"\ncode = "c"\n[data.weights]\n"the web" = 0.25\ncode = 0.75\n'
    file = write(tmp_path / "mixture.toml", text)
    data = load_config(file).data
    assert (data.sources, data.weights) == ({"the web": "web", "code": "c"}, {"the web": 0.25, "code": 0.75})
    over = load_config(file, overrides={"data": {"path": "other.txt"}}).data
    assert (over.path, over.sources, over.weights) == ("other.txt", None, None)


@pytest.mark.parametrize("key", ["data.weights", "data.sources", "data.domain_column", "data.workers"])
def test_none_leaves_out_what_data_may_do_without(key):
    name = key.partition(".")[2]
    assert getattr(load_config("lm_tiny", sets=[f"{key}=none"]).data, name) is None


@pytest.mark.parametrize("name", ["ema_decay", "init_from", "keep_every", "early_stop"])
def test_none_leaves_out_what_training_may_do_without(tmp_path, name):
    file = write(tmp_path / "mine.toml", f'[train]\n{name} = "none"\nrecompute = "none"\n')
    train = load_config(file).train
    assert (getattr(train, name), train.recompute) == (None, "none")


def test_a_selector_takes_the_place_of_the_preset_and_back():
    spelled = load_config("lm_tiny", sets=["moe.selector=top_k"])
    assert (spelled.moe.preset, spelled.moe.selector, spelled.moe.score) == (None, "top_k", "softmax")
    back = merge({"moe": {"selector": "top_k", "score": "sigmoid"}}, {"moe": {"preset": "moge"}})
    assert back == {"moe": {"preset": "moge"}}


def test_balancers_keep_their_options_beside_the_name():
    config = load_config("lm_tiny", sets=['moe.balancers=[{name="z_loss", weight=1e-3}, {name="my.module:Balancer"}]'])
    first, second = config.moe.balancers
    assert (first.name, first.options) == ("z_loss", {"weight": 1e-3})
    assert (second.name, second.options) == ("my.module:Balancer", {})


def test_unequal_groups_settle_their_number_and_top_k():
    sets = ["moe.groups=[[0, 1], [2, 3, 4, 5, 6, 7]]", "moe.top_k_per_group=[1, 2]"]
    moe = load_config("lm_tiny", sets=sets).moe
    assert (moe.num_groups, moe.top_k) == (2, 3)


@pytest.mark.parametrize(
    ("sets", "layers"),
    [
        ([], [0, 1]),
        (["moe.every=2"], [1]),
        (["moe.every=0"], []),
        (["moe.layers=[1, 0]"], [0, 1]),
        (["moe.layers=[]"], []),
        (["model.num_layers=5", "moe.every=2"], [1, 3]),
    ],
)
def test_which_layers_have_experts(sets, layers):
    assert load_config("lm_tiny", sets=sets).moe_layer_indices == layers


ROUND_TRIPS = [
    [],
    ["moe.selector=top_k", "moe.score=sigmoid", 'moe.balancers=[{name="loss_free", rate=1e-3}]'],
    ["moe.preset=moge", "moe.groups=[[0, 1], [2, 3, 4, 5, 6, 7]]", "moe.top_k_per_group=[1, 2]", "moe.layers=[1]"],
    ['data.sources={a = "x.txt", b-2 = "y"}', "data.weights={a = 0.25, b-2 = 0.75}", "data.cross_documents=true"],
    ["train.ema_decay=0.99", "train.keep_every=1000", "train.early_stop=1", "train.log_to=['wandb']"],
    ["moe.capacity_factor=1.25", "train.betas=[0, 0.99]", "train.threads=2", 'data.path="ä \\"b\\"\\\\c"'],
    ["moe.options={a = 1, b.c = [true, 'x']}", "train.learning_rate=1e-05", "train.schedule=wsd"],
    ["moe.pools=[{num_experts=4}, {num_experts=4, expert_dim=8, experts='zero'}]", "moe.num_groups=4", "moe.top_k=4"],
    ['moe.balancers=[{name="switch", schedule={kind="warmup", steps=3}}, {name="z_loss", per_group=true}]'],
]


@pytest.mark.parametrize("sets", ROUND_TRIPS)
@pytest.mark.parametrize("recipe", recipe_names())
def test_a_resolved_configuration_loads_to_an_equal_one(tmp_path, recipe, sets):
    sets = [*sets, "moe.num_experts=8"] if any("groups" in text for text in sets) else sets
    config = load_config(recipe, sets=sets)
    stored = json.dumps(config.model_dump(mode="json"))
    assert Config.model_validate(json.loads(stored)) == config
    assert load_config(write(tmp_path / "config.json", stored)) == config
    assert load_config(write(tmp_path / "other.toml", format_document(config.model_dump()))) == config


def test_every_recipe_describes_itself_in_its_first_line():
    assert {"lm_demo", "lm_tiny"} <= set(recipe_names())
    for name in recipe_names():
        assert len(recipe_description(name)) > 20
        assert load_config(name).name == name


def test_the_default_recipe_is_a_hi_moe_model_with_16_experts_in_4_groups():
    moe = load_config().moe
    assert (moe.preset, moe.num_groups) == ("hi_moe", 4)
    assert moe.num_experts >= 16


def test_another_preset_leaves_the_balancers_beside_the_one_below_behind():
    below = {"moe": {"preset": "hi_moe", "balancers": [{"name": "loss_free"}]}}
    assert merge(below, {"moe": {"preset": "moge"}})["moe"] == {"preset": "moge"}
    own = {"preset": "moge", "balancers": [{"name": "z_loss"}]}
    assert merge(below, {"moe": own})["moe"] == own
    assert merge(below, {"moe": {"top_k": 2}})["moe"]["balancers"] == [{"name": "loss_free"}]
