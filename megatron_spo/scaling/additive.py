"""L = E + sum over x of A_x / x^alpha_x: Chinchilla's law in N and D, and a power law with offset in one x.

Source of Chinchilla's law and of the fitting method: Hoffmann et al. (arXiv 2203.15556).
"""

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.optimize import minimize, nnls
from scipy.special import softmax

from megatron_spo.scaling.law import (
    Ask,
    Intervals,
    Unidentified,
    Values,
    interval,
    require_distinct,
    require_points,
    require_positive,
)
from megatron_spo.scaling.points import Columns

DELTA = 1e-3
"""Error of log L at which the Huber loss changes from quadratic to linear, as in Hoffmann et al."""
EXPONENTS = (-0.5, 0.05, 0.15, 0.25, 0.35, 0.45, 0.6, 0.8, 1.1, 1.5)
"""Initial values of each exponent; for given exponents, E and A_x follow from non-negative least squares."""
POLISHED = 6
"""Number of best initial values from which the minimum is searched."""
COLLINEAR = 0.05
"""Least deviation of log D from a line in log N; below it, the two terms cannot be separated."""
WIDEST_EXPONENT, WIDEST_OFFSET = 3.0, 0.5
"""Largest ratio of the bounds of an exponent, and largest width of E's interval as a share of the lowest loss."""
FLOPS_PER_PARAMETER_AND_TOKEN = 6


class Additive:
    """The law for given size columns; its parameters are E, the coefficients and the exponents."""

    optional: tuple[str, ...] = ()
    outcome = "loss"
    unit = "log loss"

    def __init__(self, name: str, sizes: Sequence[str], coefficients: Sequence[str], exponents: Sequence[str]) -> None:
        self.name, self.sizes = name, tuple(sizes)
        self.coefficients, self.exponents = tuple(coefficients), tuple(exponents)
        self.required = (*self.sizes, "loss")
        self.size_name = " * ".join(sizes)

    def check(self, points: Columns) -> None:
        require_positive(points, self.required)
        require_points(points, 2 * len(self.sizes) + 2)
        for size in self.sizes:
            require_distinct(points, size, 3)
        if len(self.sizes) == 2:
            first, second = (np.log(points[size]) for size in self.sizes)
            line = np.polyfit(first, second, 1)
            if np.std(second - np.polyval(line, first)) < COLLINEAR:
                raise Unidentified(
                    f"{self.sizes[1]} is a power of {self.sizes[0]} in all points (exponent {line[0]:.2f}), so their "
                    "terms cannot be separated; add runs of one size with several numbers of tokens"
                )

    def estimate(self, points: Columns, start: Values | None = None) -> Values:
        """Fits by BFGS from the best points of a grid, or only from `start`.

        Sizes and losses are divided by their geometric means, so that their units do not matter.
        """
        logs = np.stack([np.log(points[size]) for size in self.sizes], 1)
        loss = np.log(points["loss"])
        centre, level = logs.mean(0), loss.mean()
        x, y = logs - centre, loss - level
        if start is None:
            starts = _grid(x, y)
        else:
            exponents = np.array([start[name] for name in self.exponents])
            amounts = np.array([start[name] for name in ("E", *self.coefficients)])
            shift = np.concatenate([[0.0], exponents * centre])
            starts = [np.concatenate([np.log(amounts) - shift - level, exponents])]
        fits = [minimize(_huber, point, (x, y), "BFGS", jac=True, options={"gtol": 1e-7}) for point in starts]
        best = min(fits, key=lambda fit: fit.fun).x
        amounts, exponents = best[: 1 + len(self.sizes)], best[1 + len(self.sizes) :]
        logs_of_amounts = amounts + level + np.concatenate([[0.0], exponents * centre])
        amounts = np.exp(np.clip(logs_of_amounts, -700, 700))  # unbounded for a draw without curvature
        return dict(zip(("E", *self.coefficients, *self.exponents), [*map(float, amounts), *map(float, exponents)],
                        strict=True))  # fmt: skip

    def predict(self, values: Values, points: Columns) -> np.ndarray:
        total = np.full(len(points["loss"]), values["E"])
        for size, coefficient, exponent in zip(self.sizes, self.coefficients, self.exponents, strict=True):
            total += values[coefficient] * points[size] ** -values[exponent]
        return total

    def residuals(self, values: Values, points: Columns) -> np.ndarray:
        return np.log(points["loss"]) - np.log(self.predict(values, points))

    def size(self, points: Columns) -> np.ndarray:
        """Returns the compute, up to a constant factor."""
        return np.prod([points[size] for size in self.sizes], axis=0)

    def judge(self, values: Values, intervals: Intervals, points: Columns) -> None:
        for size, exponent in zip(self.sizes, self.exponents, strict=True):
            low, high = intervals[exponent]
            if values[exponent] <= 0:
                raise Unidentified(
                    f"{exponent} = {values[exponent]:.3g} is not positive: the loss does not fall with {size}; add "
                    f"runs over a wider range of {size}"
                )
            if low <= 0 or high / low > WIDEST_EXPONENT:
                raise Unidentified(
                    f"{exponent} has the interval {low:.3g} to {high:.3g}, which is too wide: the curvature of the "
                    f"loss over {size} is small against its noise; add runs over a wider range of {size}, or more seeds"
                )
        low, high = intervals["E"]
        if high - low > WIDEST_OFFSET * points["loss"].min():
            raise Unidentified(
                f"E has the interval {low:.3g} to {high:.3g}, which is too wide: no point is close enough to the "
                "irreducible loss; add runs of larger compute"
            )

    def conclude(self, values: Values, draws: Sequence[Values], points: Columns, ask: Ask) -> dict[str, Any]:
        if len(self.sizes) == 1:
            return {}
        shares = [_share(draw) for draw in draws]
        optimum: dict[str, Any] = {
            "N_exponent": _share(values),
            "D_exponent": 1 - _share(values),
            "N_exponent_interval": interval(shares),
            "flops_per_parameter_and_token": FLOPS_PER_PARAMETER_AND_TOKEN,
            "at": [self._optimum(values, flops) for flops in ask.flops],
        }
        return {"compute_optimal": optimum}

    def _optimum(self, values: Values, flops: float) -> dict[str, float]:
        """Returns the N and D of the lowest loss for flops = 6 N D (Hoffmann et al., section 3.3)."""
        product = flops / FLOPS_PER_PARAMETER_AND_TOKEN
        ratio = values["alpha"] * values["A"] / (values["beta"] * values["B"])
        n = float(ratio ** (1 / (values["alpha"] + values["beta"])) * product ** _share(values))
        at = {"N": np.array([n]), "D": np.array([product / n]), "loss": np.zeros(1)}
        return {"flops": flops, "N": n, "D": product / n, "loss": float(self.predict(values, at)[0])}


