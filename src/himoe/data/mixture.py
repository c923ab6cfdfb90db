"""Which domain each sample comes from, so that the shares of a mixture hold over every stretch of samples.

Chance would only keep the shares on average. Here the domains follow a fixed sequence of period P that holds each
domain n = share·P times, spread evenly: after any number of samples j, a domain was drawn j·share times to within
less than one, hence within less than two in any stretch, and exactly over every P samples in a row.

The sequence is the chairman assignment problem (Tijdeman, 1980) solved by deadlines: the m-th sample of a domain
(from 0) may come no earlier than ⌊m·P/n⌋ and no later than ⌈(m + 1)·P/n⌉ − 1, which is the same as staying within
one of the share; taking the earliest deadline first always keeps all of them (Steiner and Yeomans, 1993).
"""

import heapq
from collections.abc import Mapping

import numpy as np

from himoe.errors import ConfigError
from himoe.shares import domains_fault, sum_fault

LONGEST_PERIOD = 2**16


class Mixture:
    """A periodic sequence of domains.

    Shares that no period up to 2¹⁶ holds exactly are rounded to multiples of 2⁻¹⁶.

    Args:
        weights: the share of every domain, together 1; 0 leaves a domain out.
        domains: the domains there are.

    Raises ConfigError for an unknown or missing domain, a negative share, and shares that do not sum to 1.

    >>> mixture = Mixture({"prose": 0.75, "code": 0.25}, ["code", "prose"])
    >>> [mixture.names[mixture.place(i)[0]] for i in range(8)]
    ['prose', 'prose', 'code', 'prose', 'prose', 'prose', 'code', 'prose']
    """

    def __init__(self, weights: Mapping[str, float], domains: list[str]) -> None:
        _check(weights, domains)
        self.names = [name for name in domains if weights[name] > 0]
        self.counts = _whole_counts(np.array([weights[name] for name in self.names]), self.names)
        self.period = sum(self.counts)
        self._domains = spread(self.counts)
        self._ranks = np.empty(self.period, dtype=np.int64)  # how often a place's domain came before, in the period
        for domain, count in enumerate(self.counts):
            self._ranks[self._domains == domain] = np.arange(count)

    def place(self, i: int) -> tuple[int, int]:
        """Return the domain of sample `i`, as an index into `names`, and how many samples of it came before."""
        rounds, place = divmod(i, self.period)
        domain = int(self._domains[place])
        return domain, rounds * self.counts[domain] + int(self._ranks[place])


def spread(counts: list[int]) -> np.ndarray:
    """Return a sequence that holds domain d `counts[d]` times, each spread as evenly as whole numbers allow."""
    period = sum(counts)
    waiting = [(0, domain, 0) for domain in range(len(counts))]  # (first place allowed, domain, how many it had)
    allowed: list[tuple[int, int, int]] = []  # (place that it may not reach, domain, how many it had)
    sequence = np.empty(period, dtype=np.int32)
    for place in range(period):
        while waiting and waiting[0][0] <= place:
            _, domain, had = heapq.heappop(waiting)
            heapq.heappush(allowed, (-(-(had + 1) * period // counts[domain]), domain, had))
        deadline, domain, had = heapq.heappop(allowed)
        assert place < deadline
        sequence[place] = domain
        if had + 1 < counts[domain]:
            heapq.heappush(waiting, ((had + 1) * period // counts[domain], domain, had + 1))
    return sequence


def _whole_counts(shares: np.ndarray, names: list[str]) -> list[int]:
    """Return the counts of the shortest period that holds the shares, else of the longest one, rounded."""
    shares = shares / shares.sum()
    for period in range(1, LONGEST_PERIOD + 1):
        counts = np.rint(shares * period)
        if counts.all() and np.abs(shares * period - counts).max() <= 1e-9:
            return counts.astype(int).tolist()
    counts = np.floor(shares * LONGEST_PERIOD)
    largest_remainders = np.argsort(counts - shares * LONGEST_PERIOD, kind="stable")
    counts[largest_remainders[: int(LONGEST_PERIOD - counts.sum())]] += 1
    if not counts.all():
        name = names[int(counts.argmin())]
        raise ConfigError(
            f"data.weights.{name}: {shares[counts.argmin()]:.3g} is less than the smallest share that is kept, "
            f"1/{LONGEST_PERIOD}; give more, or 0 to leave the domain out"
        )
    return counts.astype(int).tolist()


def _check(weights: Mapping[str, float], domains: list[str]) -> None:
    for name, weight in weights.items():
        if not 0 <= weight < np.inf:
            raise ConfigError(f"data.weights.{name} = {weight}: a share must be ≥ 0")
    if fault := domains_fault(weights, domains) or sum_fault(weights):
        raise ConfigError(f"data.weights: {fault}")
