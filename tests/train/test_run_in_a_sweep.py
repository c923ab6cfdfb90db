"""Real training in a sweep: what `himoe train` gives, one after the other in a warm worker, pruned, or killed."""

import io
import json

import pytest
from rich.console import Console
from run_case import SETS, lines, timeless

from himoe import run
from himoe.config import Config
from himoe.config.loading import parse_sets
from himoe.sweep import expand, run_sweep
from himoe.sweep.early_stop import Halving
from himoe.sweep.execution import Task, execute
from himoe.sweep.status import status_of
from himoe.sweep.training import train

pytestmark = pytest.mark.filterwarnings("ignore::himoe.errors.HimoeWarning")


@pytest.fixture
def console():
    return Console(file=io.StringIO(), width=200)


def spec_of(text, **axes):
    changes = {f"{a}.{b}": value for a, table in parse_sets(SETS).items() for b, value in table.items()}
    return {"recipe": "lm_tiny", "data": str(text), "set": changes, "axes": axes}


def outcome(folder):
    """Return what a run has found out, without times."""
    return timeless(lines(folder / "metrics.jsonl")), lines(folder / "load.jsonl")


def test_a_warm_worker_gives_each_run_what_himoe_train_gives_it(text, tmp_path, console):
    """Nothing of one run is left in the next: not its numbers at random, its weights, its precision or its bias."""
    spec = spec_of(text, seed=[0])
    spec["zip"] = [{"moe.preset": ["loss_free", "switch"], "train.precision": ["bf16", "fp32"]}]
    result = run_sweep(spec, tmp_path / "sweep", workers=1, console=console)
    assert result.counts == {"done": 2}
    last = result.runs[-1]
    folder = tmp_path / "sweep" / "runs" / last.id
    run.train(last.config, out=tmp_path / "alone", console=console)
    assert outcome(folder) == outcome(tmp_path / "alone")
    assert not (folder / "report.html").exists() and (tmp_path / "alone" / "report.html").exists()
    assert "held-out bits per byte" in (folder / "log.txt").read_text()


def test_a_run_that_was_cut_off_is_gone_on_with(text, tmp_path, console):
    """The same as an undisturbed one, from its checkpoint of step 4."""
    (one,) = expand(spec_of(text, seed=[3]))
    tree = one.config.model_dump(mode="json")

    def cut(config: Config, folder, prune=None):
        def end(step, result):
            raise SystemExit(3)

        train(config, folder, end)

    import himoe.sweep.training as module

    folder = tmp_path / "cut"
    module.cut = cut
    try:
        found = execute(Task(one.id, str(folder), tree, "himoe.sweep.training:cut"))
    finally:
        del module.cut
    assert (found.status, found.error) == ("failed", "SystemExit: 3") and status_of(folder) == "failed"
    assert execute(Task(one.id, str(folder), tree)).status == "done"
    assert "starting at step 0" in (folder / "log.txt").read_text() and not (folder / "error.json").exists()
    assert execute(Task(one.id, str(folder), tree)).seconds == 0.0  # it has ended: nothing is done again
    run.train(one.config, out=tmp_path / "whole", console=console)
    assert outcome(folder) == outcome(tmp_path / "whole")


def test_a_pruned_run_is_stopped_and_saved(text, tmp_path):
    one, other = expand(spec_of(text, seed=[0, 1]))
    folder = tmp_path / "runs" / other.id
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text(json.dumps({"kind": "eval", "step": 4, "loss": 0.5}) + "\n")
    halving = Halving(str(tmp_path / "runs"), [one.id, other.id], first=4).as_dict()
    mine = tmp_path / "runs" / one.id
    found = execute(Task(one.id, str(mine), one.config.model_dump(mode="json"), halving=halving))
    assert found.status == "stopped" and (mine / "checkpoints" / "step-00000004").is_dir()
    summary = json.loads((mine / "summary.json").read_text())
    assert (summary["status"], summary["step"]) == ("pruned", 4) and summary["loss"] > 0.5
    alone = Halving(str(tmp_path / "runs"), [one.id], first=4)
    assert not alone.prunes(one.id, 4, 9.0) and alone.prunes(other.id, 4, 9.0)  # behind `one`
    assert not alone.prunes(other.id, 3, 9.0) and not alone.prunes(other.id, 4, 0.1)
