"""Fits a law to points: Huber's loss on log loss, from several starts; and again, many times, for the bootstrap."""

from __future__ import annotations

import numpy as np

from himoe.analysis.law import OUTSIDE, Form, Law, Model, Points, choose_form
from himoe.errors import MissingExtraError

Array = np.ndarray

HUBER = 1.345
"""Threshold in standard deviations: 95 % as efficient as least squares on normal residuals."""


def fit(points: Points, form: Form | None = None) -> Law:
    """Fit a law to points.

    Args:
        points: one a setting.
        form: which parameters; those that the points can bear by default.

    Raises:
        DataError: too few settings.
    """
    form = choose_form(points) if form is None else form
    model, weights = Model(form, points), points.weights
    starts, spare = list(_starts(form, points)), max(1, len(points) - len(form.terms))
    first = sorted((_solve(model, points.loss, weights, one, np.inf) for one in starts), key=lambda one: one[1])
    rest = np.abs(points.loss - model(first[0][0])) * weights
    # A median, so that outliers do not raise it; over the points to spare, since a fit follows its own points.
    threshold = max(1e-7, HUBER * 1.4826 * float(np.median(rest) * np.sqrt(len(points) / spare)))
    again = [_solve(model, points.loss, weights, one, threshold) for one, _ in first[:3]]
    theta, _ = min(again, key=lambda one: one[1])
    residuals = points.loss - model(theta)
    slopes = model.derivatives(theta) * weights[:, None]
    leverage = np.clip(np.einsum("ip,pi->i", slopes, np.linalg.pinv(slopes)), 0.0, 0.999)
    scale = float(np.sqrt(np.sum((residuals * weights) ** 2) / spare))
    return Law(form, theta, points, residuals, leverage, scale, threshold)


def _starts(form: Form, points: Points) -> list[Array]:
    """Return parameters to start from: the offset and the tokens' part as several shares of the lowest loss."""
    model, loss = Model(form, points), np.exp(points.loss)
    lowest, found = float(loss.min()), []
    for offset in (0.05, 0.4, 0.75) if "E" in form.terms else (0.0,):
        for tokens in (0.03, 0.15, 0.35) if "B" in form.terms else (0.0,):
            taken = lowest * min(offset + tokens, 0.95) * np.ones_like(loss)
            inside = np.linalg.lstsq(model.columns, np.log(loss - taken), rcond=None)[0]
            outside = {"E": np.log(max(offset, 1e-9) * lowest), "B": np.log(max(tokens, 1e-9) * lowest), "beta": 0.3}
            found.append(np.array([*inside, *(outside[name] for name in form.terms if name in OUTSIDE)]))
    return found


def _solve(model: Model, y: Array, weights: Array, start: Array, threshold: float) -> tuple[Array, float]:
    """Return the parameters with the least cost, and that cost."""
    try:
        from scipy.optimize import least_squares
    except ImportError as error:
        raise MissingExtraError("scipy", "analysis") from error
    lower, upper = model.box(float(y.min()), float(y.max()))
    found = least_squares(
        lambda theta: (model(theta) - y) * weights,
        np.clip(start, lower + 1e-6, upper - 1e-6),
        jac=lambda theta: model.derivatives(theta) * weights[:, None],  # type: ignore[arg-type]
        bounds=(lower, upper),
        loss="linear" if np.isinf(threshold) else "huber",
        f_scale=1.0 if np.isinf(threshold) else threshold,
        x_scale="jac",
        max_nfev=300,
    )
    return found.x, float(found.cost)


def refit(law: Law, losses: Array, weights: Array | None = None) -> Array:
    """Return the parameters (rows, P) of the same law for other log losses of its points, a row each, all at once.

    Levenberg and Marquardt's method on reweighted squares, from the law's own parameters: what `fit` does for one row
    from several starts, for hundreds that are near it.

    Args:
        law: with the form, the points and Huber's threshold.
        losses: (rows, points).
        weights: (rows, points); those of the law by default, 0 leaves a point out.
    """
    model, threshold = Model(law.form, law.points), law.threshold
    weights = np.broadcast_to(law.points.weights if weights is None else weights, losses.shape)
    lower, upper = model.box(float(losses.min()), float(losses.max()))
    found = np.broadcast_to(law.theta, (len(losses), len(law.theta))).copy()
    rows = np.arange(len(losses))  # those that still move
    theta, y, w, damping = found.copy(), losses, weights, np.full(len(losses), 1e-6)
    cost, rest = _huber(model, theta, y, w, threshold)
    for _ in range(200):
        pull = w**2 * threshold / np.maximum(np.abs(rest * w), threshold)
        slopes = model.derivatives(theta)
        weighted = slopes * pull[..., None]
        normal = np.swapaxes(slopes, -1, -2) @ weighted
        diagonal = damping[:, None] * np.einsum("bpp->bp", normal) + 1e-14
        damped = normal + diagonal[..., None] * np.eye(theta.shape[1])
        step = np.linalg.solve(damped, (rest[:, None] @ weighted)[:, 0, :, None])[..., 0]
        tried = np.clip(theta + step, lower, upper)
        new_cost, new_rest = _huber(model, tried, y, w, threshold)
        good = new_cost <= cost
        going = np.max(np.abs(tried - theta), axis=1) >= 1e-6
        theta = np.where(good[:, None], tried, theta)
        found[rows] = theta
        cost, rest = np.where(good, new_cost, cost), np.where(good[:, None], new_rest, rest)
        damping = np.clip(np.where(good, damping / 5, damping * 4), 1e-12, 1e9)
        rows, theta, y, w = rows[going], theta[going], y[going], w[going]
        cost, rest, damping = cost[going], rest[going], damping[going]
        if not len(rows):
            break
    return found


def _huber(model: Model, theta: Array, y: Array, weights: Array, threshold: float) -> tuple[Array, Array]:
    """Return the cost of each row, and what is left of y."""
    rest = y - model(theta)
    size = np.abs(rest * weights)
    inner = np.minimum(size, threshold)
    return np.sum(inner * (size - inner / 2), axis=-1), rest
