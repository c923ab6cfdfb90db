"""A sweep that is killed again and again: `python -m himoe.sweep.endurance`. Real training, in runs of a second or so.

First, `--runs` runs, whose driver is ended by SIGKILL `--kills` times, and some worker as often, at random moments;
then every run must be there once, done, and the table rebuilt from the folders must be the table kept. Second, runs of
about 5 seconds: how much of the workers' time is not spent in runs. Exit status 1 where something is missing.
"""

import os
import random
import signal
import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console

from himoe.sweep import EngineOptions, Table, build_table, expand, run_sweep
from himoe.sweep.execution import Outcome
from himoe.sweep.status import DONE, status_of

SPEC = """\
recipe = "lm_tiny"
data = "{text}"

[set]
"train.steps" = {steps}
"train.eval_every" = 10
"train.checkpoint_every" = 5
"data.eval_tokens" = 500

[axes]
"moe.preset" = ["hi_moe", "switch"]
"moe.num_experts" = [8, 16]
seed = {seeds}
"""
CELLS = 4
"""Runs of a seed."""
RUN_SECONDS = 5.0


@dataclass(kw_only=True)
class Endurance:
    """Kill a sweep at random moments, check that nothing is lost, and measure its overhead."""

    out: Path
    """Folder to work in; a sweep that stands there is gone on with."""
    runs: int = 200
    """Runs that are killed."""
    kills: int = 5
    """How often the driver is killed, and a worker."""
    workers: int = 2
    """Runs at a time."""
    engine: str = "local"
    """local or ray; a Ray cluster of its own is started, and outlives the drivers."""
    every: tuple[float, float] = (15.0, 45.0)
    """Least and most seconds that a driver has."""
    long_runs: int = 8
    """Runs of 5 seconds for the overhead."""
    seed: int = 0
    """Of the random moments."""

    def run(self) -> int:
        """Do both parts; return 1 where something is missing."""
        self.out.mkdir(parents=True, exist_ok=True)
        self._write_text()
        with ExitStack() as stack:
            address = stack.enter_context(_ray_cluster(self.workers)) if self.engine == "ray" else None
            whole = self._killed(address)
            self._overhead(address)
        return 0 if whole else 1

    def _write_text(self) -> None:
        for domain in ("roses", "nights"):
            (self.out / "text" / domain).mkdir(parents=True, exist_ok=True)
            for i in range(20):
                text = "\n".join(f"{i * k} {domain} are {k % 7} of {k}" for k in range(30))
                (self.out / "text" / domain / f"{i}.txt").write_text(text)

    def _spec(self, name: str, steps: int, runs: int) -> Path:
        path = self.out / f"{name}.toml"
        seeds = list(range(-(-runs // CELLS)))
        path.write_text(SPEC.format(text=(self.out / "text").absolute(), steps=steps, seeds=seeds))
        return path

    def _killed(self, address: str | None) -> bool:
        """Kill drivers and workers of one sweep, and return whether all runs are there."""
        spec, out, chance = self._spec("killed", 20, self.runs), self.out / "killed", random.Random(self.seed)
        command = [sys.executable, "-m", "himoe", "sweep", str(spec), "--out", str(out)]
        command += ["--workers", str(self.workers), "--engine", self.engine, "--retries", "3"]
        command += ["--address", address] if address else []
        started, kills = time.monotonic(), 0
        while True:
            driver = subprocess.Popen(command)
            if kills == self.kills:
                code = driver.wait()
                break
            with suppress(subprocess.TimeoutExpired):
                driver.wait(chance.uniform(*self.every) / 2)
            if self.engine == "local" and (workers := child_processes(driver.pid)):
                with suppress(ProcessLookupError):
                    os.kill(chance.choice(workers), signal.SIGKILL)
            with suppress(subprocess.TimeoutExpired):
                code = driver.wait(chance.uniform(*self.every) / 2)
                hint = "give more --runs, or a smaller --every"
                print(f"the driver ended with status {code} after {kills} kills: {hint}", flush=True)
                if code:
                    return False
                break
            driver.kill()
            driver.wait()
            kills += 1
            print(f"driver killed {kills} times, {_done(out)} runs done", flush=True)
        seconds = time.monotonic() - started
        return self._whole(spec, out, code, kills, seconds)

    def _whole(self, spec: Path, out: Path, code: int, kills: int, seconds: float) -> bool:
        wanted = {run.id for run in expand(spec)}
        found = [folder.name for folder in (out / "runs").iterdir()]
        done = [name for name in found if status_of(out / "runs" / name) == DONE]
        kept = _tables(out)
        build_table(out)
        same = kept == _tables(out)
        ids = Table(out).read().runs().column("run").to_pylist()
        once = sorted(ids) == sorted(wanted) == sorted(found) == sorted(done)
        print(
            f"{kills} kills in {seconds:.0f} s: {len(done)} of {len(wanted)} runs done, each once: {once}; "
            f"table rebuilt equals table kept: {same}; exit status {code}",
            flush=True,
        )
        return once and same and code == 0 and kills == self.kills

    def _overhead(self, address: str | None) -> None:
        """Measure a sweep of runs of about 5 seconds, whose number of steps the fastest one of 40 steps tells."""
        tried = self._sweep("speed", 40, 2 * self.workers, address)
        if tried is None:
            return
        steps = max(20, round(40 * RUN_SECONDS / min(_training_seconds(self.out / "speed", tried))))
        started = time.monotonic()
        outcomes = self._sweep("overhead", steps, self.long_runs, address)
        if outcomes is None:
            return
        seconds, busy = time.monotonic() - started, sum(one.seconds for one in outcomes)
        idle = sum(_lane(outcomes, process) for process in {one.process for one in outcomes}) - busy
        trained = sum(_training_seconds(self.out / "overhead", outcomes))
        print(
            f"{len(outcomes)} runs of {busy / len(outcomes):.2f} s, {trained / len(outcomes):.2f} s of them training "
            f"and evaluation, {self.workers} at a time, {seconds:.1f} s in all: from its first run to its last, a "
            f"worker was without one {idle / busy:.1%} of the time in runs; runs took {busy / trained - 1:.1%} more "
            "than their training",
            flush=True,
        )

    def _sweep(self, name: str, steps: int, runs: int, address: str | None) -> list[Outcome] | None:
        """Do a sweep and return what was done; None where it stood there already."""
        result = run_sweep(
            self._spec(name, steps, runs),
            self.out / name,
            workers=self.workers,
            engine=self.engine,
            options=EngineOptions(address=address),
            console=Console(stderr=True),
        )
        if len(result.outcomes) < len(result.runs):
            print("overhead: its runs have ended before; give another --out", flush=True)
            return None
        return result.outcomes


def _lane(outcomes: list[Outcome], process: int) -> float:
    """Return the time from the start of a worker's first run to the end of its last one."""
    mine = [one for one in outcomes if one.process == process]
    return max(one.began + one.seconds for one in mine) - min(one.began for one in mine)


def _training_seconds(out: Path, outcomes: list[Outcome]) -> list[float]:
    """Return the time in training and evaluation of each run."""
    table = build_table(out).runs().select(["run", "wall_seconds"]).to_pylist()
    wanted = {one.id for one in outcomes}
    return [row["wall_seconds"] for row in table if row["run"] in wanted]


def _tables(out: Path) -> list[Any]:
    import pyarrow.parquet

    return [pyarrow.parquet.read_table(out / f"{name}.parquet") for name in ("runs", "curves")]


def _done(out: Path) -> int:
    return sum(status_of(folder) == DONE for folder in (out / "runs").glob("*"))


def child_processes(pid: int) -> list[int]:
    """Return the processes that a process has started, where the system tells (Linux)."""
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(OSError):
            found += map(int, task.read_text().split())
    return found


HOLDER = """
import sys, ray
print(ray.init(num_cpus=int(sys.argv[1]), include_dashboard=False, log_to_driver=False).address_info["gcs_address"])
sys.stdout.flush()
sys.stdin.read()
"""


@contextmanager
def _ray_cluster(cpus: int):
    """Give the address of a Ray cluster in a process of its own, which ends with the block.

    It asks for Ray's token, which drivers of the same user find, and which they must be told to look for.
    """
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(cpus)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdin is not None and holder.stdout is not None
    try:
        yield holder.stdout.readline().strip()
    finally:
        holder.stdin.close()
        holder.wait()


if __name__ == "__main__":
    sys.exit(tyro.cli(Annotated[Endurance, tyro.conf.FlagCreatePairsOff]).run())
