"""Engines: what they refuse, ASHA over a whole sweep, Ray and Slurm with the same runs as the local one."""

import os
import sys
from pathlib import Path

import pytest
from sweep_case import FEW, FILL

from himoe.errors import ConfigError, MissingExtraError
from himoe.sweep import EngineOptions, Table, expand, run_sweep

PATHS = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
"""For Python on the workers."""


def facts(out):
    return Table(out).read().runs().select(["run", "name", "status", "cross_entropy", "steps"]).to_pylist()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"engine": "rey"}, r"--engine rey: must be one of local, ray, slurm; did you mean 'ray'\?"),
        ({"workers": 0}, r"--workers 0: must be ≥ 1"),
        ({"options": EngineOptions(cpus_per_run=0)}, r"--cpus-per-run 0: must be ≥ 1"),
        ({"options": EngineOptions(address="auto")}, r"--address is of a Ray cluster"),
        ({"early_stop": "median"}, r"--early-stop median: must be asha"),
        ({"engine": "slurm", "options": EngineOptions(gpus_per_run=0.5)}, r"Slurm gives whole GPUs"),
        ({"engine": "slurm"}, r"--engine slurm: .*srun"),
    ],
)
def test_what_an_engine_refuses_is_said_before_anything_starts(tmp_path, console, given, message):
    with pytest.raises(ConfigError, match=message):
        run_sweep(FEW, tmp_path / "out", runner=FILL, console=console, **given)
    assert not list((tmp_path / "out").glob("runs/*"))


@pytest.mark.parametrize(
    ("package", "given"),
    [("ray", {"engine": "ray"}), ("submitit", {"engine": "slurm"}), ("optuna", {"early_stop": "asha"})],
)
def test_a_package_that_is_missing_is_named_with_its_extra(tmp_path, console, monkeypatch, package, given):
    monkeypatch.setitem(sys.modules, package, None)
    extra = {"submitit": "slurm", "optuna": "sweep"}.get(package, package)
    with pytest.raises(MissingExtraError, match=rf"{package} is not installed; .*himoe\[{extra}\]"):
        run_sweep(FEW, tmp_path, runner=FILL, console=console, **given)


def test_early_stop_ends_those_behind_and_lets_the_best_go_on(tmp_path, console):
    """Of `fill`, a higher seed has a lower loss: seed 9 comes first here, and those after it are behind it."""
    spec = {
        "recipe": "lm_tiny",
        "set": {"train.steps": 9, "train.eval_every": 1},
        "axes": {"seed": [9, 8, 7, 6, 5, 10]},
    }
    result = run_sweep(spec, tmp_path, early_stop="asha", runner=FILL, console=console)
    status = {run.config.seed: result.status[run.id] for run in result.runs}
    assert status == {9: "done", 8: "stopped", 7: "stopped", 6: "stopped", 5: "stopped", 10: "done"}
    steps = {row["name"]: row["steps"] for row in facts(tmp_path)}
    assert steps == {f"seed={seed}": 9 if seed > 8 else 1 for seed in status}
    with pytest.raises(ConfigError, match="--early-stop compares cross-entropies, which needs equal data"):
        run_sweep({**FEW, "axes": {"data.held_out": [0.1, 0.2]}}, tmp_path, early_stop="asha", runner=FILL)


def test_slurm_jobs_do_the_same_runs(tmp_path, console, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", PATHS)
    run_sweep(FEW, tmp_path / "here", runner=FILL, console=console)
    options = EngineOptions(executor="debug")
    result = run_sweep(FEW, tmp_path / "jobs", engine="slurm", options=options, runner=FILL, console=console)
    assert result.counts == {"done": 4} and list((tmp_path / "jobs" / "slurm").iterdir())
    assert facts(tmp_path / "jobs") == facts(tmp_path / "here")


def test_ray_actors_do_the_same_runs_and_failures_are_told(tmp_path, console, monkeypatch):
    ray = pytest.importorskip("ray")
    monkeypatch.setenv("PYTHONPATH", PATHS)
    spec = {"recipe": "lm_tiny", "set": {"train.steps": 3}, "axes": {"seed": [3, 1, 0]}}
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level="error")
    try:
        options = EngineOptions(gpus_per_run=0.25)
        with pytest.raises(ConfigError, match=r"no machine of the Ray cluster has 1 CPUs and 0.25 GPUs"):
            run_sweep(spec, tmp_path, engine="ray", options=options, runner=FILL, console=console)
        result = run_sweep(spec, tmp_path, engine="ray", retries=0, runner="sweep_case:fail", console=console)
        assert ray.is_initialized()  # it is not the sweep's to end
    finally:
        ray.shutdown()
    status = {run.config.seed: result.status[run.id] for run in result.runs}
    assert status == {0: "done", 1: "failed", 3: "failed"}
    ids = {run.config.seed: run.id for run in expand(spec)}
    assert result.errors[ids[1]] == "ValueError: no luck with 1" and "its Ray actor died" in result.errors[ids[3]]
