"""Number of steps until a run's displacement crosses a bound, log-linear in the training settings (a Tobit model).

    log steps = c + sum over x of c_x * t_x + sigma * normal noise

t is the log of lr, beta, N and rows (of the data), and log(1 + lambda), since lambda may be 0. A run that ended before
it crossed the bound is right-censored: it would have taken longer. Omitting it, or treating its end as a crossing,
would make stable settings look worse.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy.optimize import minimize
from scipy.stats import norm

from megatron_spo.errors import UserError
from megatron_spo.scaling.law import (
    Ask,
    Intervals,
    Unidentified,
    Values,
    interval,
    require_points,
    require_positive,
)
from megatron_spo.scaling.points import Columns

CAUSES = ("lr", "beta", "lambda", "N", "rows")
STABLE = 0.9
"""Probability that a run with the predicted lambda stays within the bound."""
WIDEST = 20.0
"""Largest width of a coefficient's interval; a wider one is not informative."""


class Stability:
    """The law of columns `steps` (until the crossing, or the end) and `crossed` (1 or 0), and the causes that vary."""

    name = "stability"
    required: tuple[str, ...] = ("steps", "crossed")
    optional: tuple[str, ...] = CAUSES
    outcome = "steps"
    size_name = "N, or the first cause that varies"
    unit = "log steps"

    def check(self, points: Columns) -> None:
        crossed = points["crossed"]
        if not np.isin(crossed, (0, 1)).all():
            raise UserError("crossed must be 1 (or true) or 0 (or false) in every row")
        require_positive(points, [name for name in ("steps", "lr", "beta", "N", "rows") if name in points])
        if "lambda" in points and (points["lambda"] < 0).any():
            raise UserError("lambda must not be negative")
        causes = varied(points)
        if not causes:
            raise Unidentified(f"no cause varies; add runs that vary at least one of {', '.join(CAUSES)}")
        if not crossed.any():
            raise Unidentified("no run crossed the bound (all are censored); train longer, or set a closer bound")
        require_points({"steps": points["steps"][crossed == 1]}, len(causes) + 3)
        terms = _terms(points, causes)[crossed == 1]
        for i, name in enumerate(causes):
            if len(np.unique(terms[:, 1 + i])) < 2:
                raise Unidentified(f"all runs that crossed the bound have the same {name}; add runs with other {name} "
                                   "until some cross it, or train longer")  # fmt: skip
        if np.linalg.matrix_rank((terms - terms.mean(0))[:, 1:], tol=1e-6) < len(causes):
            raise Unidentified(f"{', '.join(causes)} vary together among the runs that crossed the bound; vary them "
                               "one by one")  # fmt: skip

    def estimate(self, points: Columns, start: Values | None = None) -> Values:
        """Maximises the likelihood over standardised causes, by BFGS from the least-squares fit of all runs."""
        causes = varied(points)
        terms = _terms(points, causes)
        mean, scale = terms[:, 1:].mean(0), terms[:, 1:].std(0)
        x = np.column_stack([np.ones(len(terms)), (terms[:, 1:] - mean) / scale])
        y, crossed = np.log(points["steps"]), points["crossed"] == 1
        line, *_ = np.linalg.lstsq(x, y)
        spread = max(float(np.std(y - x @ line)), 0.01)
        fit = minimize(_unlikelihood, [*line, np.log(spread)], (x, y, crossed), "BFGS", jac=True)
        slopes = fit.x[1:-1] / scale
        found = {"c": float(fit.x[0] - slopes @ mean)}
        found |= {f"c_{name}": float(slope) for name, slope in zip(causes, slopes, strict=True)}
        return {**found, "sigma": float(np.exp(fit.x[-1]))}

    def predict(self, values: Values, points: Columns) -> np.ndarray:
        """Returns the median number of steps."""
        causes = [name.removeprefix("c_") for name in values if name.startswith("c_")]
        return np.exp(_terms(points, causes) @ [values["c"], *(values[f"c_{name}"] for name in causes)])

    def residuals(self, values: Values, points: Columns) -> np.ndarray:
        """Returns log residuals; that of a censored run is 0 unless it lasted longer than predicted."""
        error = np.log(points["steps"]) - np.log(self.predict(values, points))
        return np.where(points["crossed"] == 1, error, np.maximum(error, 0))

    def size(self, points: Columns) -> np.ndarray:
        """Returns N if it varies, else the first cause that varies."""
        causes = varied(points)
        return points["N" if "N" in causes else causes[0]]

    def judge(self, values: Values, intervals: Intervals, points: Columns) -> None:
        for name, (low, high) in intervals.items():
            if name.startswith("c_") and high - low > WIDEST:
                raise Unidentified(
                    f"{name} has the interval {low:.3g} to {high:.3g}, which is too wide: too few runs crossed the "
                    f"bound at different {name.removeprefix('c_')}; add such runs"
                )

    def conclude(self, values: Values, draws: Sequence[Values], points: Columns, ask: Ask) -> dict[str, Any]:
        causes = varied(points)
        middle = {name: float(np.exp(np.log(points[name]).mean())) for name in causes if name != "lambda"}
        if unknown := sorted(set(ask.at or {}) - set(middle)):
            raise UserError(f"--at {unknown[0]}=...: {unknown[0]} does not vary in these points; set one of: "
                            f"{', '.join(middle)}")  # fmt: skip
        at = middle | dict(ask.at or {})
        found: dict[str, Any] = {"censored": int((points["crossed"] == 0).sum()), "at": at}
        if ask.stable_steps and "lambda" not in causes:
            raise UserError("--stable-steps: lambda does not vary in these points; add runs with other lambdas")
        found["stable_lambda"] = [
            {
                "steps": steps,
                "probability": STABLE,
                "lambda": _stable_lambda(values, steps, at),
                "largest_seen": float(points["lambda"].max()),
                "lambda_interval": _lambda_interval([_stable_lambda(draw, steps, at) for draw in draws]),
            }
            for steps in ask.stable_steps
        ]
        return found


