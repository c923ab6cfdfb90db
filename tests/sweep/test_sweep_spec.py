"""What a spec leads to: which runs, called what, the same ones once; and what is refused, in one line."""

import itertools
import tomllib

import pytest

from himoe.errors import ConfigError
from himoe.plan import parameters, shape_of
from himoe.sweep import expand, load_spec, shipped_names
from himoe.sweep.expand import num_combinations


def test_axes_multiply_in_their_order_and_zipped_ones_move_together():
    spec = tomllib.loads("""
        recipe = "lm_tiny"
        [set]
        train.steps = 30
        [axes]
        seed = [3, 4]
        moe.preset = ["hi_moe", "moge"]
        [[zip]]
        model.dim = [32, 64]
        "model.num_heads" = [2, 4]
    """)
    runs = expand(spec)
    found = [(r.config.moe.preset, r.config.model.dim, r.config.model.num_heads, r.config.seed) for r in runs]
    pairs = [(32, 2), (64, 4)]
    assert found == [(p, *pair, s) for s, p, pair in itertools.product([3, 4], ["hi_moe", "moge"], pairs)]
    assert all(run.config.train.steps == 30 for run in runs)
    assert runs[0].name == "preset=hi_moe dim=32 num_heads=2 seed=3"
    assert len({run.id for run in runs}) == 8


def test_a_run_is_its_results(tmp_path, monkeypatch):
    """Equal runs of several axes are one; what changes no result, and how a path is written, make no other run."""
    monkeypatch.chdir(tmp_path)
    base = {"recipe": "lm_tiny", "axes": {"moe.preset": ["hi_moe"]}}
    spec = load_spec({**base, "axes": {"moe.preset": ["hi_moe", "hi_moe"], "train.learning_rate": [0.001, 1e-3]}})
    assert num_combinations(spec) == 4 and len(expand(spec)) == 1

    def run_id(**changes):
        (run,) = expand({**base, **changes})
        return run.id

    assert run_id() == run_id(set={"train.threads": 1, "train.checkpoint_every": 3, "train.log_to": ["tensorboard"]})
    assert run_id(data="text") == run_id(data=str(tmp_path / "text")) != run_id()
    others = [{"seed": 1}, {"train.eval_every": 5}, {"moe.options.alpha": 0.5}, {"moe.backend": "loop"}]
    assert len({run_id(), *(run_id(set=change) for change in others)}) == 5


@pytest.mark.parametrize("keep", ["active", "total"])
def test_a_family_keeps_its_size_as_the_plan_counts_it(keep):
    sizes = {"granularity": ["1/2", "1/4", "1/8"], "sparsity": [2, 4], "shared": [0, "1/2"]}
    if keep == "total":
        sizes["shared"] = [0]
    runs = expand(
        {"recipe": "lm_tiny", "set": {"moe.preset": "switch", "moe.num_groups": 1}, "family": {"keep": keep, **sizes}}
    )
    assert len(runs) == 6 * len(sizes["shared"])
    counts = [parameters(shape_of(run.config)) for run in runs]
    sized = {getattr(one, keep) - one.by_role["router"] for one in counts}
    other = {getattr(one, "total" if keep == "active" else "active") for one in counts}
    assert len(sized) == 1 and len(other) > 2
    moe = runs[0].config.moe  # lm_tiny: D 32, K·F = 4·32, E·F = 8·32
    if keep == "active":
        assert (moe.expert_dim, moe.top_k, moe.num_experts) == (64, 2, 4)
        half = next(run for run in runs if run.varied["shared"] == "1/2" and run.varied["granularity"] == "1/4")
        assert (half.config.moe.shared_dim, half.config.moe.top_k, half.config.moe.num_experts) == (64, 2, 8)
    else:
        assert (moe.expert_dim, moe.top_k, moe.num_experts) == (64, 2, 4)


def test_a_family_has_pools_of_several_sizes():
    family = {"granularity": ["1/4", ["1/4", "1/8"]], "sparsity": [4], "width": 1}
    spec = {"recipe": "lm_tiny", "set": {"moe.selector": "top_k_per_group", "moe.num_groups": 1}, "family": family}
    one, both = (run.config.moe for run in expand(spec))
    assert (one.top_k, one.num_experts, one.expert_dim) == (4, 16, 32)
    assert [(pool.num_experts, pool.expert_dim) for pool in both.pools] == [(8, 32), (16, 16)]
    assert both.top_k_per_group == [2, 4] and list(map(len, both.groups)) == [8, 16]
    assert both.score == "softmax_per_group" and both.selector == "top_k_per_group"


REFUSED = [
    ({"axes": {"moe.num_expert": [1]}}, r"\[axes\] moe.num_expert: unknown key; did you mean 'moe.num_experts'"),
    ({"axes": {"lr": [1]}}, r"\[axes\] lr: unknown key; did you mean 'train.learning_rate'"),
    ({"axes": {"moe.preset": ["hi_mo"]}}, r"preset=hi_mo: moe.preset = \"hi_mo\": must be one of hi_moe, .*'hi_moe'\?"),
    ({"axes": {"moe.num_experts": [8, 6, 7]}}, r"num_experts=6: .* multiple .*\(and 1 more runs that cannot be\)"),
    ({"axes": {"seed": []}}, r"axes.seed = \[\]: must have at least 1"),
    ({"axes": {"train.threads": [1, 2]}}, r"train.threads changes no result"),
    ({"axes": {"seed": [1]}, "set": {"seed": 2}}, r"\[axes\] seed stands in \[set\] too"),
    ({"zip": [{"seed": [1, 2], "model.dim": [32]}]}, r"equally long: seed has 2, model.dim has 1"),
    ({"axe": {}}, r"axe = \{\}: unknown key; did you mean 'axes'"),
    ({"recipe": "lm_tini"}, r"no recipe 'lm_tini'.*'lm_tiny'"),
    ({"family": {"keep": "activ"}}, r"family.keep = \"activ\": must be one of active, total"),
    ({"family": {"sparsity": ["1/0"]}}, r"family.sparsity.* must be a number ≥ 0"),
    ({"family": {"granularity": ["1/3"]}}, r"\[family\] leads to moe.expert_dim = 42\.6667, which must be a whole"),
    ({"family": {"sparsity": [2]}, "axes": {"moe.top_k": [1]}}, r"moe.top_k is what \[family\] chooses"),
]


@pytest.mark.parametrize(("spec", "message"), REFUSED)
def test_what_cannot_be_is_told_in_one_line(spec, message):
    with pytest.raises(ConfigError, match=message) as found:
        expand({"recipe": "lm_tiny", **spec})
    assert "\n" not in str(found.value)


@pytest.mark.parametrize("name", shipped_names())
def test_shipped_sweeps_can_be(name):
    runs = expand(name)
    assert len(runs) > 3 and len({run.name for run in runs}) == len(runs)


def test_a_recipe_may_be_an_axis_and_a_text_several_domains(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    spec = {"data": {"a": "one.txt", "b": "/two.txt"}, "axes": {"recipe": ["lm_small", "lm_small_dense"]}}
    moe, dense = expand({**spec, "set": {"train.steps": 100}})
    assert (moe.config.name, dense.config.name) == ("lm_small", "lm_small_dense") and moe.id != dense.id
    assert moe.config.moe_layer_indices and not dense.config.moe_layer_indices and dense.config.train.steps == 100
    assert moe.config.data.sources == {"a": str(tmp_path / "one.txt"), "b": "/two.txt"} and moe.config.data.path is None
