"""The program that a worker process of `pool.py` runs: it does what it is sent, and answers over its pipes."""

import contextlib
import os
import pickle
import signal
import sys
import traceback
from typing import Any

from himoe.errors import DataError, HimoeError, MissingExtraError


def serve() -> None:
    """Do what comes in, and answer, until the process that asks is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the first one ends the others
    questions, answers = sys.stdin.buffer, os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # so that a stray print cannot fall among the answers

    def answer(kind: str, value: Any) -> None:
        pickle.dump((kind, value), answers)
        answers.flush()

    while True:
        function, task = pickle.load(questions)
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


if __name__ == "__main__":
    with contextlib.suppress(EOFError, BrokenPipeError):
        serve()
    os._exit(0)  # with no attempt to empty the buffers of a broken pipe