def varied(points: Columns) -> list[str]:
    """Returns the causes with more than one value."""
    return [name for name in CAUSES if name in points and len(np.unique(points[name])) > 1]


def _terms(points: Columns, causes: Sequence[str]) -> np.ndarray:
    """Returns the regressors [points, 1 + causes], the first one constant."""
    logs = [np.log1p(points[name]) if name == "lambda" else np.log(points[name]) for name in causes]
    return np.column_stack([np.ones(len(next(iter(points.values())))), *logs])


@np.errstate(over="ignore", invalid="ignore")  # the search may try an extreme sigma, and then rejects it
def _unlikelihood(point: np.ndarray, x: np.ndarray, y: np.ndarray, crossed: np.ndarray) -> tuple[float, np.ndarray]:
    """Returns minus the log likelihood and its gradient; the last parameter is log sigma."""
    sigma = np.exp(point[-1])
    z = (y - x @ point[:-1]) / sigma
    tail = norm.logsf(z)
    logs = np.where(crossed, norm.logpdf(z) - point[-1], tail)
    slope = np.where(crossed, z, np.exp(norm.logpdf(z) - tail))  # minus d logs / d z
    gradient = np.concatenate([-(slope / sigma) @ x, [-np.sum(slope * z - crossed)]])
    return -float(logs.sum()), gradient


def _stable_lambda(values: Values, steps: float, at: Mapping[str, float]) -> float | None:
    """Returns the least lambda that keeps a run within the bound for `steps` steps; None if lambda does not help."""
    if values["c_lambda"] <= 0:
        return None
    others = values["c"] + sum(values[f"c_{name}"] * np.log(value) for name, value in at.items())
    needed = np.log(steps) + norm.ppf(STABLE) * values["sigma"] - others
    return float(np.expm1(np.clip(needed / values["c_lambda"], 0, 50)))


def _lambda_interval(found: Sequence[float | None]) -> tuple[float, float] | None:
    """Returns the interval, or None if lambda does not help in some draws."""
    numbers = [number for number in found if number is not None]
    return interval(numbers) if len(numbers) == len(found) else None


STABILITY = Stability()
