"""What a law is to the fit, and the checks that several laws share."""

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
    """The data do not determine the law's parameters; the message says why and what would."""


@dataclass(frozen=True)
class Ask:
    """What is computed from the fitted law: optimal sizes at `flops`, lambda for `stable_steps` steps."""

    flops: Sequence[float] = ()
    stable_steps: Sequence[float] = ()
    at: Mapping[str, float] | None = None


class Law(Protocol):
    """A law with parameters; all methods are pure.

    Attributes:
        required, optional: the columns it reads.
        outcome: the column that it predicts.
        unit: of the residuals.
        size_name: what `size` is.
    """

    name: str
    required: tuple[str, ...]
    optional: tuple[str, ...]
    outcome: str
    unit: str
    size_name: str

    def check(self, points: Columns) -> None:
        """Raises Unidentified where these points cannot determine the parameters, whatever their values."""

    def estimate(self, points: Columns, start: Values | None = None) -> Values:
        """The parameters that fit best; `start` is a fit of similar points."""

    def residuals(self, values: Values, points: Columns) -> np.ndarray:
        """Of each point: seen minus predicted, in the unit that the fit minimises (`unit`)."""

    def predict(self, values: Values, points: Columns) -> np.ndarray:
        """In the unit of the points."""

    def size(self, points: Columns) -> np.ndarray:
        """By what the largest points are held out."""

    def judge(self, values: Values, intervals: Intervals, points: Columns) -> None:
        """Raises Unidentified where the fitted parameters mean nothing."""

    def conclude(self, values: Values, draws: Sequence[Values], points: Columns, ask: Ask) -> dict[str, Any]:
        """Further entries of the result; `draws` are the bootstrap's parameters."""


LEVEL = 0.95
"""Coverage of the intervals."""


def interval(numbers: Sequence[float]) -> tuple[float, float]:
    """Percentiles that hold LEVEL of the bootstrap's numbers."""
    low, high = np.percentile(numbers, [50 * (1 - LEVEL), 50 * (1 + LEVEL)])
    return float(low), float(high)


def require_positive(points: Columns, names: Sequence[str]) -> None:
    """Raises UserError naming the first point at which one of these columns is not above 0."""
    for name in names:
        if (bad := np.flatnonzero(points[name] <= 0)).size:
            raise UserError(f"{name} must be positive; point {bad[0] + 1} has {points[name][bad[0]]:g}")


def require_distinct(points: Columns, name: str, least: int) -> None:
    """Raises Unidentified for fewer distinct values of a column than are needed."""
    if (count := len(np.unique(points[name]))) < least:
        raise Unidentified(f"{count} distinct {name}: at least {least} are needed; add runs with other {name}")


def require_points(points: Columns, least: int) -> None:
    """Raises Unidentified for fewer points than are needed."""
    if (count := len(next(iter(points.values())))) < least:
        raise Unidentified(f"{count} points: at least {least} are needed")
