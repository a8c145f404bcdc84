"""L = E + sum over x of A_x / x^alpha_x: Chinchilla's law in N and D, and power laws in one x, with and without E.

Source of Chinchilla's law and of the fitting method: Hoffmann et al. (arXiv 2203.15556).
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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

    def __init__(
        self, name: str, sizes: Sequence[str], coefficients: Sequence[str], exponents: Sequence[str], *,
        offset: bool = True,
    ) -> None:  # fmt: skip
        self.name, self.sizes = name, tuple(sizes)
        self.coefficients, self.exponents = tuple(coefficients), tuple(exponents)
        self.amounts = ("E", *self.coefficients) if offset else self.coefficients
        self.required = (*self.sizes, "loss")
        self.size_name = " * ".join(sizes)

    def check(self, points: Columns) -> None:
        require_positive(points, self.required)
        require_points(points, 1 + len(self.amounts) + len(self.exponents))
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
        frame = self.frame(points)
        starts = _grid(frame, len(self.amounts)) if start is None else [frame.enter(self.vector(start))]
        fits = [minimize(huber, point, (frame.x, frame.y), "BFGS", jac=True, options={"gtol": 1e-7})
                for point in starts]  # fmt: skip
        return self.named(frame.leave(min(fits, key=lambda fit: fit.fun).x))

    def frame(self, points: Columns) -> "Frame":
        """Returns the logs of sizes and losses around their means."""
        logs = np.stack([np.log(points[size]) for size in self.sizes], 1)
        loss = np.log(points["loss"])
        return Frame(logs - logs.mean(0), loss - loss.mean(), logs.mean(0), loss.mean())

    def vector(self, values: Values) -> np.ndarray:
        """Returns the logs of the amounts, and the exponents."""
        amounts = np.log([max(values[name], 1e-300) for name in self.amounts])
        return np.concatenate([amounts, [values[name] for name in self.exponents]])

    def named(self, vector: np.ndarray) -> Values:
        """Returns the parameters by name, from logs of the amounts, and exponents."""
        count = len(self.amounts)
        amounts = np.exp(np.clip(vector[:count], -700, 700))  # unbounded for a draw without curvature
        numbers = [*map(float, amounts), *map(float, vector[count:])]
        return dict(zip((*self.amounts, *self.exponents), numbers, strict=True))

    def predict(self, values: Values, points: Columns) -> np.ndarray:
        total = np.full(len(points[self.sizes[0]]), values.get("E", 0.0))
        for size, coefficient, exponent in zip(self.sizes, self.coefficients, self.exponents, strict=True):
            total += values[coefficient] * points[size] ** -values[exponent]
        return total

    def residuals(self, values: Values, points: Columns) -> np.ndarray:
        return np.log(points["loss"]) - np.log(self.predict(values, points))

    def size(self, points: Columns) -> np.ndarray:
        """Returns the compute, up to a constant factor."""
        return np.prod([points[size] for size in self.sizes], axis=0)

    def judge(self, values: Values, intervals: Intervals, points: Columns) -> None:
        judge_exponents(dict(zip(self.sizes, self.exponents, strict=True)), values, intervals)
        if "E" in self.amounts:
            judge_offset(intervals["E"], points)

    def conclude(self, values: Values, draws: Sequence[Values], points: Columns, ask: Ask) -> dict[str, Any]:
        if len(self.sizes) == 1:
            return {}
        shares = [_share(draw) for draw in draws]
        optimum: dict[str, Any] = {
            "N_exponent": _share(values),
            "D_exponent": 1 - _share(values),
            "N_exponent_interval": interval(shares),
            "flops_per_parameter_and_token": FLOPS_PER_PARAMETER_AND_TOKEN,
            "at": [self._with_intervals(values, draws, flops) for flops in ask.flops],
        }
        return {"compute_optimal": optimum}

    def _with_intervals(self, values: Values, draws: Sequence[Values], flops: float) -> dict[str, Any]:
        optima = [self.optimum(draw, flops) for draw in draws]
        ranges = {f"{name}_interval": interval([one[name] for one in optima]) for name in ("N", "D", "loss")}
        return {**self.optimum(values, flops), **ranges}

    def optimum(self, values: Values, flops: float) -> dict[str, float]:
        """Returns the N and D of the lowest loss for flops = 6 N D (Hoffmann et al., section 3.3)."""
        product = flops / FLOPS_PER_PARAMETER_AND_TOKEN
        ratio = values["alpha"] * values["A"] / (values["beta"] * values["B"])
        n = float(ratio ** (1 / (values["alpha"] + values["beta"])) * product ** _share(values))
        at = {"N": np.array([n]), "D": np.array([product / n])}
        return {"flops": flops, "N": n, "D": product / n, "loss": float(self.predict(values, at)[0])}


@dataclass(frozen=True)
class Frame:
    """Logs of the sizes x [points, sizes] and of the losses y [points] around their means."""

    x: np.ndarray
    y: np.ndarray
    centre: np.ndarray
    level: float

    def enter(self, vector: np.ndarray) -> np.ndarray:
        """Returns parameters (logs of amounts, exponents) of the given units in those of the frame."""
        return self._moved(vector, -1)

    def leave(self, vector: np.ndarray) -> np.ndarray:
        """Returns parameters of the frame in the given units."""
        return self._moved(vector, 1)

    def _moved(self, vector: np.ndarray, sign: int) -> np.ndarray:
        count = len(self.centre)
        moved, exponents = vector.copy(), vector[-count:]
        moved[:-count] += sign * self.level
        moved[-2 * count : -count] += sign * exponents * self.centre
        return moved


def judge_exponents(of_sizes: Mapping[str, str], values: Values, intervals: Intervals) -> None:
    """Raises Unidentified for an exponent that is not positive or whose interval is too wide."""
    for size, exponent in of_sizes.items():
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


def judge_offset(bounds: tuple[float, float], points: Columns) -> None:
    """Raises Unidentified if the interval of E is too wide."""
    low, high = bounds
    if high - low > WIDEST_OFFSET * points["loss"].min():
        raise Unidentified(
            f"E has the interval {low:.3g} to {high:.3g}, which is too wide: no point is close enough to the "
            "irreducible loss; add runs of larger compute"
        )


def _share(values: Values) -> float:
    """Returns the exponent with which the optimal N grows with compute, beta / (alpha + beta)."""
    return values["beta"] / (values["alpha"] + values["beta"])


def _grid(frame: Frame, amounts: int) -> list[np.ndarray]:
    """Returns the POLISHED best initial values."""
    starts = [initial(frame, exponents, amounts) for exponents in itertools.product(EXPONENTS,
              repeat=len(frame.centre))]  # fmt: skip
    return sorted(starts, key=lambda point: huber(point, frame.x, frame.y)[0])[:POLISHED]


def initial(frame: Frame, exponents: Sequence[float], amounts: int) -> np.ndarray:
    """Returns parameters with these exponents and the amounts of the least squares of relative errors."""
    terms = np.exp(-frame.x * np.asarray(exponents))
    if amounts > terms.shape[1]:
        terms = np.column_stack([np.ones(len(terms)), terms])
    found, _ = nnls(terms / np.exp(frame.y)[:, None], np.ones(len(terms)))
    return np.concatenate([np.log(np.maximum(found, 1e-3)), exponents])


def huber(point: np.ndarray, x: np.ndarray, y: np.ndarray) -> tuple[float, np.ndarray]:
    """Returns the Huber loss of y against the log of a sum of exponentials, divided by DELTA, and its gradient."""
    sizes = x.shape[1]
    amounts, exponents = point[:-sizes], point[-sizes:]
    terms = amounts[-sizes:] - x * exponents
    if len(amounts) > sizes:  # with the offset
        terms = np.column_stack([np.full(len(y), amounts[0]), terms])
    error = np.logaddexp.reduce(terms, axis=1) - y
    far = np.abs(error) > DELTA
    loss = np.where(far, np.abs(error) - DELTA / 2, error**2 / (2 * DELTA))
    slope = np.where(far, np.sign(error), error / DELTA)[:, None] * softmax(terms, axis=1)
    gradient = np.concatenate([slope.sum(0), -(slope[:, -sizes:] * x).sum(0)])
    return float(loss.sum()), gradient


CHINCHILLA = Additive("chinchilla", ("N", "D"), ("A", "B"), ("alpha", "beta"))
POWER = Additive("power", ("x",), ("A",), ("alpha",))
PURE_POWER = Additive("pure_power", ("x",), ("A",), ("alpha",), offset=False)
