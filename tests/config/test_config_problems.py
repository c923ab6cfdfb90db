"""What a user reads when a configuration cannot work."""

import pytest

from himoe.config import Config, load_config
from himoe.config.problems import OTHER_NAMES
from himoe.config.schema import key_tree
from himoe.errors import ConfigError

SPELLED = ["moe.selector=top_k", "moe.num_groups=1"]
SOURCES = 'data.sources={code = "c.txt", web = "w"}'
UNEQUAL = "moe.groups=[[0, 1], [2, 3, 4, 5, 6, 7]]"

ONE_PROBLEM = [
    # unknown keys, with the nearest known one
    (["train.stpes=3"], "train.stpes = 3: unknown key; did you mean 'steps'?"),
    (["trian.steps=3"], "trian = { steps = 3 }: unknown key; did you mean 'train'?"),
    (["steps=3"], "steps = 3: unknown key; did you mean 'train.steps'?"),
    (["moe.dim=3"], "moe.dim = 3: unknown key; did you mean 'model.dim'?"),
    (["num_expert=3"], "num_expert = 3: unknown key; did you mean 'moe.num_experts'?"),
    (["qqq=3"], "qqq = 3: unknown key; known here: name, seed, data, model, moe, train"),
    # as other projects call them
    (["train.lr=3e-4"], "train.lr = 0.0003: unknown key; did you mean 'train.learning_rate'?"),
    (["lr=3e-4"], "lr = 0.0003: unknown key; did you mean 'train.learning_rate'?"),
    (["moe.hidden_size=64"], "moe.hidden_size = 64: unknown key; did you mean 'model.dim'?"),
    (["moe.num_experts_per_tok=2"], "unknown key; did you mean 'moe.top_k'?"),
    (["train.max_steps=5"], "unknown key; did you mean 'train.steps'?"),
    # in a table within a section
    (
        ["moe.pools=[{num_experts=8, hidden=3}]"],
        "moe.pools[0].hidden = 3: unknown key; known here: num_experts, expert_dim",
    ),
    (
        ["moe.pools=[{num_experts=8, expert_dmi=3}]"],
        "moe.pools[0].expert_dmi = 3: unknown key; did you mean 'expert_dim'?",
    ),
    (["moe.pools=[{num_experts=8, dim=3}]"], "moe.pools[0].dim = 3: unknown key; known here: num_experts, expert_dim"),
    (
        ['moe.balancers=[{name="switch", schedule={kind="warmup", steps=3, scale="x"}}]'],
        "moe.balancers[0].schedule.scale = \"x\": unknown key; did you mean 'scales'?",
    ),
    # names from the tables
    (["moe.preset=hi_mo"], "did you mean 'hi_moe'?"),
    (['moe.balancers=[{name="los_free"}]'], 'moe.balancers[0].name = "los_free": must be one of logit_correction'),
    (['moe.balancers=[{name="los_free"}]'], "did you mean 'loss_free'?"),
    (["moe.experts=swiglo"], "or your own 'package.module:Class'; did you mean 'swiglu'?"),
    ([*SPELLED, "moe.selector=topk"], "did you mean 'top_k'?"),
    ([*SPELLED, "moe.score=sofmax"], "did you mean 'softmax'?"),
    (["train.schedule=cosin"], "must be one of cosine, wsd, linear, inverse_sqrt, constant; did you mean 'cosine'?"),
    # types and ranges
    (["train.steps=1e3"], "train.steps = 1000.0: must be a whole number"),
    (["train.steps=true"], "train.steps = true: must be a whole number"),
    (["train.steps=2147483648"], "train.steps = 2147483648: must be ≤ 2147483647"),
    ([f"model.dim={10**30}"], "must be ≤ 2147483647"),
    ([f"moe.shared_dim={10**30}"], "must be ≤ 2147483647"),
    (["data.vocab_size=2147483648"], "must be ≤ 2147483647"),
    (["data.eval_tokens=2147483648"], "must be ≤ 2147483647"),
    (["train.threads=1025"], "train.threads = 1025: must be ≤ 1024"),
    (["train.steps=-1"], "train.steps = -1: must be ≥ 1"),
    (["train.learning_rate=fast"], 'train.learning_rate = "fast": must be a number'),
    (["train.learning_rate=-0.1"], "must be > 0"),
    (["train.learning_rate=nan"], "must be a finite number"),
    (["train.grad_clip=inf"], "must be a finite number"),
    (["model.qk_norm=1"], "must be true or false"),
    (["data.path=2024"], "data.path = 2024: must be text in quotes"),
    (["data.path="], "must not be empty"),
    (["data.held_out=1"], "must be < 1"),
    (["train.betas=[0.9]"], "must be given"),
    (["train.betas=[0.9, 0.9, 0.9]"], "must have at most 2"),
    (["train.betas=0.9"], "must be a list of two numbers"),
    (["train.betas=[0.9, 1.0]"], "train.betas[1] = 1.0: must be < 1"),
    (["moe.layers=1"], "must be a list, as in [1]"),
    (["train.log_to=tensorboard"], 'must be a list, as in ["tensorboard"]'),
    (["moe.options=1"], "must be a table of keys"),
    (["moe.balancers=[1]"], "moe.balancers[0] = 1: must be a table of keys"),
    (["moe.balancers=[{weight=1}]"], "moe.balancers[0].name: must be given"),
    (["train=3"], "train = 3: must be a table of keys"),
    (["moe=3"], "moe = 3: must be a table of keys"),
    (["name=a b"], "name = \"a b\": may hold letters, digits, '.', '_' and '-' only"),
    (["seed=-1"], "must be ≥ 0"),
    # combinations
    (["moe.num_experts=10"], "moe.num_experts = 10: must be a multiple of moe.num_groups (4), such as 8 or 12"),
    (["moe.top_k=40"], "moe.top_k = 40: must be ≤ moe.num_experts (8)"),
    (
        ["moe.top_k=3"],
        "moe.top_k = 3: must be a multiple of moe.num_groups (4), such as 4: 'hi_moe' takes equally many",
    ),
    (["moe.selector=top_k_per_group", "moe.top_k=6"], "'top_k_per_group' takes equally many from each group"),
    (["model.dim=33"], "model.dim = 33: must be a multiple of model.num_heads (2), such as 32 or 34"),
    (["model.dim=34"], "model.dim = 34: gives heads of width 17; rotary positions need an even width"),
    (
        ["model.num_heads=4", "model.num_kv_heads=3"],
        "model.num_heads = 4: must be a multiple of model.num_kv_heads (3)",
    ),
    (["train.accumulate=3"], "train.batch_size = 8: must be a multiple of train.accumulate (3), such as 6 or 9"),
    (["train.warmup_steps=20"], "train.warmup_steps = 20: must be < train.steps (20)"),
    (
        ["train.schedule=wsd", "train.warmup_steps=10", "train.decay_fraction=0.6"],
        "train.decay_fraction = 0.6: must be ≤ 0.5",
    ),
    (["moe.layers=[0, 2]"], "layers go from 0 to 1 (model.num_layers = 2)"),
    (["moe.layers=[-1]"], "layers go from 0 to 1"),
    (["moe.layers=[1, 1]"], "names a layer twice"),
    (["moe.every=3"], "moe.every = 3: must be ≤ model.num_layers (2)"),
    (["moe.preset=moge", "moe.selector=top_k"], "moe.selector = \"top_k\": cannot stand beside moe.preset ('moge')"),
    (["moe.preset=none"], 'moe.selector = "none": must be given where moe.preset is none; give one of the two'),
    (["moe.score=sigmoid"], "moe.score = \"sigmoid\": cannot stand beside moe.preset ('hi_moe')"),
    ([*SPELLED, "moe.options={a = 1}"], "a balancer's options stand in its own entry of moe.balancers"),
    # data and training, as far as it is known before anything is read
    (["data.path=a", 'data.sources={a = "b"}'], "cannot stand beside data.path ('a'); give one of the two"),
    (["data.sources={a = 3}"], "data.sources.a = 3: must be text in quotes"),
    (
        ["data.domain_column=x", 'data.sources={a = "b"}'],
        "cannot stand beside data.sources, each of which is one domain",
    ),
    (["data.domain_column=text"], "data.domain_column = \"text\": is data.text_column ('text') too"),
    (["data.weights={a = 0.5, b = 0.6}"], "must sum to 1, these sum to 1.1; in proportion: a = 0.454545, b = 0.545455"),
    (["data.weights={a = 0, b = 0}"], "the shares must sum to 1, these sum to 0"),
    (["data.weights={a = -1}"], "data.weights.a = -1: must be ≥ 0"),
    (["data.weights={}"], "must have at least 1"),
    (
        [SOURCES, "data.weights={web = 0.5, cod = 0.5}"],
        "there is no domain 'cod', only code, web; did you mean 'code'?",
    ),
    ([SOURCES, "data.weights={web = 1}"], "no share for code; give every domain one, 0 leaves a domain out"),
    (["train.keep_every=15"], "must be a multiple of train.checkpoint_every (10), such as 10 or 20"),
    (["train.early_stop=2"], "would never act: there are 2 evaluations (train.steps = 20, train.eval_every = 10)"),
    (['train.log_to=["wandb", "mlflow", "wandb"]'], "names a writer twice"),
    (['train.log_to=["wandbb"]'], "did you mean 'wandb'?"),
    (["train.recompute=all"], "must be one of none, selective, full"),
    (["train.ema_decay=1"], "train.ema_decay = 1: must be < 1"),
    # a gate beside a preset
    (["moe.gate=linear"], "moe.gate = \"linear\": cannot stand beside moe.preset ('hi_moe'), which brings its own"),
    (["moe.preset=a.b:c", "moe.gate=noisy"], "cannot stand beside moe.preset ('a.b:c'), which brings its own"),
    (["moe.gate_options={noise_floor=1}"], "belong to moe.gate, and moe.preset ('hi_moe') brings its own gate"),
    # lists that hold nothing
    (["moe.pools=[]"], "moe.pools = []: must have at least 1"),
    (["moe.groups=[]"], "moe.groups = []: must hold each expert from 0 to 7 exactly once"),
    (["moe.top_k_per_group=[]"], "moe.top_k_per_group = []: must have one entry for each of the 4 groups"),
    # groups of unequal size
    (["moe.groups=[[0, 1], [2, 3]]"], "must hold each expert from 0 to 7 exactly once"),
    (["moe.groups=[[0, 1, 1], [2, 3, 4, 5, 6, 7]]", "moe.top_k=2"], "exactly once"),
    (
        ["moe.groups=[[], [0, 1, 2, 3, 4, 5, 6, 7]]", "moe.top_k_per_group=[1, 1]"],
        "moe.groups[0] = []: must have at least 1",
    ),
    ([UNEQUAL, "moe.num_groups=3", "moe.top_k=3"], "moe.groups lists 2 groups; leave moe.num_groups out"),
    ([UNEQUAL, "moe.top_k=6"], "takes 3 experts from each group, and the smallest group has 2"),
    ([UNEQUAL, "moe.selector=top_k"], "needs selection by group: a preset of hi_moe"),
    ([UNEQUAL, "moe.top_k_per_group=[1, 2, 1]"], "must have one entry for each of the 2 groups"),
    ([UNEQUAL, "moe.top_k_per_group=[3, 2]"], "must be ≤ the sizes of the groups (2, 6)"),
    ([UNEQUAL, "moe.top_k_per_group=[1, 2]", "moe.top_k=4"], "sums to 3, but moe.top_k is 4; leave moe.top_k out"),
    ([UNEQUAL, "moe.top_k_per_group=[0, 2]"], "moe.top_k_per_group[0] = 0: must be ≥ 1"),
]


