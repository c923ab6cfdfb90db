"""Strategies against each other: what they are, the tuning, the pairs, the tables and the page."""

import json
import re
import sys
from functools import partial
from pathlib import Path

import pytest
from sweep_case import LOSS_OF

from himoe.analysis.comparison_page import build_page
from himoe.cli import main
from himoe.config import load_config
from himoe.errors import ConfigError, RunsFailedError
from himoe.sweep import build_table, run_sweep
from himoe.sweep.comparison import compare_strategies
from himoe.sweep.strategies import cost_notes, strategies

NAMES = ["hi_moe", "moge", "dense"]
RUNNER = "sweep_case:by_strategy"


def compared(out, console, names=NAMES, **options):
    found = strategies(names, "lm_tiny", ["train.steps=8", "train.learning_rate=0.006"])
    return compare_strategies(found, out, console=console, **{"seeds": 4, "runner": RUNNER, "retries": 0} | options)


# --- what a name stands for


def test_a_name_is_a_preset_with_its_defaults_a_balancer_a_dense_model_or_a_file(tmp_path):
    (tmp_path / "mine.toml").write_text('recipe = "lm_tiny"\n[moe]\npreset = "switch"\noptions = { alpha = 0.5 }\n')
    names = ["hi_moe", "switch", "quantile", "load", "dense", "lm_tiny", str(tmp_path / "mine.toml")]
    found = strategies(names, "lm_demo", ["train.steps=70", "moe.expert_dim=64"])
    assert list(found) == ["hi_moe", "switch", "quantile", "load", "dense", "lm_tiny", "mine"]
    assert {config.train.steps for config in found.values()} == {70}
    assert {name: config.moe.preset for name, config in found.items()} == {
        "hi_moe": "hi_moe", "switch": "switch", "quantile": None, "load": None, "dense": "hi_moe", "lm_tiny": "hi_moe",
        "mine": "switch",
    }  # fmt: skip
    recipe = load_config("lm_demo")
    assert recipe.moe.options and recipe.moe.balancers  # which are no strategy's default
    assert found["hi_moe"].moe.options == {} == found["switch"].moe.options and not found["hi_moe"].moe.balancers
    for name in ("quantile", "load"):
        moe = found[name].moe
        assert (moe.selector, moe.score, [one.name for one in moe.balancers]) == ("top_k", "softmax", [name])
    assert found["load"].moe.gate == "noisy"
    dense = found["dense"]
    assert dense.moe_layer_indices == [] and dense.model.ffn_dim == recipe.moe.top_k * 64
    assert found["mine"].moe.options == {"alpha": 0.5} and found["mine"].model.dim == load_config("lm_tiny").model.dim


def test_what_the_recipe_has_of_a_gate_does_not_stay_beside_a_balancer(tmp_path):
    recipe = tmp_path / "mine.toml"
    recipe.write_text(
        'recipe = "lm_tiny"\n[moe]\nselector = "top_k"\ngate = "cosine"\ngate_options = { proj_dim = 4 }\n'
    )
    found = strategies(["switch", "quantile"], str(recipe))
    assert found["quantile"].moe.gate == "linear" and found["quantile"].moe.gate_options == {}


@pytest.mark.parametrize("recipe", ["lm_tiny", "lm_demo", "lm_small"])
def test_presets_and_the_dense_model_cost_the_same(recipe):
    found = strategies(["hi_moe", "moge", "switch", "loss_free", "quantile", "dense"], recipe)
    assert cost_notes(found, "hi_moe") == []
    wider = strategies(["hi_moe", "lm_small"], recipe) | found
    notes = cost_notes(wider, "switch")
    assert len(notes) == (recipe != "lm_small") and all("lm_small costs +" in note for note in notes)
    for kind in ("gelu", "relu2"):
        assert cost_notes(strategies(["hi_moe", "dense"], recipe, [f"moe.experts={kind}"]), "hi_moe") == []


def test_a_cost_that_cannot_be_counted_is_told_of(tmp_path):
    (tmp_path / "own.toml").write_text('recipe = "lm_tiny"\n[moe]\nexperts = "my.module:Experts"\n')
    notes = cost_notes(strategies(["hi_moe", str(tmp_path / "own.toml")], "lm_tiny"), "hi_moe")
    assert notes == ["the FLOPs of own cannot be counted: whether it is at equal cost is not known"]


