"""The batches of a run: samples of the training order as rows, read one step ahead in the background.

The rows of step s (counted from 0) are the samples s·B … s·B + B − 1. Micro-batches cut them into equal stretches, and
ranks cut each micro-batch: the rows of a step are the same, in the same order, whatever their numbers.
"""

from collections.abc import Callable
from dataclasses import dataclass
from threading import Thread
from time import perf_counter
from typing import Protocol

import numpy as np
from jaxtyping import Int


class Samples(Protocol):
    """The training order: sample i is a function of the seed and i alone."""

    def sample(self, i: int, /) -> np.ndarray:
        """Return seq_len + 1 token ids: a sequence and its next token."""
        ...


@dataclass(frozen=True)
class Batch:
    """The rows of one micro-batch; inputs are `tokens[:, :-1]`, targets `tokens[:, 1:]`."""

    tokens: Int[np.ndarray, "rows seq_len+1"]
    document_ids: Int[np.ndarray, "rows seq_len"] | None
    """Which document each input belongs to; None where no row holds a border, or borders do not count."""


class Batches:
    """Cuts the training order into steps, micro-batches and ranks.

    Args:
        order: the samples.
        batch_size: rows of a step, B, over all ranks.
        accumulate: micro-batches of a step.
        end_of_document: the token behind every document.
        cross_documents: give no document ids, so that attention may cross borders.
        rank: which of the processes this is.
        world_size: processes that share every micro-batch; `accumulate · world_size` divides `batch_size`.

    Steps may be asked for in any order; in ascending order they are read ahead. There is no state to save or close.
    """

    def __init__(
        self,
        order: Samples,
        *,
        batch_size: int,
        accumulate: int = 1,
        end_of_document: int,
        cross_documents: bool = False,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        assert batch_size % (accumulate * world_size) == 0, (batch_size, accumulate, world_size)
        assert 0 <= rank < world_size
        self.order, self.batch_size, self.accumulate = order, batch_size, accumulate
        self.end_of_document, self.cross_documents = end_of_document, cross_documents
        self.rank, self.world_size = rank, world_size
        self.wait_seconds = 0.0
        """Time that the caller has waited for rows so far."""
        self._current: tuple[int, list[Batch]] | None = None
        self._ahead: _Reading | None = None

    def micro_batch(self, step: int, index: int) -> Batch:
        """Return this rank's rows of micro-batch `index` of the step after `step` finished ones."""
        if self._current is None or self._current[0] != step:
            started = perf_counter()
            ahead, self._ahead = self._ahead, None
            rows = ahead.result() if ahead is not None and ahead.step == step else self._read(step)
            self._current, self._ahead = (step, rows), _Reading(step + 1, self._read)
            self.wait_seconds += perf_counter() - started
        return self._current[1][index]

    def _read(self, step: int) -> list[Batch]:
        rows = self.batch_size // (self.accumulate * self.world_size)
        firsts = [
            step * self.batch_size + (index * self.world_size + self.rank) * rows for index in range(self.accumulate)
        ]
        return [self._batch(range(first, first + rows)) for first in firsts]

    def _batch(self, numbers: range) -> Batch:
        tokens = np.stack([self.order.sample(i) for i in numbers])
        ids = None if self.cross_documents else document_ids(tokens[:, :-1], self.end_of_document)
        return Batch(tokens, ids)


def document_ids(
    inputs: Int[np.ndarray, "rows seq_len"], end_of_document: int
) -> Int[np.ndarray, "rows seq_len"] | None:
    """Number the documents of each row, or return None where every row is of one document.

    An end-of-document token as an input opens the next document: it is what that one's first token is predicted from.

    >>> document_ids(np.array([[5, 0, 7, 8], [1, 2, 0, 3]]), end_of_document=0).tolist()
    [[0, 1, 1, 1], [0, 0, 1, 1]]
    """
    opens = inputs == end_of_document
    return np.cumsum(opens, axis=1) if opens[:, 1:].any() else None


class _Reading:
    """One step being read in a thread of its own; daemonic, so that an ending process does not wait for it."""

    def __init__(self, step: int, read: Callable[[int], list[Batch]]) -> None:
        self.step, self._read = step, read
        self._rows: list[Batch] | None = None
        self._error: BaseException | None = None
        self._thread = Thread(target=self._run, name="himoe-batches", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._rows = self._read(self.step)
        except BaseException as error:  # raised again where the rows are asked for
            self._error = error

    def result(self) -> list[Batch]:
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._read(self.step) if self._rows is None else self._rows  # None: the thread was left behind by a fork
