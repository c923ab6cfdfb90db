"""What the verbs hand to the run, and what they print of its results; the run itself is a stand-in."""

import json
import os
import sys
import time
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest

from himoe.cli import main
from himoe.cli.folders import new_folder
from himoe.config import load_config, recipe_names
from himoe.run_folder import locked

LAYER = {"max_vio_window": 0.125, "max_vio_batch": 0.5, "cv_window": 0.25, "group_mass": 0.26, "concentration": 0.75}
SUMMARY = {
    "status": "finished",
    "step": 20,
    "tokens": 10_240,
    "seconds": 4.0,
    "tokens_per_second": 2560.0,
    "bits_per_byte": 1.5,
    "domains": {
        "code": {"bits_per_byte": 1.8, "perplexity": 12.5, "unigram": 4.5, "bigram": 3.6},
        "[prose]": {"bits_per_byte": 4.4, "perplexity": 9.0, "unigram": 4.5, "bigram": 4.0},
    },
    "layers": [{"layer": 0, **LAYER}, {"layer": 3, **LAYER, "max_vio_window": 2.0}],
    "peak_memory_mib": 321.0,
}


class RangeTest:
    def __str__(self):
        return "table"

    def as_dict(self):
        return {"suggestion": 0.001}


@pytest.fixture
def calls(monkeypatch, tmp_path):
    """Put a stand-in for the run in place, in an empty working directory; return what it is called with."""
    made = SimpleNamespace(summary=dict(SUMMARY), train=None, report=None)

    def train(config, **given):
        made.train = {"config": config, **given}
        given["console"].print("progress")
        return made.summary

    def range_test(config, console):
        made.range_test = config
        return RangeTest()

    def write_report(run, out=None):
        made.report = (run, out)
        return out or run / "report.html"

    monkeypatch.setitem(sys.modules, "himoe.run", SimpleNamespace(train=train, range_test=range_test))
    monkeypatch.setitem(sys.modules, "himoe.report", SimpleNamespace(write_report=write_report))
    monkeypatch.chdir(tmp_path)
    return made


def store_run(folder, *, finished, age=0):
    """Write the files by which a run folder is known."""
    folder = Path(folder)
    folder.mkdir(parents=True)
    config = load_config("lm_tiny", sets=["train.steps=7"]).model_dump(mode="json")
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    if finished is not None:
        status = "finished" if finished else "interrupted"
        (folder / "summary.json").write_text(json.dumps({"status": status}), encoding="utf-8")
    written = 1_700_000_000 - age
    os.utime(folder / "config.json", (written, written))
    return folder


def test_train_hands_everything_to_the_run(calls):
    arguments = [
        "train",
        "lm_tiny",
        "--data",
        "texts",
        "--out",
        "o",
        "--set",
        "train.steps=5",
        "--set",
        "seed=3",
        "--force",
    ]
    assert main(arguments) == 0
    made = calls.train
    assert made["config"] == load_config("lm_tiny", sets=["train.steps=5", "seed=3", "data.path=texts"])
    assert (made["out"], made["resume"], made["force"]) == (Path("o"), False, True)
    assert made["command"] == ["himoe", *arguments]


def test_train_alone_takes_the_default_recipe_and_a_new_folder(calls):
    assert main(["train"]) == 0
    assert calls.train["config"] == load_config("lm_demo")
    assert calls.train["out"].parent == Path("runs")
    name, day, clock = calls.train["out"].name.split("-")
    assert (name, len(day), len(clock)) == ("lm_demo", 8, 6)