def refusal(sets):
    with pytest.raises(ConfigError) as caught:
        load_config("lm_tiny", sets=sets)
    return str(caught.value)


@pytest.mark.parametrize(("sets", "text"), ONE_PROBLEM, ids=lambda value: value[0] if isinstance(value, list) else "")
def test_one_problem_is_one_line(sets, text):
    message = refusal(sets)
    assert text in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("warmup_steps", "steps", "most"),
    [(100, 300, 0.666), (1, 7, 0.857), (1999, 2000, 0.0005), (1, 3000, 0.999), (45, 100, 0.55)],
)
def test_the_decay_that_is_advised_is_accepted(warmup_steps, steps, most):
    sets = ["train.schedule=wsd", f"train.steps={steps}", f"train.warmup_steps={warmup_steps}"]
    assert f"must be ≤ {most:g}: the warm-up takes" in refusal([*sets, "train.decay_fraction=1"])
    load_config("lm_tiny", sets=[*sets, f"train.decay_fraction={most:g}"])


def test_names_of_other_projects_lead_to_keys_and_are_none():
    keys = {section: set(names) for section, names in key_tree(Config).items()}
    for theirs, ours in OTHER_NAMES.items():
        section, _, key = ours.partition(".")
        assert key in keys[section]
        assert not any(theirs in names for names in keys.values())


