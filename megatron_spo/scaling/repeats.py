"""Chinchilla's law with repeated data: a token that was seen before is worth less than a new one (arXiv 2305.16264).

    L = E + A / N'^alpha + B / D'^beta
    D' = U + U R_D (1 - exp(-r / R_D)),   r = D / U - 1

U is the number of different tokens, and r the number of repetitions. The law `repeats` sets N' = N. The law
`repeats_excess` also discounts parameters beyond the optimum for U tokens, as Muennighoff et al. do:

    N' = V + V R_N (1 - exp(-s / R_N)),   V = min(N, optimum of U),   s = N / V - 1
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy.optimize import least_squares

from megatron_spo.errors import UserError
from megatron_spo.scaling.additive import CHINCHILLA, DELTA, judge_exponents, judge_offset
from megatron_spo.scaling.law import (
    Ask,
    Intervals,
    Unidentified,
    Values,
    require_distinct,
    require_points,
    require_positive,
)
from megatron_spo.scaling.points import Columns

DATA_STARTS, EXCESS_STARTS = (1.0, 4.0, 16.0, 64.0), (1.0, 5.0, 25.0)
"""Initial values of R_D and R_N."""
POLISHED = 3
"""Number of best initial values from which the minimum is searched."""
LARGEST = 1e4
"""Largest R_D and R_N; so many repetitions are worth as much as new data in any study."""
WIDEST = 20.0
"""Largest ratio of the bounds of R_D and R_N."""
STEPS = 200
"""Most evaluations of a search."""


class Repeats:
    """The law of columns N, D (all tokens), U (different tokens) and loss."""

    required: tuple[str, ...] = ("N", "D", "U", "loss")
    optional: tuple[str, ...] = ()
    outcome = "loss"
    unit = "log loss"
    size_name = "N * D"

    def __init__(self, name: str, *, excess: bool) -> None:
        self.name, self._excess = name, excess
        self._names = ("E", "A", "B", "alpha", "beta", "R_D", *(["R_N"] if excess else []))
        self._logs = np.array([name not in ("alpha", "beta") for name in self._names])

    def check(self, points: Columns) -> None:
        require_positive(points, self.required)
        if (bad := np.flatnonzero(points["U"] > points["D"] * (1 + 1e-6))).size:
            raise UserError(f"U must not exceed D; point {bad[0] + 1} has U = {points['U'][bad[0]]:g}")
        require_points(points, len(self._names) + 1)
        for size in ("N", "D"):
            require_distinct(points, size, 3)
        repeated = points["D"] > 1.5 * points["U"]
        if repeated.sum() < 3:
            raise Unidentified(f"{repeated.sum()} points repeat their data (D > 1.5 U), but at least 3 are needed; add "
                               "runs of several epochs")  # fmt: skip

    def estimate(self, points: Columns, start: Values | None = None) -> Values:
        """Fits by a trust-region search with the Huber loss of log L, from a grid of R_D (and R_N) or from `start`."""
        starts = self._starts(points) if start is None else [self._vector(start)]

        def errors(vector: np.ndarray) -> np.ndarray:
            return self.residuals(self._named(vector), points)

        def cost(vector: np.ndarray) -> float:
            size = np.abs(errors(vector))
            return float(np.where(size > DELTA, size - DELTA / 2, size**2 / (2 * DELTA)).sum())

        top = np.where(self._logs, 60.0, 5.0)
        bottom = -top
        top[5:] = np.log(LARGEST)
        bottom[5:] = np.log(0.05)
        best = sorted((np.clip(one, bottom + 1e-6, top - 1e-6) for one in starts), key=cost)[:POLISHED]
        fits = [least_squares(errors, one, bounds=(bottom, top), loss="huber", f_scale=DELTA, x_scale="jac",
                              max_nfev=STEPS) for one in best]  # fmt: skip
        return self._named(min(fits, key=lambda fit: fit.cost).x)

    def _starts(self, points: Columns) -> list[np.ndarray]:
        starts = []
        for data in DATA_STARTS:
            known = {"N": points["N"], "D": _worth(points["U"], points["D"], data), "loss": points["loss"]}
            values = CHINCHILLA.estimate(known) | {"R_D": data}
            more = [{"R_N": excess} for excess in EXCESS_STARTS] if self._excess else [{}]
            starts += [self._vector(values | one) for one in more]
        return starts

    def _vector(self, values: Values) -> np.ndarray:
        numbers = np.array([values[name] for name in self._names])
        return np.where(self._logs, np.log(np.maximum(numbers, 1e-25)), numbers)

    def _named(self, vector: np.ndarray) -> Values:
        numbers = np.where(self._logs, np.exp(np.where(self._logs, vector, 0.0)), vector)
        return dict(zip(self._names, map(float, numbers), strict=True))

    def predict(self, values: Values, points: Columns) -> np.ndarray:
        n = points["N"]
        alpha, beta = values["alpha"], values["beta"]
        if self._excess:
            with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
                ratio = np.float64(alpha * values["A"]) / (beta * values["B"])
                best = ratio ** (1 / alpha) * points["U"] ** (beta / alpha)  # smallest loss of N + D at D = U
            n = _worth(np.minimum(n, np.where(best > 0, best, n)), n, values["R_N"])
        d = _worth(points["U"], points["D"], values["R_D"])
        found: np.ndarray = values["E"] + values["A"] * n**-alpha + values["B"] * d**-beta
        return found

    def residuals(self, values: Values, points: Columns) -> np.ndarray:
        return np.log(points["loss"]) - np.log(self.predict(values, points))

    def size(self, points: Columns) -> np.ndarray:
        """Returns the compute, up to a constant factor."""
        found: np.ndarray = points["N"] * points["D"]
        return found

    def judge(self, values: Values, intervals: Intervals, points: Columns) -> None:
        judge_exponents({"N": "alpha", "D": "beta"}, values, intervals)
        judge_offset(intervals["E"], points)
        for name in self._names[5:]:
            low, high = intervals[name]
            if high / low > WIDEST:
                more = "different numbers of epochs" if name == "R_D" else "more sizes"
                raise Unidentified(f"{name} has the interval {low:.3g} to {high:.3g}, which is too wide; add runs of "
                                   f"{more}, or more seeds")  # fmt: skip

    def conclude(self, values: Values, draws: Sequence[Values], points: Columns, ask: Ask) -> dict[str, Any]:
        epochs = {str(count): _share(values, count) for count in (2, 4, 8, 16)}
        return {"worth_of_epochs": epochs, "largest_worth": 1 + values["R_D"]}


def _share(values: Mapping[str, float], epochs: int) -> float:
    """Returns what `epochs` passes over the same data are worth, as a share of as much new data."""
    return float(_worth(np.ones(1), np.full(1, float(epochs)), values["R_D"])[0]) / epochs


def _worth(different: np.ndarray, whole: np.ndarray, decay: float) -> np.ndarray:
    """Returns the amount of different items that `whole` items with repetitions are worth."""
    repetitions = np.maximum(whole / different - 1, 0)
    return different * (1 + decay * -np.expm1(-repetitions / decay))


REPEATS = Repeats("repeats", excess=False)
REPEATS_EXCESS = Repeats("repeats_excess", excess=True)
