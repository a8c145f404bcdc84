"""The interface of a law, and checks that several laws share."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from megatron_spo.errors import UserError
from megatron_spo.scaling.points import Columns

Values = dict[str, float]
"""Parameters by name."""
Intervals = Mapping[str, tuple[float, float]]


class Unidentified(UserError):
    """Raised if the data do not determine a law's parameters; the message says why, and what would help."""


@dataclass(frozen=True)
class Ask:
    """What to compute from the fitted law.

    Attributes:
        flops: Compute budgets for which the optimal sizes are wanted (law chinchilla).
        stable_steps: Numbers of steps for which a stable lambda is wanted (law stability).
        at: Values of the other causes for `stable_steps`; by default their geometric means.
    """

    flops: Sequence[float] = ()
    stable_steps: Sequence[float] = ()
    at: Mapping[str, float] | None = None


class Law(Protocol):
    """A law with parameters; all methods are pure.

    Attributes:
        name: Name of the law.
        required: Columns that it needs.
        optional: Columns that it uses if they exist.
        outcome: Column that it predicts.
        unit: Unit of the residuals.
        size_name: Label of `size`.
    """

    name: str
    required: tuple[str, ...]
    optional: tuple[str, ...]
    outcome: str
    unit: str
    size_name: str

    def check(self, points: Columns) -> None:
        """Raises Unidentified if these points cannot determine the parameters, whatever the outcome."""

    def estimate(self, points: Columns, start: Values | None = None) -> Values:
        """Returns the best parameters; `start` is a fit of similar points."""

    def residuals(self, values: Values, points: Columns) -> np.ndarray:
        """Returns observed minus predicted for each point, in the unit that the fit minimises (`unit`)."""

    def predict(self, values: Values, points: Columns) -> np.ndarray:
        """Returns the predicted outcome of each point."""

    def size(self, points: Columns) -> np.ndarray:
        """Returns the size of each point; the largest points are held out to test extrapolation."""

    def judge(self, values: Values, intervals: Intervals, points: Columns) -> None:
        """Raises Unidentified if the fitted parameters are not meaningful."""

    def conclude(self, values: Values, draws: Sequence[Values], points: Columns, ask: Ask) -> dict[str, Any]:
        """Returns further entries of the report; `draws` are the bootstrap's parameters."""


LEVEL = 0.95
"""Coverage of the intervals."""


def interval(numbers: Sequence[float]) -> tuple[float, float]:
    """Returns the percentiles that enclose LEVEL of the bootstrap's numbers."""
    low, high = np.percentile(numbers, [50 * (1 - LEVEL), 50 * (1 + LEVEL)])
    return float(low), float(high)


def require_positive(points: Columns, names: Sequence[str]) -> None:
    """Raises UserError naming the first point at which one of these columns is not positive."""
    for name in names:
        if (bad := np.flatnonzero(points[name] <= 0)).size:
            raise UserError(f"{name} must be positive; point {bad[0] + 1} has {points[name][bad[0]]:g}")


def require_distinct(points: Columns, name: str, least: int) -> None:
    """Raises Unidentified for fewer distinct values of a column than are needed."""
    if (count := len(np.unique(points[name]))) < least:
        raise Unidentified(
            f"{name} has {count} distinct values, but at least {least} are needed; add runs with other {name}"
        )


def require_points(points: Columns, least: int) -> None:
    """Raises Unidentified for fewer points than are needed."""
    if (count := len(next(iter(points.values())))) < least:
        raise Unidentified(f"{count} points, but at least {least} are needed; add runs")
