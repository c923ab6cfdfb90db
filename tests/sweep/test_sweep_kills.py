"""Nothing is lost: drivers and workers that are killed, interrupts, runs that fail, two sweeps in one folder."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pyarrow.parquet
import pytest
from sweep_case import FEW, FILL, MANY

from himoe import run_folder
from himoe.errors import ConfigError, HimoeError
from himoe.sweep import Table, build_table, expand, run_sweep
from himoe.sweep.endurance import child_processes
from himoe.sweep.execution import Outcome
from himoe.sweep.status import status_of

DRIVER = """
import json, sys
from pathlib import Path
from himoe.sweep import run_sweep
run_sweep(json.loads(sys.argv[1]), Path(sys.argv[2]), workers=2, retries=5, runner="sweep_case:fill")
"""


def driver(spec, out):
    path = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
    arguments = [sys.executable, "-c", DRIVER, json.dumps(spec), str(out)]
    return subprocess.Popen(arguments, env={**os.environ, "PYTHONPATH": path}, stderr=subprocess.PIPE, text=True)


def tables(out):
    return [pyarrow.parquet.read_table(out / f"{name}.parquet") for name in ("runs", "curves")]


def wait_for(number, out, status="done"):
    while sum(status_of(folder) == status for folder in (out / "runs").glob("*")) < number:
        time.sleep(0.01)


def gone(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds workers through /proc")
def test_drivers_and_workers_are_killed_and_every_run_is_there_once(tmp_path):
    chance, out = random.Random(0), tmp_path / "out"
    (out / "runs").mkdir(parents=True)
    for kill in (4, 14):
        process = driver(MANY, out)
        wait_for(kill, out)
        workers = child_processes(process.pid)
        assert len(workers) == 2
        os.kill(chance.choice(workers), signal.SIGKILL)
        wait_for(kill + 3, out)
        process.kill()
        process.communicate()
        end = time.monotonic() + 20
        while not all(map(gone, workers)):  # they end by themselves
            assert time.monotonic() < end
            time.sleep(0.01)
    assert 17 <= sum(status_of(folder) == "done" for folder in (out / "runs").iterdir()) < 30
    process = driver(MANY, out)
    _, said = process.communicate()
    assert process.returncode == 0 and "of 30 runs have ended before" in said
    wanted = sorted(run.id for run in expand(MANY))
    kept = tables(out)
    assert kept[0].column("run").to_pylist() == wanted == sorted(folder.name for folder in (out / "runs").iterdir())
    assert set(kept[0].column("status").to_pylist()) == {"done"}
    curve = kept[1].filter(pyarrow.compute.equal(kept[1].column("run"), wanted[0]))
    assert curve.column("step").to_pylist() == list(range(1, 9))  # no step twice, none missing
    build_table(out)
    assert tables(out) == kept


class Interrupted:
    """A pool whose first wait meets Ctrl-C in code that lets no exception through, as a finalizer does."""

    def __init__(self, *, twice):
        self.twice, self.waits, self.tasks, self.did = twice, 0, [], []

    def room(self):
        return 1 - len(self.tasks)

    def submit(self, task):
        self.tasks.append(task)

    def next(self, timeout):
        self.waits += 1
        assert self.waits == 1, "the sweep goes on"
        with suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        return Outcome(self.tasks.pop().id, "running")

    def end(self):
        self.did.append("end")
        if self.twice:
            signal.raise_signal(signal.SIGINT)

    def kill(self):
        self.did.append("kill")


@pytest.mark.parametrize("before", [signal.default_int_handler, signal.SIG_IGN], ids=["terminal", "background job"])
@pytest.mark.parametrize(("twice", "did"), [(False, ["end"]), (True, ["end", "kill"])])
def test_an_interrupt_that_other_code_swallows_stops_the_sweep_and_a_second_one_at_once(
    tmp_path, console, monkeypatch, twice, did, before
):
    pool = Interrupted(twice=twice)
    monkeypatch.setattr("himoe.sweep.driver.open_pool", lambda *given: pool)
    inherited = signal.signal(signal.SIGINT, before)
    try:
        with pytest.raises(KeyboardInterrupt):
            run_sweep(FEW, tmp_path, runner=FILL, console=console)
        assert signal.getsignal(signal.SIGINT) is before
    finally:
        signal.signal(signal.SIGINT, inherited)
    assert pool.did == did and "stopping: what runs is saved" in console.file.getvalue()
    assert (tmp_path / "runs.parquet").exists()


def test_failures_are_tried_again_reported_with_their_last_line_and_kept_in_the_table(tmp_path, console):
    spec = {"recipe": "lm_tiny", "set": {"train.steps": 3}, "axes": {"seed": [0, 1, 2, 3]}}
    result = run_sweep(spec, tmp_path, workers=2, runner="sweep_case:fail", console=console)
    status = {run.config.seed: result.status[run.id] for run in result.runs}
    assert status == {0: "done", 1: "failed", 2: "done", 3: "failed"}
    tries = {run.config.seed: (tmp_path / "runs" / run.id / "tries").read_text() for run in result.runs}
    assert tries == {0: "x", 1: "xx", 2: "xx", 3: "xx"}
    ids = {run.config.seed: run.id for run in result.runs}
    assert result.errors[ids[1]] == "ValueError: no luck with 1" and "SIGKILL" in result.errors[ids[3]]
    log = (tmp_path / "runs" / ids[1] / "log.txt").read_text()
    assert log.count("trying seed 1") == 2 and "Traceback" in log
    rows = {row["seed"]: row for row in Table(tmp_path).read().runs().to_pylist()}
    assert rows[1]["error"] == result.errors[ids[1]] and rows[3]["error"] == result.errors[ids[3]]
    assert rows[2]["error"] is None and rows[1]["cross_entropy"] is None and rows[0]["cross_entropy"] == 4.0
    again = run_sweep(spec, tmp_path, workers=1, retries=0, runner=FILL, console=console)  # a new start tries again
    assert set(again.status.values()) == {"done"} and len(again.outcomes) == 2
    assert Table(tmp_path).read().runs().column("error").null_count == 4


def test_sweeps_share_runs_and_wait_for_those_of_each_other(tmp_path, console):
    run_sweep(FEW, tmp_path, runner=FILL, console=console)
    more = {**FEW, "axes": {**FEW["axes"], "seed": [0, 1, 2]}}
    runs = expand(more)
    held = next(run for run in runs if run.config.seed == 2)
    folder = tmp_path / "runs" / held.id
    folder.mkdir()
    script = f"""