def test_all_problems_are_reported_together():
    sets = ["moe.num_expert=32", "train.schedule=cosin", "moe.top_k=40", "train.warmup_steps=50", "seed=-1"]
    assert refusal(sets).splitlines() == [
        "5 problems in the configuration:",
        "  seed = -1: must be ≥ 0",
        "  moe.num_expert = 32: unknown key; did you mean 'num_experts'?",
        '  train.schedule = "cosin": must be one of cosine, wsd, linear, inverse_sqrt, constant; '
        "did you mean 'cosine'?",
        "  moe.top_k = 40: must be ≤ moe.num_experts (8)",
        "  train.warmup_steps = 50: must be < train.steps (20)",
    ]


def test_a_key_with_a_problem_of_its_own_is_in_no_rule():
    assert refusal(["moe.num_experts=many"]) == 'moe.num_experts = "many": must be a whole number'


def test_long_values_are_cut():
    assert "…" in refusal([f"train.steps={'x' * 500}"])
    assert len(refusal([f"train.steps={'x' * 500}"])) < 120


@pytest.mark.parametrize(
    "sets",
    [
        ["moe.selector=top_k", "moe.top_k=3"],  # flat selection need not be even over the groups
        ["moe.preset=my.package:router", "moe.top_k=3"],
        ["moe.preset=my.package:router", UNEQUAL, "moe.top_k=3"],
        [UNEQUAL, "moe.top_k=4"],
        ["train.schedule=wsd", "train.warmup_steps=10", "train.decay_fraction=0.5"],
        [SOURCES, "data.weights={web = 1, code = 0}"],
        ["data.weights={a = 0.333333, b = 0.333333, c = 0.333333}"],  # domains are known once the text is read
        ["train.early_stop=1", "train.keep_every=20"],
    ],
)
def test_unusual_but_possible_combinations_pass(sets):
    load_config("lm_tiny", sets=sets)


