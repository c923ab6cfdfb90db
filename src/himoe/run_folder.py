"""The files of a run folder, the interface between training and everything that reads results (docs/run-folder.md).

JSON documents are replaced atomically; the `.jsonl` logs are appended line by line and flushed, so a reader can follow
a run and a killed process loses at most half a line, which the next start cuts off. Never imports torch.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from himoe.errors import RunFolderError, RunInUseError, nearest
from himoe.files import write_text

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

DOCUMENTS = ("config.json", "env.json", "summary.json", "tokenizer.json")
LOGS = ("metrics.jsonl", "load.jsonl")
OTHER_FILES = ("report.html", "log.txt", "error.json")
OTHER_FOLDERS = ("profile", "tensorboard", "wandb", "mlflow")
CHECKPOINTS = "checkpoints"

FINISHED, STOPPED_EARLY, PRUNED = "finished", "stopped early", "pruned"
INTERRUPTED, ALARM = "interrupted", "stopped by an alarm"
"""What `status` of summary.json may be."""
COMPLETE = (FINISHED, STOPPED_EARLY)
"""Those of runs that came to their end."""


def check_run_folder(out: Path, *, resume: bool = False, force: bool = False) -> None:
    """Refuse a folder that a new run may not write to, or that holds no run to resume. Changes nothing.

    Raises RunFolderError saying what stands there and what to do.
    """
    if out.exists() and not out.is_dir():
        raise RunFolderError(f"{out} is a file; a run needs a folder: choose another with --out")
    if resume:
        if not is_run_folder(out):
            raise RunFolderError(f"{out} holds no run to resume; start one without --resume")
        return
    if not out.exists() or set(out.iterdir()) <= set(_partial_files(out)):
        return
    if not is_run_folder(out):
        raise RunFolderError(f"{out} is not empty and not a run folder; nothing was changed: choose another with --out")
    if not force:
        raise RunFolderError(f"{out} already holds a run; continue it with --resume, replace it with --force")


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Keep every other process from writing to the folder `out`, where the system can; writes nothing itself.

    The lock is the system's, on the folder: it ends with the process, however that ends.
    Raises RunInUseError while another process holds it.
    """
    if fcntl is None:
        yield
        return
    descriptor = os.open(out, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunInUseError(
                f"{out} is in use by another process; wait until that ends, or choose another folder with --out"
            ) from None
        except OSError:  # a disk that knows no locks, such as some network drives
            pass
        yield
    finally:
        os.close(descriptor)


def is_in_use(out: Path) -> bool:
    """Return whether another process holds the folder `out`."""
    try:
        with locked(out):
            return False
    except RunFolderError:
        return True


def is_run_folder(path: Path) -> bool:
    """Return whether a run lies in `path`."""
    return (path / "config.json").is_file()


def run_of(path: Path) -> Path:
    """Return the run folder that `path` names: itself, or the one whose checkpoint it is.

    Raises RunFolderError when it is neither.
    """
    run = path.parent.parent if path.parent.name == CHECKPOINTS else path
    if not is_run_folder(run):
        raise no_run_folder(run, known=(config.parent for config in run.parent.glob("*/config.json")))
    return run


def no_run_folder(path: Path, *, missing: str = "config.json", known: Iterable[Path] = ()) -> RunFolderError:
    """Return the error that says why `path` is no run folder, with the nearest of the `known` ones."""
    what = f"holds no {missing}, so it is no run folder" if path.exists() else "does not exist"
    return RunFolderError(f"run folder {path} {what}{nearest(str(path), map(str, known))}")


def _partial_files(out: Path) -> list[Path]:
    """Return what killed processes left of files that they were writing."""
    return [path for name in (*DOCUMENTS, *LOGS, *OTHER_FILES) for path in out.glob(f"{name}.*.tmp")]


def clear_partial_files(out: Path) -> None:
    """Delete what killed processes left of files that they were writing."""
    for path in _partial_files(out):
        path.unlink(missing_ok=True)


def clear_run_folder(out: Path) -> None:
    """Delete what a run writes, and nothing else: files of other names stay, in the checkpoint folder too."""
    checkpoints = out / CHECKPOINTS
    for path in [*checkpoints.glob("step-*"), *checkpoints.glob(".tmp-*")]:
        shutil.rmtree(path)
    if checkpoints.is_dir() and not any(checkpoints.iterdir()):
        checkpoints.rmdir()
    for name in OTHER_FOLDERS:
        if (out / name).is_dir():
            shutil.rmtree(out / name)
    for name in (*LOGS, *OTHER_FILES, *reversed(DOCUMENTS)):  # config.json last: until then it is still a run folder
        (out / name).unlink(missing_ok=True)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object of a run folder. Raises RunFolderError when it is missing or damaged."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise no_run_folder(path.parent, missing=path.name) from None
    except (OSError, ValueError) as error:
        raise RunFolderError(f"{path} cannot be read as JSON ({error}); restore it or start a new run") from error
    if not isinstance(document, dict):
        raise RunFolderError(f"{path} holds no JSON object; restore it or start a new run")
    return document


def read_env(run: Path) -> dict[str, Any]:
    """Return env.json. Raises RunFolderError when it is missing, damaged or lacks what a run needs of it."""
    env = read_json(run / "env.json")
    for key in ("data", "parameters", "baselines"):
        if not isinstance(env.get(key), dict):
            raise RunFolderError(f"{run / 'env.json'} holds no {key}; restore it or start a new run")
    return env


class Log:
    """A `.jsonl` file that is appended to, one flushed line a record."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("a", encoding="utf-8")

    def append(self, record: Mapping[str, Any]) -> None:
        """Write one line. Raises ValueError for a number that is not finite."""
        self._file.write(json.dumps(record, allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file; append no more."""
        self._file.close()


def read_log(path: Path) -> list[dict[str, Any]]:
    """Return the records of a `.jsonl` file; half-written and damaged lines are left out. A missing file is empty."""
    records = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            records.append(record)
    return records


def truncate_log(path: Path, keep: Callable[[dict[str, Any]], bool]) -> None:
    """Keep only the records that `keep` accepts, replacing the file in one step."""
    write_text(path, "".join(json.dumps(record) + "\n" for record in read_log(path) if keep(record)))


@contextmanager
def readable_disk_errors(out: Path) -> Iterator[None]:
    """Turn an OSError while writing under `out` (no space, no permission) into one RunFolderError."""
    try:
        yield
    except OSError as error:
        place = f" ({error.filename})" if error.filename else ""
        raise RunFolderError(
            f"cannot write to run folder {out}: {error.strerror or error}{place}; every checkpoint already there is "
            "whole: mend that, then go on with --resume"
        ) from error
