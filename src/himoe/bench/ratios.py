"""The arithmetic of comparisons: ratios, geometric means, the worst shape, Amdahl's bound."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def geometric_mean(values: Iterable[float]) -> float | None:
    """Return the geometric mean of positive numbers, None of none.

    >>> round(geometric_mean([1.0, 4.0]), 6)
    2.0
    """
    logs = [math.log(value) for value in values]
    return math.exp(math.fsum(logs) / len(logs)) if logs else None


def ratios(own: float, others: Mapping[str, float]) -> dict[str, float]:
    """Return each other's time over our own: above 1, we are faster.

    >>> ratios(2.0, {"slow": 3.0})
    {'slow': 1.5}
    """
    return {name: other / own for name, other in others.items()}


def amdahl(share: float, speedup: float) -> float:
    """Return how much faster a whole gets when the part that takes `share` of it gets `speedup` times as fast.

    >>> round(amdahl(0.7, 1.5), 4)
    1.3043
    """
    return 1 / (1 - share + share / speedup)


def summarize(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, dict[str, Any]]]:
    """Return for every backend and peer the geometric means of the ratios, and the case where one is smallest."""
    found: dict[str, dict[str, list[tuple[float, str, float]]]] = {}
    for row in rows:
        for backend, one in row["backends"].items():
            for peer, ratio in one["ratio_vs"].items():
                case = (ratio, case_name(row), one["ratio_vs_cpu"][peer])
                found.setdefault(backend, {}).setdefault(peer, []).append(case)
    return {
        backend: {
            peer: {
                "geometric_mean": geometric_mean(ratio for ratio, _, _ in some),
                "geometric_mean_cpu": geometric_mean(cpu for _, _, cpu in some),
                "worst": min(some)[0],
                "worst_case": min(some)[1],
                "cases": len(some),
            }
            for peer, some in peers.items()
        }
        for backend, peers in found.items()
    }


def skew(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return for every backend the largest time under Zipf's law over the uniform one of the same shape and dtype."""
    times: dict[tuple[str, str, str], dict[str, float]] = {}
    for row in rows:
        for backend in row["backends"]:
            key = (backend, row["shape"]["name"], row["dtype"])
            times.setdefault(key, {})[row["routing"]] = row["times"][backend]["minimum_ms"]
    found: dict[str, list[tuple[float, str]]] = {}
    for (backend, shape, dtype), by_routing in times.items():
        if {"zipf", "uniform"} <= by_routing.keys():
            found.setdefault(backend, []).append((by_routing["zipf"] / by_routing["uniform"], f"{shape} {dtype}"))
    return {backend: {"worst": max(pairs)[0], "worst_case": max(pairs)[1]} for backend, pairs in found.items()}


def case_name(row: Mapping[str, Any]) -> str:
    """Return how a row is called in a line of text."""
    return f"{row['shape']['name']} {row['dtype']} {row['routing']}"
