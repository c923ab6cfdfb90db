"""What has become of a run, read from its folder: the status column of the table."""

from pathlib import Path

from himoe.errors import RunFolderError
from himoe.run_folder import ALARM, COMPLETE, PRUNED, is_run_folder, read_json

LOG, ERROR = "log.txt", "error.json"
DONE, FAILED, RUNNING, STOPPED = "done", "failed", "running", "stopped"
ENDED = (DONE, STOPPED)
"""Statuses of runs that nothing is left to do for."""


def status_of(folder: Path) -> str | None:
    """Return a run's status, None where no run stands.

    `running` is what has begun and not ended, whether a process is at it or it waits to be gone on with; `stopped` what
    the early stop or an alarm has ended.
    """
    if not is_run_folder(folder):
        return None
    try:
        ended = read_json(folder / "summary.json").get("status")
    except RunFolderError:
        ended = None
    if ended in COMPLETE:
        return DONE
    if ended in (PRUNED, ALARM):
        return STOPPED
    return FAILED if (folder / ERROR).exists() else RUNNING
