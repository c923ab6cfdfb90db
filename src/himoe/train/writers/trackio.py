"""trackio: its database on this machine (`TRACKIO_DIR` says where); look at it with `trackio show`."""

import sys
from collections.abc import Mapping
from contextlib import redirect_stdout
from typing import Any

from himoe.train.writers.base import PROJECT, RunIdentity, flatten


class Trackio:
    """One run of the project `himoe`, which a resumed process goes on with.

    Nothing leaves the machine unless `TRACKIO_SPACE_ID` or `TRACKIO_SERVER_URL` names another place.
    """

    def __init__(self, run: RunIdentity) -> None:
        import trackio  # pyright: ignore[reportMissingImports]

        with redirect_stdout(sys.stderr):  # standard output belongs to the command
            self._run = trackio.init(
                project=PROJECT,
                name=run.id,  # the name is what it finds a run by
                config=run.config,
                resume="allow",
                embed=False,
                auto_log_gpu=False,
                auto_log_cpu=False,
            )
        self._finish = trackio.finish

    def log(self, line: Mapping[str, Any]) -> None:
        """Write the line's numbers."""
        if values := flatten(line):
            self._run.log(values, step=line["step"])

    def close(self) -> None:
        """Write what is still in the queue."""
        with redirect_stdout(sys.stderr):
            self._finish()
