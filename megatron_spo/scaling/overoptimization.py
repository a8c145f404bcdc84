"""R(d) = d (alpha - beta log d), d = sqrt(KL): over-optimization of direct alignment (arXiv 2406.02900)."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from megatron_spo.errors import UserError
from megatron_spo.scaling.law import (
    Ask,
    Intervals,
    Unidentified,
    Values,
    interval,
    require_distinct,
    require_points,
)
from megatron_spo.scaling.points import Columns


class Overoptimization:
    """The law of columns `kl` (nats from the reference, >= 0) and `reward` (any score minus that of the reference)."""

    name = "overoptimization"
    required: tuple[str, ...] = ("kl", "reward")
    optional: tuple[str, ...] = ()
    outcome = "reward"
    size_name = "kl"
    unit = "reward"

    def check(self, points: Columns) -> None:
        kl, reward = points["kl"], points["reward"]
        if (kl < 0).any():
            raise UserError(f"kl must not be negative; point {np.flatnonzero(kl < 0)[0] + 1} has {kl.min():g}")
        if (reward[kl == 0] != 0).any():
            raise UserError("reward must be 0 at kl = 0; subtract the reference's reward from every reward")
        require_points({"kl": kl[kl > 0]}, 5)
        require_distinct({"kl": kl[kl > 0]}, "kl", 3)

    def estimate(self, points: Columns, start: Values | None = None) -> Values:
        """Fits by least squares, since the law is linear in its parameters."""
        (alpha, beta), *_ = np.linalg.lstsq(_terms(points), points["reward"])
        return {"alpha": float(alpha), "beta": float(beta)}

    def predict(self, values: Values, points: Columns) -> np.ndarray:
        return _terms(points) @ np.array([values["alpha"], values["beta"]])

    def residuals(self, values: Values, points: Columns) -> np.ndarray:
        return points["reward"] - self.predict(values, points)

    def size(self, points: Columns) -> np.ndarray:
        """Returns the KL divergence from the reference."""
        return points["kl"]

    def judge(self, values: Values, intervals: Intervals, points: Columns) -> None:
        low, high = intervals["beta"]
        if low <= 0:
            raise Unidentified(
                f"beta has the interval {low:.3g} to {high:.3g}, but must be positive: the points show no "
                "over-optimization (no curvature of the reward over sqrt(kl)); add runs further from the reference"
            )

    def conclude(self, values: Values, draws: Sequence[Values], points: Columns, ask: Ask) -> dict[str, Any]:
        peaks = [_peak(draw) for draw in draws]
        peak = _peak(values)
        at = float(self.predict(values, {"kl": np.array([peak])})[0])
        seen = bool(peak <= points["kl"].max())
        return {"peak": {"kl": peak, "kl_interval": interval(peaks), "reward": at, "within_points": seen}}


def _terms(points: Columns) -> np.ndarray:
    """Returns d and -d log d of each point, [points, 2]; the latter is 0 at d = 0."""
    d = np.sqrt(points["kl"])
    return np.column_stack([d, -d * np.log(np.where(d > 0, d, 1.0))])


def _peak(values: Values) -> float:
    """Returns the KL of the highest reward, at which log d = alpha / beta - 1."""
    return float(np.exp(2 * np.clip(values["alpha"] / values["beta"] - 1, -50, 50)))


OVEROPTIMIZATION = Overoptimization()
