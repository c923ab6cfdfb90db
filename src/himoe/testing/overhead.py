"""What watching a run costs: `python -m himoe.testing.overhead [RECIPE] [--steps N] [--set KEY=VALUE …]`.

Trains for some steps in a temporary folder and prints the CPU time of everything that is measured and logged, over that
of the whole step. Taken is the CPU time of the training thread, so neither other programs nor the threads that read
data and help in large products distort it. The share of waiting for data is of wall-clock time.
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rich.console import Console

from himoe.config import Config, load_config
from himoe.train.journal import Journal
from himoe.train.loop import Trainer
from himoe.train.start import build_trainer
from himoe.train.writers import RunIdentity, check_writers, open_writers
from himoe.trained import load_corpus, set_threads

WARM_UP = 5  # steps; the first ones allocate


class Stopwatch:
    """Adds up the CPU seconds that this thread spends inside some functions."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def around(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return `function` with its time added to `name`."""

        def timed(*args: Any, **options: Any) -> Any:
            started = time.thread_time()
            try:
                return function(*args, **options)
            finally:
                self.seconds[name] = self.seconds.get(name, 0.0) + time.thread_time() - started

        return timed

    def watch(self, owner: object, method: str, name: str) -> None:
        """Time a method of one object from now on."""
        setattr(owner, method, self.around(name, getattr(owner, method)))


def measure_overhead(config: Config, *, steps: int, folder: Path, console: Console) -> dict[str, float]:
    """Train `steps` steps and return shares of the step time, by part, and `data_wait`."""
    set_threads(config)
    trainer = build_trainer(config, load_corpus(config, console), None)
    identity = RunIdentity.of(folder, config.model_dump(mode="json"), {"id": "overhead"})
    journal = Journal(folder, trainer, writers=open_writers(config.train.log_to, identity))
    watch = _instrument(trainer, journal)
    _train(trainer, journal, WARM_UP, config.train.log_every)
    watch.seconds.clear()
    wall, waited = trainer.step_seconds, trainer.data_seconds
    _train(trainer, journal, steps, config.train.log_every)
    journal.close()
    seconds = watch.seconds
    total = seconds.pop("step") + seconds["lines"]
    shares = {name: spent / total for name, spent in seconds.items()}
    data_wait = (trainer.data_seconds - waited) / (trainer.step_seconds - wall)
    return {**shares, "together": sum(shares.values()), "data_wait": data_wait}


def _instrument(trainer: Trainer, journal: Journal) -> Stopwatch:
    watch = Stopwatch()
    watch.watch(trainer, "step", "step")
    for method in ("observe", "end_step"):
        watch.watch(trainer.statistics, method, "statistics")
    watch.watch(trainer.means, "add", "means")
    for method in ("after_first_micro_batch", "before_clipping"):
        watch.watch(trainer.monitor, method, "norms")
    watch.watch(journal, "training_line", "lines")
    return watch


def _train(trainer: Trainer, journal: Journal, steps: int, log_every: int) -> None:
    for _ in range(steps):
        logged = (trainer.steps_done + 1) % log_every == 0
        trainer.step(measure=logged)
        if logged:
            journal.training_line()


def main(words: list[str] | None = None) -> int:
    """Measure and print a table; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m himoe.testing.overhead", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("recipe", nargs="?", default="lm_demo")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    given = parser.parse_args(words)
    config = load_config(given.recipe, sets=given.set)
    check_writers(config.train.log_to)
    with TemporaryDirectory() as folder:
        shares = measure_overhead(config, steps=given.steps, folder=Path(folder), console=Console(stderr=True))
    print(f"{given.steps} steps of {config.name}, a line every {config.train.log_every}; share of the step time")
    for name, share in shares.items():
        print(f"{name.replace('_', ' '):<12} {share:8.3%}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