@pytest.mark.parametrize(
    ("names", "sets", "message"),
    [
        (["hi_moe"], [], "name two or more"),
        (["hi_moe", "hi_moe"], [], "name two or more"),
        (["hi_moe", "swich"], [], "swich: no such strategy; did you mean 'switch'?"),
        (["hi_moe", "none.toml"], [], "no configuration file none.toml"),
        (["lm_small_switch", "lm_tiny"], [], ""),
        (
            ["hi_moe", "switch"],
            ["moe.options.alpha=0.9"],
            "--set moe.options: the strategies, or the comparison, say this",
        ),
        (["hi_moe", "switch"], ["moe.preset=switch"], "--set moe.preset: "),
        (["hi_moe", "switch"], ["seed=3"], "--set seed: "),
        (["dense", "hi_moe"], ["moe.every=0"], "dense already"),
        (["dense", "hi_moe"], ["moe.every=2"], "dense layers of width 64 (swiglu) beside experts of 128"),
        (
            ["dense", "hi_moe"],
            ["moe.pools=[{num_experts=4,expert_dim=8},{num_experts=4,expert_dim=16}]"],
            "no one width",
        ),
    ],
)
def test_what_is_no_comparison_is_refused(names, sets, message):
    if message:
        with pytest.raises(ConfigError, match=re.escape(message)):
            strategies(names, "lm_tiny", sets)
    else:
        found = strategies(names, "lm_tiny", sets)
        with pytest.raises(ConfigError, match="differ in data, so"):
            compare_strategies(found, Path("x"), learning_rate=1e-3)


def test_two_names_of_one_thing_are_refused(tmp_path):
    def name(file, text=""):
        (tmp_path / file).write_text(f'recipe = "lm_tiny"\n{text}')
        return str(tmp_path / file)

    # the comparison gives all of them one rate, and the seeds
    for text in ("", "seed = 5\n", "[train]\nlearning_rate = 0.5\n"):
        with pytest.raises(ConfigError, match="the same configuration as lm_tiny"):
            strategies(["lm_tiny", name("again.toml", text)], "lm_tiny")
    with pytest.raises(ConfigError, match="another one is called switch"):
        strategies(["switch", name("switch.toml")], "lm_tiny")


# --- tuning, pairs


def test_the_rate_is_tuned_on_all_of_them_until_the_best_lies_within(tmp_path, console):
    found = compared(tmp_path, console).comparison
    tuning = found.tuning
    assert sorted(tuning.losses) == [0.003, 0.006, 0.012, 0.024]  # 0.012 was the best and an end of the first three
    assert (tuning.chosen, tuning.at_end, tuning.best_of("dense")) == (0.012, False, 0.012)
    assert tuning.losses[0.012]["hi_moe"] == pytest.approx(LOSS_OF["hi_moe"])
    table = build_table(tmp_path).runs()
    assert set(table.column("learning_rate").to_pylist()) == {0.012} and table.num_rows == 12
    assert tuning.seed == 0 and set(table.column("seed").to_pylist()) == {1, 2, 3, 4}
    assert build_table(tmp_path / "tuning").runs().num_rows == 12


def test_the_search_ends_two_rates_beyond(tmp_path, console):
    names = strategies(["hi_moe", "moge"], "lm_tiny", ["train.steps=8", "train.learning_rate=0.0001"])
    found = compare_strategies(names, tmp_path, seeds=2, runner=RUNNER, console=console).comparison
    assert len(found.tuning.losses) == 5 and found.tuning.at_end
    assert found.learning_rate == found.tuning.chosen == pytest.approx(0.0008)


def test_a_rate_at_which_one_failed_is_not_chosen_and_told_of(tmp_path, console):
    found = compared(tmp_path, console, runner="sweep_case:fails_at_the_best_rate").comparison
    assert found.learning_rate == 0.006 and found.tuning.at_end  # 0.012 is best, and moge has no result there
    assert found.tuning.losses[0.012]["moge"] is None and found.tuning.best_of("dense") == 0.012
    assert [note for note in found.notes if "tuning: moge at 0.012 failed" in note and "diverged" in note]


def test_what_failed_is_not_tried_again_when_the_search_goes_on(tmp_path, console):
    found = compared(tmp_path, console, runner="sweep_case:fails_at_a_low_rate").comparison
    assert sorted(found.tuning.losses) == [0.003, 0.006, 0.012, 0.024] and len(found.tuning.failures) == 3
    assert [file.read_text() for file in tmp_path.glob("tuning/runs/*/tries")] == ["x"] * 3


def test_without_a_rate_for_all_there_is_an_error(tmp_path, console, monkeypatch):
    monkeypatch.setattr("himoe.sweep.comparison.TUNING_SEED", 3)  # that of which switch fails
    with pytest.raises(
        RunsFailedError, match=r"at no learning rate of 0\.003, 0\.006, 0\.012 did every .* no third one"
    ):
        compared(tmp_path, console, ["hi_moe", "switch"])