def test_closing_tables_say_what_came_of_the_run(calls, capsys):
    Path("o").mkdir()
    Path("o/report.html").touch()
    assert main(["train", "lm_tiny", "--out", "o"]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = {line.split()[0]: line.split()[1:] for line in lines if line.strip()}
    assert rows["code"] == ["1.800", "4.500", "3.600", "50.0", "%", "12.50"]
    assert rows["[prose]"] == ["4.400", "4.500", "4.000", "-10.0", "%", "9.00"]
    assert rows["3"] == ["2.000", "0.500", "0.250", "0.260", "0.750"]
    assert " ".join(rows["finished"]) == "step 20, 10,240 tokens in 4 s"
    assert " ".join(rows["speed"]) == "2,560 tokens/s, peak memory 321 MiB"
    assert rows["report"] == ["o/report.html"]
    assert max(map(len, lines)) <= 80
    assert "Balance of the layers" in lines and "dropped" not in " ".join(lines)


def test_a_report_that_was_not_written_is_not_named(calls, capsys):
    assert main(["train", "lm_tiny", "--out", "o"]) == 0
    assert "report" not in capsys.readouterr().out


def test_closing_tables_show_dropped_pairs(calls, capsys):
    calls.summary["layers"] = [{"layer": 0, **LAYER, "drop_rate": 0.0}, {"layer": 3, **LAYER, "drop_rate": 0.375}]
    assert main(["train", "lm_tiny", "--out", "o"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert next(line for line in lines if line.startswith("layer")).endswith("dropped")
    assert next(line for line in lines if line.startswith("3 ")).split()[-1] == "0.375"
    assert max(map(len, lines)) <= 80


def test_json_is_one_document_on_stdout_and_progress_goes_to_stderr(calls, capsys):
    assert main(["train", "lm_tiny", "--out", "o", "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out) == {"run": "o", **SUMMARY}
    assert err == "progress\n"


def test_a_run_stopped_before_any_evaluation_still_closes_cleanly(calls, capsys):
    calls.summary |= {
        "status": "interrupted",
        "domains": {},
        "layers": [],
        "tokens_per_second": None,
        "bits_per_byte": None,
    }
    assert main(["train", "lm_tiny", "--out", "o"]) == 130
    assert "interrupted  step 20" in capsys.readouterr().out


def test_dry_run_prints_a_file_that_gives_the_same_configuration(calls, capsys, tmp_path):
    assert main(["train", "lm_tiny", "--set", "train.steps=5", "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert tomllib.loads(text)["train"]["steps"] == 5
    Path("again.toml").write_text(text, encoding="utf-8")
    assert load_config("again.toml") == load_config("lm_tiny", sets=["train.steps=5"])
    assert main(["train", "lm_tiny", "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == load_config("lm_tiny").model_dump(mode="json")
    assert calls.train is None
    assert [path.name for path in tmp_path.iterdir()] == ["again.toml"]


@pytest.mark.parametrize(
    ("sets", "text"),
    [
        (["moe.selector=top_p", "moe.selector_options={q=1}"], "moe.selector 'top_p': unknown option q = 1"),
        (["moe.selector=expert_choice"], "not causal as configured"),
        (["moe.options={lambda=1}"], "unknown option lambda = 1"),
        (["moe.selector=top_k", 'moe.balancers=[{name="load"}]'], 'moe.gate = "noisy"'),
        (["moe.selector=replay", "moe.selector_options={expert_ids=[[1]]}"], "expert_ids is a tensor"),
    ],
)
def test_a_dry_run_refuses_what_building_refuses(calls, capsys, sets, text):
    command = ["train", "lm_tiny", *(word for value in sets for word in ("--set", value))]
    assert main([*command, "--dry-run"]) == 2
    out, err = capsys.readouterr()
    assert text in err and err.count("\n") == 1 and out == ""


@pytest.mark.filterwarnings("ignore::himoe.errors.HimoeWarning")
@pytest.mark.parametrize("recipe", recipe_names())
def test_every_recipe_passes_a_dry_run_without_memory_for_its_weights(calls, recipe, monkeypatch):
    def on_meta(model, *arguments, **options):
        assert all(parameter.is_meta for parameter in model.parameters())
        assert not arguments and options == {"allowed": False}

    monkeypatch.setattr("himoe.build.model._refuse_if_not_causal", on_meta)
    assert main(["train", recipe, "--dry-run"]) == 0


def test_seed_profile_and_start_are_handed_over(calls):
    run = store_run("runs/a", finished=True)
    assert main(["train", "lm_tiny", "--seed", "7", "--profile", "--init-from", str(run), "--out", "o"]) == 0
    made = calls.train
    assert made["config"] == load_config("lm_tiny", sets=["seed=7", "train.init_from=runs/a"])
    assert made["profile"] is True
    assert main(["train", "lm_tiny", "--seed", "0"]) == 0
    assert calls.train["config"].seed == 0 and calls.train["profile"] is False


@pytest.mark.parametrize("place", ["runs/a", "runs/a/checkpoints/step-00000010"])
def test_a_start_brings_its_configuration_where_no_recipe_is_named(calls, place):
    store_run("runs/a", finished=True)
    assert main(["train", "--init-from", place, "--data", "texts", "--set", "train.steps=9"]) == 0
    expected = ["train.steps=9", "data.path=texts", f"train.init_from={place}"]
    assert calls.train["config"] == load_config("lm_tiny", sets=expected)
    assert main(["train", "--init-from", "runs/b"]) == 2


def test_a_start_that_is_no_run_names_the_nearest(calls, capsys):
    store_run("runs/a-1", finished=True)
    assert main(["train", "--init-from", "runs/a-2"]) == 2
    assert "run folder runs/a-2 does not exist; did you mean 'runs/a-1'?" in capsys.readouterr().err


def test_finding_a_learning_rate_trains_no_run(calls, capsys, tmp_path):
    assert main(["train", "lm_tiny", "--find-learning-rate", "--seed", "3"]) == 0
    assert capsys.readouterr().out == "table\n"
    assert calls.range_test == load_config("lm_tiny", sets=["seed=3"])
    assert main(["train", "lm_tiny", "--find-learning-rate", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"suggestion": 0.001}
    assert calls.train is None and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("status", "code"), [("finished", 0), ("stopped early", 0), ("interrupted", 130), ("stopped by an alarm", 3)]
)
def test_the_exit_status_says_how_a_run_ended(calls, status, code):
    calls.summary["status"] = status
    assert main(["train", "lm_tiny", "--out", "o"]) == code


def test_resume_takes_the_configuration_of_the_run(calls):
    run = store_run("somewhere", finished=None)
    assert main(["train", "--resume", "--out", str(run)]) == 0
    assert calls.train["config"].train.steps == 7
    assert (calls.train["out"], calls.train["resume"]) == (run, True)


def test_resume_may_change_single_values(calls):
    run = store_run("somewhere", finished=None)
    assert main(["train", "--resume", "--out", str(run), "--set", "train.accumulate=4", "--train.log-every", "3"]) == 0
    assert calls.train["config"] == load_config(run / "config.json", sets=["train.accumulate=4", "train.log_every=3"])


def test_resume_alone_takes_the_newest_unfinished_run(calls, capsys):
    assert main(["train", "--resume"]) == 2
    assert "no unfinished run under runs/" in capsys.readouterr().err
    store_run("runs/a", finished=None, age=300)
    store_run("runs/b", finished=False, age=200)
    store_run("runs/c", finished=True, age=100)
    early = store_run("runs/d", finished=True, age=50)
    (early / "summary.json").write_text('{"status": "stopped early"}', encoding="utf-8")
    assert main(["train", "--resume"]) == 0
    assert calls.train["out"] == Path("runs/b")
    (Path("runs/c") / "summary.json").write_text("{", encoding="utf-8")  # killed while it was written
    assert main(["train", "--resume"]) == 0
    assert calls.train["out"] == Path("runs/c")


def test_resume_alone_leaves_a_run_alone_that_goes_on_right_now(calls):
    store_run("runs/a", finished=None, age=300)
    with locked(store_run("runs/b", finished=None, age=200)):
        assert main(["train", "--resume"]) == 0
    assert calls.train["out"] == Path("runs/a")


def test_a_new_folder_never_has_the_name_of_another(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(time, "strftime", lambda _: "20260130-120000")
    names = []
    for _ in range(3):
        folder = new_folder("a")
        folder.mkdir(parents=True)
        names.append(folder.name)
    assert names == ["a-20260130-120000", "a-20260130-120000-2", "a-20260130-120000-3"]


@pytest.mark.parametrize(
    ("extra", "named"),
    [
        (["lm_tiny"], "a recipe"),
        (["--seed", "0"], "--seed"),
        (["--data", "x"], "--data"),
        (["--init-from", "x"], "--init-from"),
        (["--find-learning-rate"], "--find-learning-rate"),
        (["--force"], "--force"),
    ],
)
def test_resume_refuses_what_would_change_the_run(calls, capsys, extra, named):
    store_run("runs/a", finished=None)
    assert main(["train", "--resume", *extra]) == 2
    assert f"--resume goes on with what stands in the run folder; leave {named} out" in capsys.readouterr().err
    assert calls.train is None


@pytest.mark.parametrize(
    ("extra", "named"),
    [
        (["--out", "x"], "--out"),
        (["--force"], "--force"),
        (["--profile"], "--profile"),
        (["--profile", "--out", "x", "--force"], "--out and --force and --profile"),
    ],
)
def test_finding_a_learning_rate_refuses_what_is_of_a_run_folder(calls, capsys, extra, named):
    assert main(["train", "lm_tiny", "--find-learning-rate", *extra]) == 2
    assert f"--find-learning-rate writes no run folder; leave {named} out" in capsys.readouterr().err
    assert not hasattr(calls, "range_test")


def test_report_prints_where_the_page_is(calls, capsys):
    run = store_run("runs/a", finished=True)
    assert main(["report", str(run)]) == 0
    assert capsys.readouterr().out == "runs/a/report.html\n"
    assert main(["report", str(run), "--out", "page.html", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"report": "page.html"}
    assert calls.report == (run, Path("page.html"))


def test_a_wrong_or_missing_run_names_the_nearest(calls, capsys):
    store_run("runs/lm_tiny-1", finished=True)
    assert main(["eval", "runs/lm_tiny-2"]) == 2
    assert "run folder runs/lm_tiny-2 does not exist; did you mean 'runs/lm_tiny-1'?" in capsys.readouterr().err
    assert main(["report"]) == 2
    assert "name a run folder, such as runs/lm_tiny-1" in capsys.readouterr().err
