"""`himoe sweep`: what it prints and returns, before, after and instead of runs; Ctrl-C."""

import csv
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from himoe.cli import main
from himoe.sweep import run_sweep

SPEC = """
recipe = "lm_tiny"
[set]
train.steps = 40
[axes]
moe.num_experts = [8, 16]
seed = [0, 0, 1]
"""


HELPERS = str(Path(__file__).parents[1] / "sweep")


@pytest.fixture
def spec(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "spec.toml").write_text(SPEC)
    return "spec.toml"


def said(capsys, *words, status=0):
    assert main(["sweep", *words]) == status
    return capsys.readouterr()


def test_a_dry_run_prints_runs_and_sums_and_starts_nothing(spec, tmp_path, capsys):
    text = said(capsys, spec, "--dry-run", "--set", "train.steps=20").out
    assert "num_experts=8 seed=0" in text and "4 runs (2 more are the same as others), 40,960 tokens" in text
    found = json.loads(said(capsys, spec, "--dry-run", "--json", "--data", "text").out)
    assert found["merged"] == 2 and [run["name"] for run in found["runs"]][:2] == [
        "num_experts=8 seed=0",
        "num_experts=8 seed=1",
    ]
    plan = json.loads((main(["plan", "lm_tiny", "--set", "train.steps=40", "--json"]), capsys.readouterr().out)[1])
    first = found["runs"][0]
    assert first["active_parameters"] == plan["parameters"]["active"]
    assert first["training_flops"] == plan["training"]["flops"]
    shipped = json.loads(said(capsys, "shared_expert", "--dry-run", "--json", "--set", "seed=7", "--data", "text").out)
    assert len(shipped["runs"]) == 12 and shipped["runs"][1]["name"] == "granularity=1/8 sparsity=4 shared=1/8"
    assert [path.name for path in tmp_path.iterdir()] == ["spec.toml"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "name a sweep"),
        (["spec.tom"], "no sweep 'spec.tom'; known: balancing"),
        (["spek.toml", "--out", "x"], "no sweep file spek.toml; did you mean 'spec.toml'?"),
        (["spec.toml"], "--out: say where"),
        (["spec.toml", "--out", "spec.toml"], "spec.toml is a file"),
        (["spec.toml", "--out", "x", "--retries", "-1"], "--retries -1: must be"),
        (["spec.toml", "--out", "x", "--slurm", "gpu"], "--slurm gpu: must look like"),
        (["spec.toml", "--dry-run", "--set", "train.stops=1"], "[set] train.stops: unknown key; did you mean"),
        (["spec.toml", "--out", "x", "--set", "data.path=no-such-text"], "no-such-text"),
        (["spec.toml", "--out", "x", "--set", "moe.options={ alphs = 1 }"], "unknown option alphs"),
        (["table", "x"], "x holds no sweep"),
        (["query", "x", "from runs"], "x holds no sweep"),
    ],
)
def test_bad_input_is_one_line_and_status_2(spec, tmp_path, capsys, words, message):
    error = said(capsys, *words, status=2).err
    assert message in error and error.startswith("himoe: ") and error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["spec.toml"]


def test_shipped_sweeps_are_listed(capsys):
    found = json.loads(said(capsys, "list", "--json").out)
    assert {"sparsity_granularity", "shared_expert", "heterogeneous", "capacity", "balancing"} == {
        one["name"] for one in found
    }
    text = said(capsys, "list").out
    assert all(one["name"] in text and len(one["description"]) > 30 for one in found)


def test_the_table_is_asked_and_failed_runs_are_named(spec, tmp_path, capsys, monkeypatch):
    monkeypatch.syspath_prepend(HELPERS)

    def failing(*given, **options):
        return run_sweep(*given, **{**options, "runner": "sweep_case:fail", "retries": 0})

    monkeypatch.setattr("himoe.cli.sweep.run_sweep", failing)
    text = said(capsys, spec, "--out", "out", "--workers", "2", status=1)
    assert "4 runs: 2 done, 2 failed; table out/runs.parquet" in text.out
    log = [
        line for line in text.out.splitlines() if line.startswith("failed: num_experts=16 seed=1: ValueError: no luck")
    ]
    assert len(log) == 1 and log[0].endswith("log.txt)")
    ask = "select name, error, bits_per_byte_by_domain as bits, started from runs order by name"
    rows = json.loads(said(capsys, "query", "out", ask, "--json").out)
    assert [row["name"] for row in rows if row["error"]] == ["num_experts=16 seed=1", "num_experts=8 seed=1"]
    table = list(csv.reader(io.StringIO(said(capsys, "query", "out", ask, "--csv").out)))
    assert table[0] == ["name", "error", "bits", "started"] and table[1][0] == "num_experts=16 seed=0"
    shown = said(capsys, "query", "out", ask).out
    assert re.search(r"num_experts=8 seed=1 +ValueError: no luck with 1 +– +–", shown)
    (tmp_path / "out" / "runs.parquet").unlink()
    assert json.loads(said(capsys, "table", "out", "--json").out)["num_runs"] == 4
    again = json.loads(said(capsys, spec, "--out", "out", "--json", status=1).out)
    assert again["counts"] == {"done": 2, "failed": 2} and len(again["errors"]) == 2


SCRIPT = """
import sys
import himoe.cli.sweep as verb
from himoe.cli import main
from himoe.sweep import run_sweep
verb.run_sweep = lambda *given, **options: run_sweep(*given, **{**options, "runner": "sweep_case:fill"})
sys.exit(main(["sweep", "spec.toml", "--out", "out", "--set", "train.steps=100000", "--workers", "2"]))
"""


@contextmanager
def handling_sigint(handler):
    """What this process does at SIGINT: those that it starts inherit whether it is ignored."""
    before = signal.signal(signal.SIGINT, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.skipif(os.name != "posix", reason="Ctrl-C is sent to a process group")
@pytest.mark.parametrize("inherited", [signal.default_int_handler, signal.SIG_IGN], ids=["terminal", "background job"])
def test_ctrl_c_stops_workers_and_driver_with_130(spec, tmp_path, inherited):
    paths = [HELPERS, *filter(None, sys.path)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    with handling_sigint(inherited):
        driver = subprocess.Popen(
            [sys.executable, "-c", SCRIPT], env=environment, stderr=subprocess.PIPE, start_new_session=True, text=True
        )
    try:
        while len(list(tmp_path.glob("out/runs/*/metrics.jsonl"))) < 2:
            time.sleep(0.02)
        os.killpg(driver.pid, signal.SIGINT)
        _, error = driver.communicate(timeout=30)
    finally:
        driver.kill()  # one that does not stop; its workers end with it
    assert driver.returncode == 130 and "stopping: what runs is saved" in error and "Traceback" not in error
    sizes = [path.stat().st_size for path in tmp_path.glob("out/runs/*/metrics.jsonl")]
    time.sleep(0.1)
    assert sizes == [path.stat().st_size for path in tmp_path.glob("out/runs/*/metrics.jsonl")]  # nobody goes on