def _share(values: Values) -> float:
    """Returns the exponent with which the optimal N grows with compute, beta / (alpha + beta)."""
    return values["beta"] / (values["alpha"] + values["beta"])


def _grid(x: np.ndarray, y: np.ndarray) -> list[np.ndarray]:
    """Returns the POLISHED best initial values; x [points, sizes] and y [points] are centred logs."""
    starts = []
    for exponents in itertools.product(EXPONENTS, repeat=x.shape[1]):
        terms = np.column_stack([np.ones(len(y)), np.exp(-x * exponents)])
        amounts, _ = nnls(terms / np.exp(y)[:, None], np.ones(len(y)))  # relative errors
        starts.append(np.concatenate([np.log(np.maximum(amounts, 1e-3)), exponents]))
    return sorted(starts, key=lambda point: _huber(point, x, y)[0])[:POLISHED]


def _huber(point: np.ndarray, x: np.ndarray, y: np.ndarray) -> tuple[float, np.ndarray]:
    """Returns the Huber loss of y against the log of a sum of exponentials, divided by DELTA, and its gradient."""
    amounts, exponents = point[: 1 + x.shape[1]], point[1 + x.shape[1] :]
    terms = np.column_stack([np.full(len(y), amounts[0]), amounts[1:] - x * exponents])
    error = np.logaddexp.reduce(terms, axis=1) - y
    far = np.abs(error) > DELTA
    loss = np.where(far, np.abs(error) - DELTA / 2, error**2 / (2 * DELTA))
    slope = np.where(far, np.sign(error), error / DELTA)[:, None] * softmax(terms, axis=1)
    gradient = np.concatenate([slope.sum(0), -(slope[:, 1:] * x).sum(0)])
    return float(loss.sum()), gradient


CHINCHILLA = Additive("chinchilla", ("N", "D"), ("A", "B"), ("alpha", "beta"))
POWER = Additive("power", ("x",), ("A",), ("alpha",))