def test_the_library_door_reports_as_the_files_do():
    with pytest.raises(ConfigError, match=r"3 problems.*\n  model: must be given\n  moe: must be given\n  train: must"):
        Config.model_validate({"name": "x"})
    with pytest.raises(ConfigError, match="configuration = 3: must be a table of keys"):
        Config.model_validate(3)
    good = load_config("lm_tiny").model_dump()
    with pytest.raises(ConfigError, match=r"moe.top_k = 3: must be a multiple"):
        Config(**{**good, "moe": {**good["moe"], "top_k": 3}})


def test_files_that_cannot_be_read(tmp_path):
    def message(name, content):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ConfigError) as caught:
            load_config(tmp_path / name)
        return str(caught.value)

    assert "not valid TOML" in message("a.toml", b"steps 3\n")
    assert "line 1" in message("a.toml", b"steps 3\n")
    assert "not valid JSON" in message("a.json", b"{")
    assert "must hold one table of keys" in message("b.json", b"[1]")
    assert "not UTF-8 text (byte 1)" in message("c.toml", b"a\xff")
    assert "no recipe 'lm_tin'" in message("d.toml", b'recipe = "lm_tin"')
    assert "must be the name of a recipe" in message("e.toml", b"recipe = 3")
    with pytest.raises(ConfigError, match=r"no configuration file .*dd\.toml; did you mean 'd\.toml'\?"):
        load_config(tmp_path / "dd.toml")
    (tmp_path / "folder.toml").mkdir()
    with pytest.raises(ConfigError, match="cannot read"):
        load_config(tmp_path / "folder.toml")


def test_an_unknown_recipe_names_the_nearest():
    with pytest.raises(ConfigError, match=r"no recipe 'lm_tny'; known: .*; did you mean 'lm_tiny'\? \(a file of yours"):
        load_config("lm_tny")
