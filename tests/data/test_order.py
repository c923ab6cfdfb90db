import numpy as np
import pytest

from himoe.data import TrainingOrder
from himoe.errors import DataError

TOKENS = np.arange(1003, dtype=np.uint16)


def epoch(order: TrainingOrder, number: int) -> list[list[int]]:
    first = number * order.windows_per_epoch
    return [order.sample(first + i).tolist() for i in range(order.windows_per_epoch)]


def test_a_sample_is_one_window_and_the_token_after_it():
    sample = TrainingOrder(TOKENS, seq_len=10, seed=0).sample(0)
    assert sample.shape == (11,)
    assert sample.dtype == np.int64
    assert np.array_equal(sample, np.arange(sample[0], sample[0] + 11))


def test_an_epoch_visits_every_window_once():
    order = TrainingOrder(TOKENS, seq_len=10, seed=3)
    for number in range(4):
        starts = sorted(window[0] for window in epoch(order, number))
        assert starts == list(range(starts[0], starts[0] + 1000, 10))
        assert 0 <= starts[0] <= 2


def test_epochs_and_seeds_differ_and_are_repeatable():
    first = TrainingOrder(TOKENS, seq_len=10, seed=0)
    assert epoch(first, 0) != epoch(first, 1)
    assert epoch(first, 0) != epoch(TrainingOrder(TOKENS, seq_len=10, seed=1), 0)
    assert epoch(first, 1) == epoch(TrainingOrder(TOKENS, seq_len=10, seed=0), 1)
    assert epoch(first, 0) != sorted(epoch(first, 0))


def test_random_access_equals_going_through_in_order():
    through = TrainingOrder(TOKENS, seq_len=7, seed=5)
    samples = [through.sample(i) for i in range(500)]
    for i in np.random.default_rng(0).permutation(500):
        assert np.array_equal(TrainingOrder(TOKENS, seq_len=7, seed=5).sample(int(i)), samples[i])


def test_a_text_of_one_window_is_enough_and_a_shorter_one_is_refused():
    order = TrainingOrder(TOKENS[:11], seq_len=10, seed=0)
    assert order.windows_per_epoch == 1
    assert order.sample(5).tolist() == list(range(11))
    with pytest.raises(DataError, match=r"too short: 10 tokens, one window of train\.seq_len = 10 needs 11"):
        TrainingOrder(TOKENS[:10], seq_len=10, seed=0)
