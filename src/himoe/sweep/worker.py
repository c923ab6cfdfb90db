"""A warm process that does one run after the other: `python -m himoe.sweep.worker`, started by the local engine.

Lines of JSON on standard input: what to get ready first, then tasks. Lines on standard output: `{"ready": true}`, then
an outcome a task. The end of standard input is the end of whoever reads the outcomes, however that came: the running
step is finished and saved, as after Ctrl-C, and the process ends.
"""

import gc
import json
import os
import signal
import sys
import time
from queue import SimpleQueue
from threading import Event, Thread
from typing import Any

from himoe.sweep.execution import Task, execute, load_runner

GRACE_SECONDS = 60.0
"""For the running step and its checkpoint."""


def main() -> None:
    """Serve until standard input ends."""
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)  # what a run prints is no outcome
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the driver, which then says how to end
    setup = json.loads(sys.stdin.readline())
    if setup["cores"] and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, setup["cores"])
    tasks: SimpleQueue[dict[str, Any]] = SimpleQueue()
    ending = Event()
    Thread(target=_read, args=(tasks, ending), daemon=True).start()
    load_runner(setup["runner"])
    gc.freeze()  # what is loaded now stays: the collection after every run need not look at it
    print(json.dumps({"ready": True}), file=channel)
    while not ending.is_set():
        outcome = execute(Task(**tasks.get()), own_process=True)
        print(json.dumps(outcome.as_dict()), file=channel)


def _read(tasks: "SimpleQueue[dict[str, Any]]", ending: Event) -> None:
    for line in sys.stdin:
        tasks.put(json.loads(line))
    ending.set()
    os.kill(os.getpid(), signal.SIGTERM)  # a training loop saves and stops; anything else, and waiting, ends at once
    time.sleep(GRACE_SECONDS)
    os._exit(1)


if __name__ == "__main__":
    main()
