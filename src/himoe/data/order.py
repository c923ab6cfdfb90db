"""The training order: which window of tokens is sample number i.

Sample i depends on (seed, i) alone, so there is no state to save: a resumed run goes on at its sample number, and
micro-batches or ranks only share out the numbers. Nothing here grows with the corpus: an epoch is shuffled by a
permutation that is computed place by place (`himoe/data/permutation.py`), and a mixture follows a periodic sequence of
domains (`himoe/data/mixture.py`).
"""

import hashlib
from collections.abc import Mapping
from functools import lru_cache
from itertools import pairwise
from typing import Protocol

import numpy as np

from himoe.data.mixture import Mixture
from himoe.data.permutation import Permutation
from himoe.errors import DataError


class Tokens(Protocol):
    """A long row of token ids that may lie on the disk."""

    def __len__(self) -> int: ...

    def __getitem__(self, part: slice, /) -> np.ndarray: ...


class TrainingOrder:
    """Shuffled windows of `seq_len + 1` tokens: inputs and, one to the right, targets.

    An epoch cuts the tokens into windows that share one token with the next, so that every token but the first is a
    target once, and visits each window once in a random order. Every epoch draws a new order and, where the tokens are
    not a whole number of windows, a new place for the first cut.

    Args:
        streams: the tokens of each domain.
        seq_len: tokens of a sequence, without the last target.
        seed: of the shuffling; a mixture's sequence of domains does not depend on it.
        weights: the share of every domain in the samples, together 1: every domain then has its own windows and
            epochs. None: the domains are one long text, each in proportion to its tokens.

    Raises ConfigError for weights that do not fit the domains, DataError for a text shorter than one window.

    >>> order = TrainingOrder({"all": np.arange(9)}, seq_len=4, seed=0)
    >>> sorted(order.sample(i).tolist() for i in range(order.windows_per_epoch))
    [[0, 1, 2, 3, 4], [4, 5, 6, 7, 8]]
    """

    def __init__(
        self, streams: Mapping[str, Tokens], seq_len: int, seed: int, *, weights: Mapping[str, float] | None = None
    ) -> None:
        self.seq_len, self.seed = seq_len, seed
        self.mixture = None if weights is None else Mixture(weights, list(streams))
        if self.mixture is None:
            self._texts = [_Shuffled(_Joined(list(streams.values())), seq_len, seed, "")]
        else:
            self._texts = [_Shuffled(streams[name], seq_len, seed, name) for name in self.mixture.names]
        self.windows_per_epoch = sum(text.windows for text in self._texts)
        """Different samples there are, of all domains that are drawn from."""

    def sample(self, i: int) -> np.ndarray:
        """Return sample `i`, counted over all epochs, `(seq_len + 1,)` int64."""
        domain, place = (0, i) if self.mixture is None else self.mixture.place(i)
        return self._texts[domain].window(place)


class _Shuffled:
    """The windows of one text, epoch after epoch, each epoch in its own order."""

    def __init__(self, tokens: Tokens, seq_len: int, seed: int, name: str) -> None:
        if len(tokens) <= seq_len:
            part = f"domain {name!r}" if name else "the text"
            remedy = ", or data.weights that leave it out" if name else ""
            raise DataError(
                f"the training part of {part} is too short: {len(tokens)} tokens, one window of train.seq_len = "
                f"{seq_len} needs {seq_len + 1}; give more text, a shorter train.seq_len{remedy}"
            )
        self.tokens, self.seq_len, self.seed, self.name = tokens, seq_len, seed, name
        self.windows, self.rest = divmod(len(tokens) - 1, seq_len)
        self._epoch = lru_cache(maxsize=2)(self._draw)  # the running one, and the next where a batch spans both

    def window(self, i: int) -> np.ndarray:
        epoch, place = divmod(i, self.windows)
        first, order = self._epoch(epoch)
        start = first + order(place) * self.seq_len
        return np.asarray(self.tokens[start : start + self.seq_len + 1]).astype(np.int64)

    def _draw(self, epoch: int) -> tuple[int, Permutation]:
        """Return where the first window of an epoch begins, and the order of its windows."""
        digest = hashlib.blake2b(f"{self.seed} {epoch} {self.name}".encode()).digest()
        first = int.from_bytes(digest[:16], "little") % (self.rest + 1)
        return first, Permutation(self.windows, key=digest)


class _Joined:
    """Several rows of tokens as one."""

    def __init__(self, parts: list[Tokens]) -> None:
        self.parts = parts
        self.starts = [0, *np.cumsum([len(part) for part in parts]).tolist()]

    def __len__(self) -> int:
        return self.starts[-1]

    def __getitem__(self, part: slice, /) -> np.ndarray:
        pieces = [
            tokens[max(part.start - start, 0) : part.stop - start]
            for tokens, (start, stop) in zip(self.parts, pairwise(self.starts), strict=True)
            if start < part.stop and part.start < stop
        ]
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)
