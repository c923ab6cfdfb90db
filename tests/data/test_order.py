"""Sample i from (seed, i) alone: every window once an epoch, well shuffled, with mixtures exact over every stretch."""

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from himoe.data import TrainingOrder
from himoe.data.mixture import Mixture, spread
from himoe.data.permutation import Permutation
from himoe.errors import ConfigError, DataError

TOKENS = np.arange(1003, dtype=np.uint16)


def make_order(tokens=TOKENS, seq_len=10, seed=0):
    return TrainingOrder({"all": tokens}, seq_len, seed)


def epoch(order: TrainingOrder, number: int) -> list[list[int]]:
    first = number * order.windows_per_epoch
    return [order.sample(first + i).tolist() for i in range(order.windows_per_epoch)]


class Endless:
    """Far more tokens than any memory holds: token j is j mod 1000."""

    def __len__(self):
        return 10**12

    def __getitem__(self, part):
        return np.arange(part.start, part.stop) % 1000


# --- the permutation of an epoch


@pytest.mark.parametrize("n", [*range(1, 70), 100, 257, 1000, 4096, 4097])
def test_a_permutation_has_every_place_once(n):
    order = Permutation(n, key=b"key")
    assert sorted(order(place) for place in range(n)) == list(range(n))


@given(st.integers(1, 10**15), st.binary(max_size=8), st.data())
def test_a_large_permutation_stays_within_and_joins_no_two_places(n, key, data):
    order = Permutation(n, key=key)
    places = data.draw(st.sets(st.integers(0, n - 1), max_size=50))
    found = {order(place) for place in places}
    assert len(found) == len(places)
    assert all(0 <= place < n for place in found)


def test_a_permutation_is_well_mixed():
    n = 10_007
    values = np.array([order(place) for order in [Permutation(n, key=b"key")] for place in range(n)])
    three_deviations = 3 / math.sqrt(n)
    assert abs(np.corrcoef(np.arange(n), values)[0, 1]) < three_deviations
    assert abs(np.corrcoef(values[:-1], values[1:])[0, 1]) < three_deviations
    assert (np.diff(values) == 1).sum() < 8  # neighbours stay neighbours once on average
    assert (values == np.arange(n)).sum() < 8  # so do fixed points


@pytest.mark.parametrize("n", [5, 30])
def test_over_keys_every_place_gets_every_value_equally_often(n):
    keys = 3000
    counts = np.zeros((n, n))
    for key in range(keys):
        order = Permutation(n, key=str(key).encode())
        for place in range(n):
            counts[place, order(place)] += 1
    freedom = (n - 1) ** 2
    chi_square = ((counts - keys / n) ** 2 / (keys / n)).sum()
    assert abs(chi_square - freedom) < 4 * math.sqrt(2 * freedom)


# --- the order of one text


def test_a_sample_is_one_window_and_the_token_after_it():
    sample = make_order().sample(0)
    assert sample.shape == (11,)
    assert sample.dtype == np.int64
    assert np.array_equal(sample, np.arange(sample[0], sample[0] + 11))


def test_an_epoch_visits_every_window_once():
    order = make_order(seed=3)
    firsts = set()
    for number in range(8):
        starts = sorted(window[0] for window in epoch(order, number))
        assert starts == list(range(starts[0], starts[0] + 1000, 10))
        firsts.add(starts[0])
    assert firsts == {0, 1, 2}  # an epoch draws its first cut too


def test_epochs_and_seeds_differ_and_are_repeatable():
    first = make_order()
    assert epoch(first, 0) != epoch(first, 1)
    assert epoch(first, 0) != epoch(make_order(seed=1), 0)
    assert epoch(first, 1) == epoch(make_order(), 1)
    assert epoch(first, 0) != sorted(epoch(first, 0))


def test_random_access_equals_going_through_in_order():
    through = make_order(seq_len=7, seed=5)
    samples = [through.sample(i) for i in range(500)]
    for i in np.random.default_rng(0).permutation(500):
        assert np.array_equal(make_order(seq_len=7, seed=5).sample(int(i)), samples[i])


def test_the_order_is_the_one_that_past_runs_had():
    """A resumed run must not meet other samples after an update: these numbers never change."""
    order = make_order(seed=7)
    assert [int(order.sample(i)[0]) for i in (0, 1, 2, 99, 100, 1234)] == [952, 432, 992, 242, 291, 762]


def test_a_trillion_tokens_need_no_array():
    order = TrainingOrder({"web": Endless()}, seq_len=1024, seed=0)
    assert order.windows_per_epoch == (10**12 - 1) // 1024
    for i in (0, 1, order.windows_per_epoch - 1, order.windows_per_epoch, 10**14):
        sample = order.sample(i)
        assert np.array_equal(sample, (sample[0] + np.arange(1025)) % 1000)


def test_several_texts_are_one_long_text_where_there_are_no_weights():
    cuts = [0, 400, 400, 403, 1003]
    parts = {str(i): TOKENS[start:stop] for i, (start, stop) in enumerate(pairwise(cuts))}
    joined = TrainingOrder(parts, 10, 4)
    assert epoch(joined, 0) == epoch(make_order(seed=4), 0)


def test_a_text_of_one_window_is_enough_and_a_shorter_one_is_refused():
    order = make_order(TOKENS[:11])
    assert order.windows_per_epoch == 1
    assert order.sample(5).tolist() == list(range(11))
    with pytest.raises(DataError, match=r"the text is too short: 10 tokens, one window .*train\.seq_len = 10 needs 11"):
        make_order(TOKENS[:10])


