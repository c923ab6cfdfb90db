import json
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from line_writer import Lines

from himoe.errors import HimoeWarning, MissingExtraError
from himoe.run_folder import clear_run_folder
from himoe.train import writers
from himoe.train.writers import Guarded, JsonLines, RunIdentity, check_writers, flatten, open_writers

ENV = {"id": "x-0123abcd", "started": "2026-01-01T00:00:00+00:00", "command": ["himoe", "train"]}
TRAIN = {"kind": "train", "step": 10, "loss": 2.5, "aux": {"switch": 0.25}, "noise_scale": None, "max_vio": 1}
LOAD = {"step": 10, "layers": [{"layer": 3, "load": [4, 4], "max_vio_window": 0.5, "dead_experts": []}]}
EVAL = {"kind": "eval", "step": 20, "loss": 2.0, "domains": {"code": {"bits_per_byte": 1.5}}}
ALARM = {"kind": "alarm", "step": 20, "alarm": "loss_spike", "layer": None, "text": "loss 9 at step 20"}


def identity(folder, step=0):
    return RunIdentity.of(folder, {"name": "x", "train": {"steps": 20, "betas": [0.9, 0.95]}}, ENV, step=step)


class Broken:
    """A writer that fails from its second line on."""

    def __init__(self):
        self.calls = 0

    def log(self, line):
        self.calls += 1
        if self.calls > 1:
            raise OSError("no\nspace")

    def close(self):
        raise AssertionError("a writer that failed is not called again")


def test_numbers_get_names_for_charts():
    assert flatten(TRAIN) == {"train/loss": 2.5, "train/aux/switch": 0.25, "train/max_vio": 1.0}
    assert flatten(LOAD) == {"layer/3/max_vio_window": 0.5}
    assert flatten(EVAL) == {"eval/loss": 2.0, "eval/domain/code/bits_per_byte": 1.5}
    named_alike = {"loss": {"loss": 3.0}, "domain": {"loss": 4.0}}
    names = {"eval/loss": 2.0, "eval/domain/loss/loss": 3.0, "eval/domain/domain/loss": 4.0}
    assert flatten({**EVAL, "domains": named_alike}) == names
    assert flatten({**EVAL, "final": True}) == flatten(EVAL)
    assert flatten(ALARM) == {}


def test_a_writer_that_fails_warns_once_and_is_dropped():
    said, broken, sound = [], Broken(), Lines()
    guarded = Guarded({"broken": broken, "sound": sound}, warn=said.append)
    for line in (TRAIN, EVAL, LOAD):
        guarded.log(line)
    guarded.close()
    assert said == ["broken failed and gets no more lines (OSError: no space); training goes on"]
    assert sound.lines == [TRAIN, EVAL, LOAD] and sound.closed and broken.calls == 2


def test_the_warning_is_a_himoe_warning_when_nobody_else_takes_it():
    guarded = Guarded({"broken": Broken()})
    guarded.log(TRAIN)
    with pytest.warns(HimoeWarning, match="broken failed"):
        guarded.log(TRAIN)
    guarded.close()


def test_a_writer_that_cannot_be_opened_is_a_warning(tmp_path, monkeypatch):
    monkeypatch.setitem(writers.WRITERS, "tensorboard", "no_such_module:Writer")
    said = []
    open_writers(["tensorboard"], identity(tmp_path), warn=said.append).log(TRAIN)
    assert len(said) == 1 and "tensorboard cannot be opened (ModuleNotFoundError" in said[0]


