"""The training order: which window of tokens is sample number i.

Sample i depends on (seed, i) alone, so there is no state to save: a resumed run goes on at its sample number, and
micro-batches or ranks only share out the numbers.
"""

import functools

import numpy as np

from himoe.errors import DataError


class TrainingOrder:
    """Shuffled windows of `seq_len + 1` tokens: inputs and, one to the right, targets.

    An epoch cuts the tokens into windows that share one token with the next, so that every token but the first is a
    target once, and visits each window once in a random order. Every epoch draws a new order and, where the tokens are
    not a whole number of windows, a new place for the first cut.

    >>> order = TrainingOrder(np.arange(9), seq_len=4, seed=0)
    >>> sorted(order.sample(i).tolist() for i in range(order.windows_per_epoch))
    [[0, 1, 2, 3, 4], [4, 5, 6, 7, 8]]
    """

    def __init__(self, tokens: np.ndarray, seq_len: int, seed: int) -> None:
        if len(tokens) <= seq_len:
            raise DataError(
                f"the training part is too short: {len(tokens)} tokens, one window of train.seq_len = {seq_len} needs "
                f"{seq_len + 1}; give more text or a shorter train.seq_len"
            )
        self.tokens, self.seq_len, self.seed = tokens, seq_len, seed
        self.windows_per_epoch = (len(tokens) - 1) // seq_len

    def sample(self, i: int) -> np.ndarray:
        """Return sample `i`, counted over all epochs, `(seq_len + 1,)` int64."""
        epoch, place = divmod(i, self.windows_per_epoch)
        first, windows = _epoch(self.seed, epoch, len(self.tokens), self.seq_len)
        start = first + int(windows[place]) * self.seq_len
        return np.asarray(self.tokens[start : start + self.seq_len + 1], dtype=np.int64)


@functools.lru_cache(maxsize=2)  # the running epoch, and the next where a batch spans both
def _epoch(seed: int, epoch: int, num_tokens: int, seq_len: int) -> tuple[int, np.ndarray]:
    """Return where the first window of an epoch begins and the order of its windows."""
    windows, rest = divmod(num_tokens - 1, seq_len)
    generator = np.random.default_rng([seed, epoch])
    return int(generator.integers(rest + 1)), generator.permutation(windows)
