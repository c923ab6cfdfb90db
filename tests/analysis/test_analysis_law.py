"""The law: what it recovers, what it leaves out and says so, and how it is judged."""

import numpy as np
import pytest
from scipy.optimize import least_squares

from himoe.analysis import fit, settings_of, study
from himoe.analysis.ensemble import bootstrap, leave_one_out
from himoe.analysis.fitting import refit
from himoe.analysis.law import Model, points_of
from himoe.analysis.optimum import best
from himoe.analysis.runs import from_rows
from himoe.analysis.synthetic import Truth, rows
from himoe.errors import DataError

THREE = {"scales": ((64, 2), (96, 4), (160, 6)), "tokens": (5_000_000, 14_000_000, 40_000_000)}


def law_of(**changes):
    settings, _ = settings_of(from_rows("x", rows(**{"own": 0.0, "common": 0.0, "seeds": 1, **changes})))
    points, used = points_of(settings)
    return fit(points), used


def test_a_law_without_noise_is_recovered():
    true = Truth(drift=0.0)
    law, _ = law_of(truth=true, **THREE)
    assert set(law.form.terms) == {"A", "alpha", "gamma", "lambda", "kappa", "delta", "mu", "rho", "E", "B", "beta"}
    for name in ("alpha", "beta"):
        assert law.value(name) == pytest.approx(getattr(true, name), rel=0.01)
    assert law.value("E") == pytest.approx(true.offset, rel=0.01)
    assert law.value("kappa") == pytest.approx(true.bend_g, rel=0.01)
    assert law.value("delta") == pytest.approx(true.bend_s, rel=0.01)
    true = Truth()
    law, _ = law_of(scales=THREE["scales"])
    assert law.value("mu") == pytest.approx(true.bend_g * true.drift, rel=0.1)
    n, d = law.points.n.max(), law.points.d.max()
    place = best(law, law.theta, n, d)
    assert np.exp(place.g[0]) == pytest.approx(true.best_granularity(np.exp(n)), rel=0.01)
    assert np.exp(place.s[0]) == pytest.approx(true.sparsity, rel=0.01)


def test_what_cannot_be_told_is_left_out_with_the_reason():
    law, _ = law_of()
    assert set(law.form.terms) == {"A", "gamma", "lambda", "kappa", "delta"}
    assert law.form.left_out["alpha"].endswith("active parameters do not vary")
    assert law.form.left_out["B"].endswith("tokens do not vary")
    law, _ = law_of(slices=(4,), sparsities=(2, 4, 8, 16, 32))
    assert law.form.left_out["lambda"].endswith("granularity does not vary")
    law, _ = law_of(slices=(1, 16), tokens=(5_000_000, 40_000_000))
    assert "too few different values of granularity" in law.form.left_out["kappa"]
    assert "fixed at 0.28" in law.form.left_out["beta"] and law.value("beta") == 0.28
    tied = [row | {"tokens": int(20 * row["dim"] ** 2)} for row in rows(scales=((64, 2), (96, 2), (160, 2)), seeds=1)]
    settings, _ = settings_of(from_rows("x", tied))
    assert fit(points_of(settings)[0]).form.left_out["B"].endswith("it goes along with the others")


def test_one_wild_setting_moves_the_law_little():
    clean, _ = law_of(own=0.001, sparsities=(2, 4, 8, 16, 32), slices=(1, 2, 4, 8, 16))
    points = clean.points
    wild = points.loss.copy()
    wild[7] += 0.2
    moved = fit(type(points)(points.n, points.s, points.g, points.d, wild, points.seeds))
    columns = Model(clean.form, points).columns
    squares = np.linalg.lstsq(columns, wild, rcond=None)[0]
    assert np.abs(moved.theta - clean.theta).max() < 0.2 * np.abs(squares - clean.theta).max()


def test_refits_are_what_scipy_finds_for_each_row():
    law, _ = law_of(own=0.003, **THREE)
    draw = np.random.default_rng(0)
    losses = law.points.loss - law.residuals + law.scale * draw.standard_normal((6, len(law.points)))
    model = Model(law.form, law.points)
    lower, upper = model.box(float(losses.min()), float(losses.max()))
    for theta, y in zip(refit(law, losses), losses, strict=True):
        found = least_squares(lambda at, y=y: model(at) - y, law.theta, bounds=(lower, upper), loss="huber",
                              f_scale=law.threshold, x_scale="jac", xtol=1e-14, ftol=1e-14)  # fmt: skip
        assert np.allclose(model(theta), model(found.x), atol=2e-6)


def test_held_out_error_is_that_of_fits_without_the_setting():
    law, _ = law_of(own=0.003)
    found = leave_one_out(law)
    others = law.points.take(np.arange(9) != 4)
    without = fit(others, law.form)
    assert dict(found.predicted)[4] == pytest.approx(
        float(without.log_loss(law.points.take(np.array([4])))[0]), abs=2e-3
    )
    assert found.error > found.within and found.by_mean > found.error


def test_seeds_of_a_setting_are_no_further_settings():
    few, many = (study(from_rows("x", rows(seeds=seeds, common=0.0))).fitted for seeds in (2, 20))
    assert len(few.ensemble.law.points) == len(many.ensemble.law.points) == 9 and many.ensemble.law.spare == 4
    widths = [np.diff(one.ensemble.parameter("kappa"))[0] for one in (few, many)]
    assert widths[1] < widths[0]


def test_what_seeds_do_to_all_settings_widens_the_loss_and_not_the_optimum():
    quiet, loud = (study(from_rows("x", rows(common=common))).fitted for common in (0.0, 0.02))
    assert loud.ensemble.common > 3 * quiet.ensemble.common
    spreads = []
    for one in (quiet, loud):
        law = one.ensemble.law
        place = best(law, one.ensemble.theta, law.points.n[0], law.points.d[0])
        spreads.append(
            (np.ptp(one.ensemble.interval(place.g[:, 0])), np.ptp(one.ensemble.interval(one.ensemble.theta[:, 0])))
        )
    assert spreads[1][0] == pytest.approx(spreads[0][0], rel=0.05) and spreads[1][1] > 3 * spreads[0][1]


def test_replicates_repeat():
    law, used = law_of(own=0.003, seeds=3)
    first, again = (bootstrap(law, used, replicates=50, seed=1).theta for _ in range(2))
    assert np.array_equal(first, again)


def test_too_few_settings_are_refused_and_the_study_goes_on():
    some = from_rows("x", rows(sparsities=(4, 16), slices=(1, 4)))
    found = study(some)
    assert found.fitted is None and "at least 5 settings" in found.no_law and len(found.settings) == 4
    with pytest.raises(DataError, match="none of 12 runs can be used"):
        study(from_rows("x", [row | {"status": "running"} for row in some.rows]))


def test_a_missing_seed_does_not_move_its_setting():
    whole = rows(common=0.05, own=0.0)
    holes = [row for i, row in enumerate(whole) if i not in (0, 7, 14)]
    points = [points_of(settings_of(from_rows("x", some))[0])[0] for some in (whole, holes)]
    first, second = (dict(zip(zip(one.s, one.g, strict=True), one.loss, strict=True)) for one in points)
    assert {at: first[at] - first[next(iter(first))] for at in first} == pytest.approx(
        {at: second[at] - second[next(iter(first))] for at in first}, abs=1e-9
    )
