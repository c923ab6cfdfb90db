"""One run of a sweep, wherever it runs: claim its folder, go on where it stands, leave a record of how it ended.

The folder is all the bookkeeping there is. Its lock is the claim, config.json says what it is, summary.json that it has
ended, error.json that it failed; what is none of these can be gone on with.
"""

import gc
import importlib
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from himoe import run_folder
from himoe.config import Config
from himoe.errors import ConfigError, HimoeError, HimoeWarning, RunFolderError, RunInUseError
from himoe.files import write_json
from himoe.sweep.early_stop import Halving
from himoe.sweep.identity import differences
from himoe.sweep.status import ENDED, ERROR, FAILED, LOG, RUNNING, status_of

TRAIN = "himoe.sweep.training:train"
"""What fills a run folder, unless somebody names another function."""
IN_USE = "in use"
"""The outcome of a run that another process is at."""


@dataclass(frozen=True)
class Task:
    """A run to do, as it is sent to a worker.

    Attributes:
        id: of the run.
        folder: to fill.
        config: the resolved configuration as a tree.
        runner: `"package.module:function"`, called with configuration, folder and `prune`.
        halving: the early stop of the sweep, None without one.
    """

    id: str
    folder: str
    config: dict[str, Any]
    runner: str = TRAIN
    halving: dict[str, Any] | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return it for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Outcome:
    """How a task went.

    Attributes:
        id: of the run.
        status: of its folder now, or `IN_USE`.
        error: one line, of a failed run.
        hopeless: whether trying again would fail in the same way.
        began: when, in seconds since 1970.
        seconds: that it took.
        process: that did it.
    """

    id: str
    status: str
    error: str = ""
    hopeless: bool = False
    began: float = 0.0
    seconds: float = 0.0
    process: int = 0

    def as_dict(self) -> dict[str, Any]:
        """Return it for JSON."""
        return asdict(self)


def load_runner(name: str) -> Callable[..., None]:
    """Return the function that `"package.module:function"` names."""
    module, _, function = name.partition(":")
    return getattr(importlib.import_module(module), function)


def execute(task: Task, *, own_process: bool = False) -> Outcome:
    """Do a run unless it has ended already, and say how it went; never raises for a fault of the run.

    Args:
        task: what to do.
        own_process: whether all that this process prints belongs to the run, that of libraries in C too.
    """
    began, folder = time.time(), Path(task.folder)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with run_folder.locked(folder):
            if (status := status_of(folder)) in ENDED:
                return Outcome(task.id, str(status))
            with _printing_to(folder / LOG, own_process=own_process):
                error, hopeless = _attempt(task, folder)
            status = FAILED if error else status_of(folder) or RUNNING
    except RunInUseError:
        return Outcome(task.id, IN_USE)
    gc.collect()  # models hold themselves by cycles: the next run needs their memory
    return Outcome(task.id, status, error, hopeless, began, time.time() - began, os.getpid())


def _attempt(task: Task, folder: Path) -> tuple[str, bool]:
    """Run, and return how it failed in one line, empty where it did not, and whether that is hopeless."""
    try:
        config = Config.model_validate(task.config)
        check_is_the_same(folder, config)
        write_json(folder / "config.json", config.model_dump(mode="json"))
        (folder / ERROR).unlink(missing_ok=True)
        halving = Halving(**task.halving) if task.halving else None
        prune = (lambda step, result: halving.prunes(task.id, step, result.get("loss"))) if halving else None
        with warnings.catch_warnings():
            warnings.simplefilter("always", HimoeWarning)  # in every run, whatever an earlier one has shown
            load_runner(task.runner)(config, folder, prune)
    except (Exception, SystemExit) as error:
        traceback.print_exc()
        line = describe(error)
        record_failure(folder, line)
        return line, isinstance(error, HimoeError) and not isinstance(error, RunFolderError)
    return "", False


def check_is_the_same(folder: Path, config: Config) -> None:
    """Raise ConfigError where the folder's configuration is not that of the run, such as of a version before."""
    if not run_folder.is_run_folder(folder):
        return
    stored = Config.model_validate(run_folder.read_json(folder / "config.json"))
    if keys := differences(stored, config):
        raise ConfigError(
            f"{folder} holds another run: {', '.join(keys)} differ, perhaps because a default of himoe has changed; "
            "move it away, or choose another --out"
        )


def describe(error: BaseException) -> str:
    """Return an error in one line, with its kind unless it is one of ours."""
    text = " ".join(str(error).split())
    return text if isinstance(error, HimoeError) else f"{type(error).__name__}: {text}".rstrip(": ")


def record_failure(folder: Path, error: str) -> None:
    """Leave word in a run folder of how its run failed."""
    write_json(folder / ERROR, {"error": error})


@contextmanager
def _printing_to(path: Path, *, own_process: bool) -> Iterator[None]:
    """Append what is printed to a file."""
    with ExitStack() as stack:
        file = stack.enter_context(path.open("a", encoding="utf-8", buffering=1))
        if own_process:
            for number in (1, 2):
                before = os.dup(number)
                os.dup2(file.fileno(), number)
                stack.callback(_put_back, before, number)
        stack.enter_context(redirect_stdout(file))
        stack.enter_context(redirect_stderr(file))
        yield


def _put_back(before: int, number: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(before, number)
    os.close(before)
