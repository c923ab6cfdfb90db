"""A whole run: what it writes and prints."""

import io
import json
import math
import re
import sys
import threading
from pathlib import Path

import pytest
from rich.console import Console
from run_case import SHORT, config, lines, read, train, weights

from himoe import run
from himoe.config import load_config
from himoe.errors import MissingExtraError, RunFolderError
from himoe.kernels import BACKENDS
from himoe.train.alarms import Alarm

PAGE = Path(__file__).parents[2] / "docs" / "run-folder.md"


def test_the_folder_holds_what_its_page_says(finished, text):
    out, summary, _ = finished
    documents = {"config.json", "env.json", "metrics.jsonl", "load.jsonl", "summary.json", "tokenizer.json"}
    assert {path.name for path in out.iterdir()} == documents | {"checkpoints", "report.html"}
    assert load_config(out / "config.json") == config(text)
    env = read(out / "env.json")
    assert env["command"] == ["himoe", "train"] and env["threads"] == 1
    assert len(env["kernels"]) == 1 and env["kernels"][0] in BACKENDS
    assert set(env["data"]["domains"]) == set(env["baselines"]) == {"verse", "prose"}
    assert env["parameters"]["total"] > env["parameters"]["active"] > 0
    assert read(out / "summary.json") == summary
    assert [path.name for path in sorted((out / "checkpoints").iterdir())] == ["step-00000004", "step-00000008"]


def page_section(title):
    """Return the keys in the tables and the JSON examples of a section of docs/run-folder.md."""
    section = PAGE.read_text().split(f"## {title}\n")[1].split("\n## ")[0]
    cells = re.findall(r"^\| (`.*?`) \|", section, re.MULTILINE)
    examples = [json.loads(block) for block in re.findall(r"```json\n(.*?)```", section, re.DOTALL)]
    return set(re.findall(r"`([\w.]+)`", " ".join(cells))), examples


def test_the_page_names_every_key_that_is_written(finished):
    out, summary, _ = finished
    env = read(out / "env.json")
    written = {f"data.{key}" for key in env["data"]} | set(env) - {"data"}
    assert page_section("env.json")[0] == written | {"resumed", "init_from"}
    assert page_section("summary.json")[0] == set(summary)
    _, (train_example, eval_example, alarm_example) = page_section("metrics.jsonl")
    metrics = lines(out / "metrics.jsonl")
    assert train_example.keys() == metrics[0].keys()
    assert eval_example.keys() == metrics[-1].keys()
    assert eval_example["domains"]["code"].keys() == metrics[-1]["domains"]["verse"].keys()
    position = {"kind", "step", "tokens", "seconds"}
    assert alarm_example.keys() == position | Alarm("loss_spike", 1, None, "higher").line().keys()
    keys, (load_example,) = page_section("load.jsonl")
    load = lines(out / "load.jsonl")[0]
    assert load_example.keys() == load.keys()
    assert load_example["layers"][0].keys() == load["layers"][0].keys() == keys


def test_metrics_and_load_lines(finished):
    out, summary, _ = finished
    metrics = lines(out / "metrics.jsonl")
    assert [(line["kind"], line["step"]) for line in metrics] == [
        ("train", 3), ("eval", 4), ("train", 6), ("train", 8), ("eval", 8),
    ]  # fmt: skip
    first = metrics[0]
    assert first["tokens"] == 3 * 8 * 64
    assert first["loss"] == pytest.approx(math.log(257), rel=0.1)
    load = lines(out / "load.jsonl")
    assert [line["step"] for line in load] == [3, 6, 8]
    for line, steps in zip(load, (3, 3, 2), strict=True):
        for layer in line["layers"]:
            assert sum(layer["load"]) == steps * 8 * 64 * 4  # every token has 4 experts
            assert layer["drop_rate"] == 0
    assert [layer["layer"] for layer in load[0]["layers"]] == [0, 1]
    assert summary["layers"][0].keys() == load[0]["layers"][0].keys() - {"load"}
    assert summary["max_vio_window"] == max(layer["max_vio_window"] for layer in summary["layers"])


