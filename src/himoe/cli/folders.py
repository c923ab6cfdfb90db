"""Finds run folders: where a new run goes, which one is meant, which one is unfinished."""

import time
from itertools import chain, count
from pathlib import Path

from himoe.errors import RunFolderError
from himoe.run_folder import COMPLETE, is_in_use, is_run_folder, no_run_folder, read_json

RUNS = Path("runs")


def new_folder(name: str) -> Path:
    """Return `runs/NAME-YYYYmmdd-HHMMSS`, with `-2` and so on where that stands already; it is not created here."""
    first = RUNS / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    others = (first.with_name(f"{first.name}-{number}") for number in count(2))
    return next(folder for folder in chain([first], others) if not folder.exists())


def existing_run(path: Path | None) -> Path:
    """Return `path` if a run lies there, else raise `RunFolderError` with the nearest one."""
    if path is None:
        known = sorted(RUNS.glob("*/config.json"), key=_written)
        raise RunFolderError(f"name a run folder{f', such as {known[-1].parent}' if known else ''}")
    if is_run_folder(path):
        return path
    raise no_run_folder(path, known=(config.parent for config in path.parent.glob("*/config.json")))


def newest_unfinished() -> Path:
    """Return the folder under `runs/` that was started last among those that neither finished nor go on right now."""
    runs = [config.parent for config in RUNS.glob("*/config.json")]
    unfinished = [run for run in runs if not _finished(run) and not is_in_use(run)]
    if not unfinished:
        raise RunFolderError(f"no unfinished run under {RUNS}/; name one: himoe train --resume --out DIR")
    return max(unfinished, key=lambda run: _written(run / "config.json"))


def _written(path: Path) -> float:
    return path.stat().st_mtime


def _finished(run: Path) -> bool:
    try:
        return read_json(run / "summary.json").get("status") in COMPLETE
    except RunFolderError:
        return False