import sys, time
from pathlib import Path
from himoe import run_folder
from himoe.config import load_config
from sweep_case import fill
with run_folder.locked(Path({str(folder)!r})):
    print("held", flush=True)
    sys.stdin.readline()
    run_folder.write_text(Path({str(folder / "config.json")!r}), {held.config.model_dump_json()!r})
    fill(load_config({str(folder / "config.json")!r}), Path({str(folder)!r}))
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])}
    holder = subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, text=True
    )
    assert holder.stdout.readline() == "held\n"
    assert run_folder.is_in_use(folder)
    holder.stdin.write("\n")
    holder.stdin.flush()
    result = run_sweep(more, tmp_path, workers=2, runner=FILL, console=console)
    holder.communicate()
    assert set(result.status.values()) == {"done"} and len(result.status) == 6
    assert {one.id for one in result.outcomes if one.began} <= {run.id for run in runs if run.config.seed == 2}
    table = Table(tmp_path).read().runs()
    assert table.num_rows == 6 and table.column("seed").to_pylist().count(2) == 2


def test_a_folder_of_another_run_is_not_taken_for_one_of_the_sweep(tmp_path, console):
    result = run_sweep(FEW, tmp_path, runner=FILL, console=console)
    path = tmp_path / "runs" / result.runs[0].id / "config.json"
    path.write_text(path.read_text().replace('"alpha"', '"beta"').replace('"steps": 8', '"steps": 9'))
    with pytest.raises(ConfigError, match=r"holds another run: train.steps differ"):
        run_sweep(FEW, tmp_path, runner=FILL, console=console)


def test_workers_that_cannot_start_are_told_with_their_last_line(tmp_path, console):
    with pytest.raises(HimoeError, match=r"workers end before they are ready: ModuleNotFoundError: .*no_such_module"):
        run_sweep(FEW, tmp_path, runner="no_such_module:fill", console=console)
    assert not list((tmp_path / "runs").iterdir())  # no run has failed
