"""Paired comparisons: by hand, against tables of Student's distribution, and in simulation."""

import numpy as np
import pytest
from scipy.special import stdtr

from himoe.analysis import compare, verdict
from himoe.analysis.paired import bca, detectable, holm
from himoe.errors import ConfigError


def test_five_seeds_by_hand():
    ours = {0: 2.98, 1: 2.97, 2: 2.99, 3: 2.96, 4: 3.00}
    theirs = {0: 3.00, 1: 3.00, 2: 3.00, 3: 2.98, 4: 3.02}
    found = verdict("a", ours, "b", theirs)  # differences −.02 −.03 −.01 −.02 −.02: mean −.02, s = .0070711
    assert found.difference == pytest.approx(-0.02) and found.word == "better" and found.seeds == (0, 1, 2, 3, 4)
    assert (found.low, found.high) == pytest.approx((-0.02 - 0.0087799, -0.02 + 0.0087799), abs=1e-6)
    assert found.p == pytest.approx(0.00320, abs=2e-5)  # t = −6.3246 on 4
    assert found.detectable == pytest.approx(1.681997 * 0.0070711, abs=1e-6)
    assert verdict("a", ours, "b", theirs, higher_is_better=True).word == "worse"
    assert "better, loss -0.0200 (95 % interval -0.0288 to -0.0112, 5 seeds, p 0.003" in found.sentence()


def test_pairing_removes_what_seeds_do_to_both():
    seeds = {0: 0.0, 1: 0.5, 2: -0.4, 3: 0.2, 4: -0.1}
    found = verdict(
        "a", {s: 3.0 + x for s, x in seeds.items()}, "b", {s: 3.01 + x + 1e-3 * (s % 2) for s, x in seeds.items()}
    )
    assert found.word == "better" and found.high < 0


def test_what_cannot_be_compared_is_said():
    one = verdict("a", {0: 1.0, 7: 1.0}, "b", {0: 1.1})
    assert one.word == "one seed: nothing can be said" and one.low is None and one.alone == (7,)
    with pytest.raises(ConfigError, match="no seed in common"):
        verdict("a", {0: 1.0}, "b", {1: 1.0})
    with pytest.raises(ConfigError, match="is called 'c'; there are a, b"):
        compare({"a": {0: 1.0}, "b": {0: 1.0}}, "c")
    same = verdict("a", {0: 1.0, 1: 2.0}, "b", {0: 1.0, 1: 2.0})
    assert same.word == "no difference seen" and same.p == 1.0 and same.detectable == 0.0


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.9]) == [1.0, 1.0] and holm([]) == []


def test_several_comparisons_are_corrected():
    rest = {"a": [0, 0, 0, 0, 0], "b": [0.01, 0.04, 0.02, 0.05, 0.005], "c": [0.1, -0.1, 0.02, 0.0, -0.03]}
    values = {name: dict(enumerate(one)) for name, one in rest.items()}
    alone = compare({"a": values["a"], "b": values["b"]}, "a")[0]
    among = compare(values, "a")[0]
    assert alone.word == "worse" and alone.adjusted_p == alone.p < 0.05
    assert among.word == "no difference seen" and among.adjusted_p == pytest.approx(2 * alone.p)
    assert among.low > 0  # the interval stays that of one comparison
    spread = float(np.std(rest["b"], ddof=1))
    assert alone.detectable == pytest.approx(detectable(spread, 5))
    assert among.detectable == pytest.approx(detectable(spread, 5, alpha=0.025))


def test_what_is_detectable_among_several_is_found_in_four_of_five():
    draw, n, others = np.random.default_rng(1), 5, 4
    shift, found = detectable(1.0, n, alpha=0.05 / (1 + others)), 0
    for _ in range(1000):
        noise = draw.standard_normal((1 + others, n))
        noise[0] += shift
        t = noise.mean(axis=1) / (noise.std(axis=1, ddof=1) / np.sqrt(n))
        found += holm([float(2 * stdtr(n - 1, -abs(one))) for one in t])[0] < 0.05
    assert 0.78 < found / 1000 < 0.9


def test_detectable_differences_match_published_tables():
    # Effect sizes of a paired t test at α = .05 and 80 % power, as G*Power 3 gives them.
    for n, size in ((5, 1.682), (10, 0.996), (30, 0.529)):
        assert detectable(1.0, n) == pytest.approx(size, abs=2e-3)


def test_coverage_power_and_error_rate_in_simulation():
    draw = np.random.default_rng(0)
    draws, n = 1500, 5
    noise = draw.standard_normal((draws, n))
    half = 2.776445 * noise.std(axis=1, ddof=1) / np.sqrt(n)
    assert np.mean(np.abs(noise.mean(axis=1)) < half) == pytest.approx(0.95, abs=0.02)
    found = [verdict("a", dict(enumerate(one)), "b", dict.fromkeys(range(n), 0.0)) for one in noise[:250]]
    within = np.mean([one.low <= 0 <= one.high for one in found])
    assert within == pytest.approx(0.95, abs=0.045)
    bootstrapped = np.mean([one.bootstrap[0] <= 0 <= one.bootstrap[1] for one in found])
    assert bootstrapped < within - 0.05  # why Student's interval decides
    shifted = noise + detectable(1.0, n)
    error = shifted.std(axis=1, ddof=1) / np.sqrt(n)
    assert np.mean(np.abs(shifted.mean(axis=1) / error) > 2.776445) == pytest.approx(0.8, abs=0.03)


def test_bca_of_many_values_is_close_to_students():
    values = np.random.default_rng(1).standard_normal(200)
    low, high = bca(values, resamples=2000)
    half = 1.972 * values.std(ddof=1) / np.sqrt(200)
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.02)