def test_a_missing_package_is_named_with_its_extra(monkeypatch, tmp_path):
    check_writers([])
    (tmp_path / "a_tool").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(MissingExtraError, match="a_tool is not installed"):
        check_writers(["a_tool"])  # a folder is no package
    monkeypatch.setattr("himoe.train.writers.opening.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"wandb is not installed.*himoe\[wandb\]"):
        check_writers(["wandb"])


def test_every_name_of_the_configuration_has_a_writer_and_none_is_imported_unasked():
    from typing import get_args

    from himoe.config.schema import TrainConfig

    (names,) = get_args(TrainConfig.model_fields["log_to"].annotation)
    assert set(get_args(names)) == set(writers.WRITERS)
    tools = ("tensorboard", "trackio", "wandb", "mlflow")
    code = f"import sys, himoe.train.writers; print([tool for tool in {tools} if tool in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_the_json_lines_go_to_two_files(tmp_path):
    lines = JsonLines(tmp_path)
    for line in (TRAIN, LOAD, EVAL, ALARM):
        lines.log(line)
    with pytest.raises(ValueError, match="JSON compliant"):
        lines.log({**TRAIN, "loss": float("nan")})
    lines.close()
    assert [json.loads(text) for text in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [TRAIN, EVAL, ALARM]
    assert json.loads((tmp_path / "load.jsonl").read_text()) == LOAD


def test_a_run_has_the_identity_of_its_environment_wherever_it_lies(tmp_path):
    one = identity(tmp_path / "one")
    assert one.id == identity(tmp_path / "renamed", step=10).id == "x-0123abcd"
    assert (one.name, identity(tmp_path / "renamed").name) == ("one", "renamed")
    assert one.config == {"name": "x", "train.steps": 20, "train.betas": [0.9, 0.95]}


def write(name, folder):
    """Write as a run does that was stopped after step 20, had its checkpoint at 10, and went on."""
    said = []
    for step, lines in ((0, [TRAIN, LOAD, EVAL, ALARM]), (10, [{**TRAIN, "step": 20, "loss": 2.25}])):
        opened = open_writers([name], identity(folder, step), warn=said.append)
        for line in lines:
            opened.log(line)
        opened.close()
    assert said == []


def test_a_run_that_is_replaced_takes_its_charts_along(tmp_path):
    (tmp_path / "notes").mkdir()
    write("tensorboard", tmp_path)
    clear_run_folder(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes"]


def test_tensorboard_shows_numbers_and_alarms_and_hides_what_was_cut_back(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    write("tensorboard", tmp_path)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {
        "train/loss",
        "train/aux/switch",
        "train/max_vio",
        "layer/3/max_vio_window",
        "eval/loss",
        "eval/domain/code/bits_per_byte",
    }
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(10, 2.5), (20, 2.25)]
    assert events.Scalars("eval/loss") == []  # of step 20, beyond the checkpoint of step 10
    assert events.Tags()["tensors"] == ["alarm/loss_spike/text_summary"]


def test_trackio_goes_on_with_the_run(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read when it is imported, which is here
    pytest.importorskip("trackio")
    write("trackio", tmp_path / "run")
    with sqlite3.connect(tmp_path / "trackio" / "himoe.db") as database:
        rows = database.execute("select run_name, step, metrics from metrics order by id").fetchall()
    losses = [(step, json.loads(metrics)["train/loss"]) for _, step, metrics in rows if b"train/loss" in metrics]
    assert losses == [(10, 2.5), (20, 2.25)] and len({name for name, _, _ in rows}) == 1


def test_wandb_stays_offline_and_keeps_its_id(tmp_path):
    pytest.importorskip("wandb")
    write("wandb", tmp_path)
    files = list((tmp_path / "wandb").glob(f"offline-run-*/run-{identity(tmp_path).id}.wandb"))
    assert files and all(file.stat().st_size for file in files)


def test_mlflow_goes_on_with_the_run(tmp_path):
    mlflow = pytest.importorskip("mlflow")
    write("mlflow", tmp_path)
    client = mlflow.MlflowClient((tmp_path / "mlflow").as_uri())
    (run,) = client.search_runs([client.get_experiment_by_name("himoe").experiment_id])
    history = client.get_metric_history(run.info.run_id, "train/loss")
    assert [(metric.step, metric.value) for metric in history] == [(10, 2.5), (20, 2.25)]
    assert run.data.params["train.steps"] == "20" and run.info.status == "FINISHED"
    assert Path(tmp_path / "mlflow").is_dir()