def test_the_final_evaluation_reads_all_held_out_text(finished, text):
    out, summary, _ = finished
    sizes = read(out / "env.json")["data"]["domains"]
    for name, record in summary["domains"].items():
        assert record["bytes"] == sizes[name]["held_out_bytes"] and record["tokens"] == sizes[name]["held_out_tokens"]
        assert record["unigram"] > record["bigram"] > 0
        assert record["bits_per_byte"] == pytest.approx(
            record["loss"] * record["tokens"] / math.log(2) / record["bytes"]
        )
    periodic = lines(out / "metrics.jsonl")[1]
    assert {record["tokens"] for record in periodic["domains"].values()} == {500}


def test_progress_is_plain_lines_where_there_is_no_terminal(finished):
    printed = finished[2]
    assert "step 3/8 · loss" in printed and "tokens/s" in printed and "left" in printed
    assert "step 4: held-out bits per byte" in printed
    assert "\x1b" not in printed


def test_a_terminal_gets_a_bar(text, tmp_path):
    console = Console(file=io.StringIO(), force_terminal=True, width=160)
    run.train(config(text, "train.steps=2", "train.warmup_steps=0", "train.log_every=1"), out=tmp_path, console=console)
    printed = console.file.getvalue()
    assert "step 2/2" in printed and "MaxVio" in printed


def test_evaluating_and_logging_do_not_change_training(finished, text, tmp_path):
    train(config(text, "train.eval_every=1", "train.log_every=1", "train.checkpoint_every=1"), tmp_path / "run")
    assert weights(tmp_path / "run") == weights(finished[0])


def test_training_outside_the_main_thread(text, tmp_path):
    results = []
    thread = threading.Thread(target=lambda: results.append(train(config(text, *SHORT), tmp_path / "run")))
    thread.start()
    thread.join()
    assert results[0][0]["status"] == "finished"


@pytest.mark.parametrize("error", [MissingExtraError("plotly", "report"), RunFolderError("cannot write the report")])
def test_without_a_report_the_run_still_succeeds(text, tmp_path, monkeypatch, error):
    def fail(out):
        raise error

    monkeypatch.setattr(run, "write_report", fail)
    summary, printed = train(config(text, *SHORT), tmp_path / "run")
    assert summary["status"] == "finished"
    assert f"no report.html: {error}" in printed


def test_a_system_that_does_not_tell_its_memory_trains_too(text, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "resource", None)  # as on Windows
    summary, _ = train(config(text, *SHORT), tmp_path / "run")
    assert summary["status"] == "finished" and summary["peak_memory_mib"] is None


def test_a_model_without_experts_trains_too(text, tmp_path):
    summary, _ = train(config(text, *SHORT, "moe.every=0"), tmp_path / "run")
    assert summary["layers"] == [] and summary["max_vio_window"] is None
    assert (tmp_path / "run/load.jsonl").read_text() == ""
    assert Path(tmp_path / "run/report.html").is_file()


def test_dropped_pairs_are_told(text, tmp_path):
    summary, _ = train(config(text, *SHORT, "moe.capacity_factor=0.5"), tmp_path / "run")
    (line,) = lines(tmp_path / "run/load.jsonl")
    for layer, final in zip(line["layers"], summary["layers"], strict=True):
        assert 0.5 <= layer["drop_rate"] == final["drop_rate"] < 1
        assert sum(layer["load"]) == pytest.approx((1 - layer["drop_rate"]) * 8 * 64 * 4)


def test_experts_in_some_layers_only(text, tmp_path):
    summary, _ = train(config(text, *SHORT, "moe.every=2"), tmp_path / "run")
    assert [layer["layer"] for layer in summary["layers"]] == [1]