def test_pairs_are_by_seed_and_the_word_by_their_spread(tmp_path, console):
    done = compared(tmp_path, console, learning_rate=0.012)
    found = done.comparison
    assert [one.name for one in found.strategies][2] == "dense" and found.against == "hi_moe"
    assert found.tuning is None and not (tmp_path / "tuning").exists()
    stored = load_config(tmp_path / "strategies/dense.json")
    assert (stored.name, stored.seed, stored.train.learning_rate) == ("dense", 1, 0.012)
    dense, moge = found.verdict_of("dense"), found.verdict_of("moge")
    # the seed moves the loss by up to 0.6, the difference by up to 0.006
    assert (dense.word, moge.word) == ("worse", "no difference seen")
    assert dense.difference == pytest.approx(0.3 + 0.003 * (1 + 2 + 0 + 1) / 4)
    assert dense.low > 0.29 and dense.seeds == (1, 2, 3, 4)
    assert found.verdict_of("hi_moe") is None
    by_domain = {domain: {one.name: one for one in told} for domain, told in found.domains.items()}
    assert by_domain["prose"]["dense"].difference == pytest.approx(dense.difference / 2)
    hi_moe = next(one for one in found.strategies if one.name == "hi_moe")
    assert (
        hi_moe.loss.value == pytest.approx(3.0 + 0.2 * 2.5)
        and hi_moe.domains["<code>"].value < hi_moe.domains["prose"].value
    )
    assert hi_moe.balance["cv"]["expert"].value == 0.2 and hi_moe.seconds.value == 2.0
    again = compared(tmp_path, console, learning_rate=0.012, against="dense")
    assert not again.result.outcomes and again.comparison.verdict_of("hi_moe").word == "better"
    more = compared(tmp_path, console, learning_rate=0.012, seeds=5)
    assert len(more.result.outcomes) == 3


def test_a_seed_that_failed_is_in_no_pair_and_told_of(tmp_path, console):
    done = compared(tmp_path, console, ["hi_moe", "switch"], learning_rate=0.012)
    found = done.comparison
    assert found.verdicts[0].seeds == (1, 2, 4) and found.verdicts[0].alone == (3,)
    assert [(one.name, "no third one" in one.reason) for one in found.left] == [("switch seed=3", True)]
    assert found.notes == ["switch has no finished run of seed 3: its mean and pairs are of the others"]
    page = build_page(found).document("")
    assert "no third one" in page and "&lt;code&gt;" in page and "<code>" not in page


def test_strategies_without_a_verdict_are_told_of_and_spoil_no_other(tmp_path, console):
    names = ["hi_moe", "moge", "switch", "dense"]
    how = {"seeds": 2, "learning_rate": 0.012, "runner": "sweep_case:some_fail"}
    found = compared(tmp_path, console, names, **how).comparison
    assert [one.name for one in found.verdicts] == ["dense"]
    assert sorted(one.name for one in found.strategies) == ["dense", "hi_moe", "moge"]
    assert found.notes == [
        "hi_moe has no finished run of seed 2: its mean and pairs are of the others",
        "moge shares no seed with the finished runs of hi_moe: there is no verdict on it",
        "none of the runs of switch can be used: it is in no table",
    ]
    build_page(found).document("")
    with pytest.raises(RunsFailedError, match=r"finished runs of switch: it has none \(.*switch seed=1 failed"):
        compared(tmp_path, console, names, **how, against="switch")
    with pytest.raises(RunsFailedError, match="of moge: no other strategy has a finished run of a seed that it has"):
        compared(tmp_path, console, ["moge", "hi_moe"], **how)


def test_runs_that_ended_early_are_in_no_mean(tmp_path, console):
    found = compared(tmp_path, console, learning_rate=0.012, runner="sweep_case:one_is_short").comparison
    assert [(one.name, one.reason) for one in found.left] == [("moge seed=2", "ended at 256 of 512 tokens")]
    assert found.verdict_of("moge").seeds == (1, 3, 4)


# --- the verb


