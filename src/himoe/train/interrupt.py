"""Ctrl-C and SIGTERM as a request: what runs is finished and saved; a second one stops at once.

Unlike KeyboardInterrupt a request cannot be lost: neither in code that lets no exception through, such as a finalizer,
nor in the background job of a script, which inherits that SIGINT is ignored.
"""

import signal
import threading
from collections.abc import Sequence
from types import FrameType, TracebackType
from typing import Any, Self

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """While entered, the first signal only sets `requested` and gives all signals their old meaning back.

    After it a second Ctrl-C interrupts, also where SIGINT was ignored before; that comes back at the end.

    Outside the main thread signals cannot be caught; then nothing is changed and `requested` stays False.

    Args:
        signals: that are requests.
    """

    def __init__(self, signals: Sequence[signal.Signals] = SIGNALS) -> None:
        self.requested = False
        self._signals = signals
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._request) for number in self._signals}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    def _request(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002 - the form of a signal handler
        self.requested = True
        for each, handler in self._previous.items():
            ignored = each == signal.SIGINT and handler == signal.SIG_IGN  # then a second one would do nothing
            signal.signal(each, signal.default_int_handler if ignored else handler)

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}
