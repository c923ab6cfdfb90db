"""What routing comes to in numbers: tokens of an expert, combinations that can be chosen, pairs that find no place."""

import math
from statistics import NormalDist

from himoe.plan.shape import Experts

EXACT_UP_TO = 4096
"""Experts of a layer for which combinations are counted exactly, not by logarithms alone."""
MOST_PRODUCTS = 10**6
"""Products of large numbers that a count may take."""
UNEVEN = 0.3
"""Coefficient of variation of the experts' load in a layer that is balanced as well as is usual (Hi-MoE's tables)."""


def log2_combinations(experts: Experts, *, flat: bool = False) -> float:
    """Return log2 of the number of sets of experts that a token can have.

    Args:
        experts: of a layer.
        flat: as if the K came from all experts alike.
    """
    if experts.any_number:
        return _log2(combinations(experts))
    if flat or (experts.group_top_k is None and experts.keep_groups is None):
        return _log2_comb(experts.num_experts, experts.top_k)
    if experts.group_top_k is not None:
        return sum(map(_log2_comb, experts.group_sizes, experts.group_top_k))
    return _log2(combinations(experts))


def combinations(experts: Experts, *, flat: bool = False) -> int | None:
    """Return the number of sets of experts that a token can have, None where it takes long to count them."""
    if experts.num_experts > EXACT_UP_TO:
        return None
    if experts.any_number:
        return _of_any_number(experts.num_experts, experts.top_k)
    if not flat and experts.group_top_k is not None:
        return math.prod(map(math.comb, experts.group_sizes, experts.group_top_k))
    if not flat and experts.keep_groups is not None:
        return _in_few_groups(experts, experts.keep_groups)
    return math.comb(experts.num_experts, experts.top_k)


def _of_any_number(num_experts: int, most: int) -> int:
    """Return how many sets hold at least one of the experts and at most so many."""
    total, sets = 0, 1
    for number in range(1, most + 1):
        sets = sets * (num_experts - number + 1) // number
        total += sets
    return total


def _in_few_groups(experts: Experts, keep: int) -> int | None:
    """Return how many sets of K experts lie in `keep` of the equal groups, or in fewer."""
    size, number, k = experts.group_sizes[0], len(experts.group_sizes), experts.top_k
    if min(keep, k) * k * min(size, k) > MOST_PRODUCTS:
        return None
    ways = [1] + [0] * k  # sets of n experts that meet each of j groups, from j = 0 on
    total = 0
    for met in range(1, min(keep, k) + 1):
        ways = [sum(ways[n - m] * math.comb(size, m) for m in range(1, min(size, n) + 1)) for n in range(k + 1)]
        total += math.comb(number, met) * ways[k]
    return total


def _log2_comb(n: int, k: int) -> float:
    if n <= EXACT_UP_TO:
        return _log2(math.comb(n, k))
    return (math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)) / math.log(2)


def _log2(number: int | None) -> float:
    return math.log2(number) if number else math.nan


def tokens_per_expert(experts: Experts, tokens: int) -> list[float]:
    """Return how many of the tokens one expert of each pool gets when they are used alike."""
    return [float(tokens * pool.used * experts.presence / pool.num_experts) for pool in experts.pools]


def expected_drop(experts: Experts, factor: float, tokens: int, *, cv: float = 0.0) -> float:
    """Return the share of pairs that finds no place under a capacity factor.

    Loads are taken as normal: every token chooses an expert with probability K/E by itself, and the experts' shares
    vary by `cv` on top, standard deviation over mean.

    >>> from himoe.plan import named_shape
    >>> round(expected_drop(named_shape("mixtral_8x7b").experts, 1.0, 4096), 3)
    0.011
    """
    mean = tokens * experts.top_k / experts.num_experts
    places = max(1, math.floor(experts.top_k * factor * tokens / experts.num_experts))
    load = mean * float(experts.presence)
    deviation = math.sqrt(max(0.0, load * (1 - load / tokens)) + (cv * load) ** 2)
    if deviation == 0:
        return max(0.0, 1 - places / load)
    z, normal = (places - load) / deviation, NormalDist()
    return deviation * (normal.pdf(z) - z * (1 - normal.cdf(z))) / load
