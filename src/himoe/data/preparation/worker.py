"""The program that a worker process of `pool.py` runs: it does what it is sent, and answers over its pipes."""

import contextlib
import os
import pickle
import queue
import signal
import sys
import threading
import traceback
from typing import Any

from himoe.errors import DataError, HimoeError, MissingExtraError


def serve() -> None:
    """Do what comes in, and answer, until the process that asks is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the first one ends the others
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # so that a stray print cannot fall among the answers

    def answer(kind: str, value: Any) -> None:
        pickle.dump((kind, value), answers)
        answers.flush()

    questions: queue.SimpleQueue[tuple] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(questions,), daemon=True).start()
    while True:
        function, task = questions.get()
        try:
            result = ("result", function(*task, lambda size: answer("advance", size)))
        except BrokenPipeError:
            raise
        except MissingExtraError as error:  # which cannot be pickled
            result = ("error", DataError(str(error)))
        except Exception as error:
            if not isinstance(error, HimoeError | OSError):
                error.add_note(traceback.format_exc())  # the only trace of where it happened
            result = ("error", error)
        answer(*result)


def _listen(questions: queue.SimpleQueue[tuple]) -> None:
    """Hand on what comes in; when the process that asks is gone, end at once, lest its successor be disturbed."""
    try:
        with open(sys.stdin.fileno(), "rb", closefd=False) as source:
            while True:
                questions.put(pickle.load(source))
    except EOFError:
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):
        serve()
    os._exit(0)  # with no attempt to empty the buffers of a broken pipe