# --- mixtures

DOMAINS = {"code": np.arange(0, 401), "prose": np.arange(1000, 1101), "web": np.arange(2000, 2601)}
WEIGHTS = {"prose": 0.5, "code": 0.3, "web": 0.2}


def mixed(seed=0, weights=WEIGHTS):
    return TrainingOrder(DOMAINS, 10, seed, weights=weights)


shares = st.lists(st.integers(1, 400), min_size=1, max_size=7)


def largest_drift(sequence, counts):
    """How far any stretch of a sequence, over two of its periods, is from its shares."""
    drifts = []
    for domain, count in enumerate(counts):
        drawn = np.concatenate([[0], np.cumsum(np.tile(sequence == domain, 2))])
        drift = drawn - np.arange(len(drawn)) * count / sum(counts)
        drifts.append((np.abs(drift).max(), drift.max() - drift.min()))
    return np.max(drifts, axis=0)


@given(shares)
@settings(max_examples=150)
def test_every_stretch_keeps_to_the_shares(counts):
    sequence = spread(counts)
    assert np.bincount(sequence, minlength=len(counts)).tolist() == counts
    prefix, stretch = largest_drift(sequence, counts)
    assert prefix < 1
    assert stretch < 2


def test_shares_beyond_every_short_period_are_kept_to_a_65536th():
    weights = dict(zip("abcde", np.random.default_rng(0).dirichlet(np.ones(5)).tolist(), strict=True))
    mixture = Mixture(weights, list("abcde"))
    assert mixture.period == 2**16
    for name, count in zip(mixture.names, mixture.counts, strict=True):
        assert abs(count / 2**16 - weights[name]) < 2**-16
    drawn = np.array([mixture.place(i)[0] for i in range(2**16)])
    assert largest_drift(drawn, mixture.counts)[1] < 2


@pytest.mark.parametrize(
    ("weights", "period"),
    [([0.25, 0.75], 4), ([1 / 3, 1 / 3, 1 / 3], 3), ([0.333333] * 3, 3), ([0.37, 0.63], 100)],
)
def test_the_period_is_the_shortest_that_is_exact(weights, period):
    names = list("abc")[: len(weights)]
    assert Mixture(dict(zip(names, weights, strict=True)), names).period == period


def domain(order, i):
    """Return the domain of sample `i`."""
    return order.mixture.names[order.mixture.place(i)[0]]


def test_each_domain_of_a_mixture_has_its_own_epochs():
    order = mixed()
    assert order.windows_per_epoch == 40 + 10 + 60
    samples = {name: [] for name in DOMAINS}
    for i in range(600):
        samples[domain(order, i)].append(order.sample(i).tolist())
    assert {name: len(found) for name, found in samples.items()} == {"code": 180, "prose": 300, "web": 120}
    for name, found in samples.items():
        tokens, windows = DOMAINS[name].tolist(), (len(DOMAINS[name]) - 1) // 10
        every = sorted(tokens[i : i + 11] for i in range(0, len(tokens) - 1, 10))
        rounds = [found[i : i + windows] for i in range(0, len(found) - windows + 1, windows)]
        assert all(sorted(visited) == every for visited in rounds)
        assert all(first != second for first, second in pairwise(rounds))


def test_the_seed_shuffles_within_domains_and_leaves_the_sequence_of_domains_alone():
    one, other = mixed(seed=0), mixed(seed=1)
    assert [domain(one, i) for i in range(100)] == [domain(other, i) for i in range(100)]
    assert [one.sample(i)[0] for i in range(100)] != [other.sample(i)[0] for i in range(100)]


def test_a_weight_of_nothing_leaves_a_domain_out_however_short_it_is():
    domains = {**DOMAINS, "tiny": np.arange(3)}
    order = TrainingOrder(domains, 10, 0, weights={**WEIGHTS, "tiny": 0})
    assert {domain(order, i) for i in range(100)} == {"code", "prose", "web"}
    with pytest.raises(DataError, match=r"domain 'tiny' is too short: 3 tokens.*or data\.weights that leave it out"):
        TrainingOrder(domains, 10, 0, weights={"code": 0, "prose": 0, "web": 0, "tiny": 1})


@pytest.mark.parametrize(
    ("weights", "text"),
    [
        ({"code": 0.5, "prose": 0.3, "web": 0.3}, "these sum to 1.1; in proportion: code = 0.454545, prose"),
        ({"code": 0, "prose": 0, "web": 0}, "data.weights: the shares must sum to 1, these sum to 0"),
        ({"code": 0.5, "pros": 0.3, "web": 0.2}, "data.weights: there is no domain 'pros', only code, prose, web; did"),
        ({"code": 0.5, "web": 0.5}, "no share for prose; give every domain one, 0 leaves a domain out"),
        ({"code": -0.5, "prose": 1, "web": 0.5}, "data.weights.code = -0.5: a share must be ≥ 0"),
        ({"code": 1 - 1e-6, "prose": 1e-6, "web": 0}, "data.weights.prose: 1e-06 is less than the smallest share"),
        ({"code": 1, "prose": 1e-10, "web": 0}, "data.weights.prose: 1e-10 is less than the smallest share"),
        ({"code": 0.5, "prose": 0.5, "web": 1e-300}, "data.weights.web: 1e-300 is less than the smallest share"),
    ],
)
def test_weights_that_do_not_fit_are_refused(weights, text):
    with pytest.raises(ConfigError) as caught:
        mixed(weights=weights)
    assert text in str(caught.value)
    assert "\n" not in str(caught.value)