def said(capsys, *words, status=0):
    assert main(["compare", *words]) == status
    return capsys.readouterr()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "--strategies: name two or more"),
        (["--strategies", "hi_moe"], "--strategies: name two or more"),
        (["--strategies", "hi_moe,switch"], "--out: say where"),
        (["lm_tony", "--strategies", "hi_moe,switch"], "did you mean 'lm_tiny'?"),
        (
            ["--strategies", "hi_moe,switch", "--out", "x", "--against", "moge"],
            "--against moge: must be one of hi_moe, switch",
        ),
        (["--strategies", "hi_moe,switch", "--out", "x", "--seeds", "1"], "--seeds 1: must be ≥ 2"),
        (
            ["--strategies", "hi_moe,switch", "--out", "x", "--learning-rate", "-1"],
            "--learning-rate -1: must be above 0",
        ),
        (["lm_tiny", "--strategies", "hi_moe,expert_choice", "--dry-run"], "recipe=expert_choice seed=0: "),
        (["--strategies", "hi_moe,switch", "--dry-run", "--learning-rate", "0"], "--learning-rate 0: must be above 0"),
        (["--strategies", "hi_moe,switch", "--dry-run", "--seeds", "1"], "--seeds 1: must be ≥ 2"),
        (["--strategies", "hi_moe,switch", "--dry-run", "--against", "moge"], "--against moge: must be one of"),
        (["lm_tiny", "--strategies", "hi_moe,lm_demo", "--dry-run"], "lm_demo and hi_moe differ in data"),
        (["--strategies", "hi_moe,switch", "--out", "file"], "file is a file"),
        (["--strategies", "hi_moe,switch", "--out", "x", "--data", 'no"such\\text'], 'no"such\\text'),
        (["--strategies", "hi_moe,switch", "--out", "x", "--set", "train.stops=1"], "train.stops"),
    ],
)
def test_bad_input_is_one_line_and_status_2(tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    error = said(capsys, *words, status=2).err
    assert message in error.splitlines()[-1] and error.splitlines()[-1].startswith("himoe: ")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_dry_run_names_the_runs_and_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = ["lm_tiny", "--strategies", "hi_moe,dense", "--seeds", "3", "--dry-run", "--json"]
    runs = json.loads(said(capsys, *words).out)["runs"]
    assert len(runs) == 3 * 2 + 3 * 2 and runs[0]["name"] == "learning_rate=0.0015 recipe=hi_moe seed=0"
    assert len(json.loads(said(capsys, *words, "--learning-rate", "1e-3").out)["runs"]) == 6
    assert not list(tmp_path.iterdir())


def test_a_run_that_fails_makes_the_status_1(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("himoe.sweep.comparison.run_sweep", partial(run_sweep, runner=RUNNER))
    words = ["lm_tiny", "--strategies", "hi_moe,switch", "--seeds", "3", "--out", "out", "--learning-rate", "0.01",
             "--retries", "0"]  # fmt: skip
    text = said(capsys, *words, status=1).out
    assert "left out switch seed=3: failed" in text and "no third one" in text
    monkeypatch.setattr("himoe.sweep.comparison.run_sweep", partial(run_sweep, runner="sweep_case:none_works"))
    words[words.index("out")] = "other"
    error = said(capsys, *words, status=1).err
    assert "himoe: nothing can be compared with the finished runs of hi_moe: it has none" in error


@pytest.mark.parametrize("package", ["plotly", "scipy"])
def test_a_package_that_is_missing_is_told_before_anything_runs(tmp_path, monkeypatch, capsys, package):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("himoe.cli.compare.find_spec", lambda name: None if name == package else object())
    if package == "scipy":
        monkeypatch.setitem(sys.modules, "scipy.special", None)
    error = said(capsys, "lm_tiny", "--strategies", "hi_moe,switch", "--out", "out", status=2).err
    assert package in error and "himoe[analysis]" in error and not list(tmp_path.iterdir())


def test_real_runs_end_in_tables_a_page_and_one_document(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("".join(f"{i} words, some others, {i * i}\n\n" for i in range(3000)))
    words = ["lm_tiny", "--strategies", "hi_moe,switch,dense", "--data", "text.txt", "--seeds", "2", "--out", "out",
             "--set", "train.steps=4", "--learning-rate", "3e-3"]  # fmt: skip
    text = said(capsys, *words).out
    assert "3 strategies, 2 seeds, 2.048K tokens a run, learning rate 0.003, as given" in text
    assert "switch against hi_moe: " in text and "report: out/comparison.html" in text
    found = json.loads(said(capsys, *words, "--json").out)
    assert {one["name"] for one in found["strategies"]} == {"hi_moe", "switch", "dense"}
    assert {one["name"]: set(one["balance"]["cv"]) for one in found["strategies"]} == {
        "hi_moe": {"expert", "group"}, "switch": {"expert", "group"}, "dense": set(),
    }  # fmt: skip
    assert found["verdicts"][0]["sentence"].endswith("four times in five")
    page = (tmp_path / "out/comparison.html").read_text(encoding="utf-8")
    assert "Difference to hi_moe" in page and "http:" not in page.partition("<script>")[0]
    assert main(["train", "out/strategies/switch.json", "--dry-run"]) == 0
