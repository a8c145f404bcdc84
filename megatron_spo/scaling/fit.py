"""Fits a law to points: parameters, bootstrap intervals, extrapolation error and conclusions; or says why it cannot."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from megatron_spo.errors import UserError
from megatron_spo.meter import Meter
from megatron_spo.scaling.additive import CHINCHILLA, POWER, PURE_POWER
from megatron_spo.scaling.law import LEVEL, Ask, Law, Unidentified, Values, interval
from megatron_spo.scaling.overoptimization import OVEROPTIMIZATION
from megatron_spo.scaling.points import Columns, Points
from megatron_spo.scaling.repeats import REPEATS, REPEATS_EXCESS
from megatron_spo.scaling.stability import STABILITY

LAWS: dict[str, Law] = {
    law.name: law for law in (CHINCHILLA, POWER, PURE_POWER, REPEATS, REPEATS_EXCESS, OVEROPTIMIZATION, STABILITY)
}
BOOTSTRAP = 1000
"""Default number of bootstrap refits."""
HELD_OUT = 0.2
"""Share of the largest points that are held out to test extrapolation; points of equal size stay together."""
TRIES = 20
"""Most draws per bootstrap refit, since some draws do not determine the law."""


@dataclass(frozen=True)
class Fit:
    """A fitted law, or one that the points do not determine; `report` is the content of FIT.json.

    Attributes:
        values: Parameters; None if they could not be estimated.
        draws: Parameters of the bootstrap draws, by the number of the draw.
        refusal: Why the points do not determine the law; None if they do.
    """

    law: Law
    points: Columns
    report: dict[str, Any]
    values: Values | None = None
    draws: Mapping[int, Values] = field(default_factory=dict)
    refusal: Unidentified | None = None

    @property
    def held_out(self) -> np.ndarray:
        """Which points are held out to test extrapolation; none for a refused fit."""
        large = largest(self.law, self.points) if self.refusal is None else None
        return np.zeros(count(self.points), dtype=bool) if large is None else large


def fit(law: Law, points: Points, ask: Ask, *, bootstrap: int = BOOTSTRAP, seed: int = 0) -> Fit:
    """Fits a law, as `attempt` does.

    Raises:
        UserError: If the points are invalid, or do not determine the law (Unidentified); the message says why.
    """
    found = attempt(law, points, ask, bootstrap=bootstrap, seed=seed)
    if found.refusal is not None:
        raise found.refusal
    return found


def attempt(law: Law, points: Points, ask: Ask, *, bootstrap: int = BOOTSTRAP, seed: int = 0) -> Fit:
    """Fits a law; if the points do not determine it, the result has `refusal` and what was found until then.

    Args:
        law: Law to fit.
        points: Points to fit it to.
        ask: Further quantities to compute.
        bootstrap: Number of bootstrap refits.
        seed: Seed of the bootstrap.

    Raises:
        UserError: If the points are invalid.
    """
    columns = points.columns
    report: dict[str, Any] = {
        "law": law.name,
        "columns": dict(points.names),
        "points": count(columns),
        "left_out": points.left_out,
    }
    values, draws = None, {}
    try:
        law.check(columns)
        values = law.estimate(columns)
        report |= {"parameters": values, "residuals": summary(law, law.residuals(values, columns))}
        report["held_out"] = extrapolate(law, columns)
        draws = resample(law, columns, values, bootstrap, seed)
        intervals = {name: interval([draw[name] for draw in draws.values()]) for name in values}
        report |= {
            "intervals": intervals,
            "interval_of": {"level": LEVEL, "bootstrap": bootstrap, "seed": seed},
        }
        law.judge(values, intervals, columns)
        report |= law.conclude(values, list(draws.values()), columns, ask)
    except Unidentified as error:
        return Fit(law, columns, {**report, "refused": str(error)}, values, draws, error)
    return Fit(law, columns, report, values, draws)


def largest(law: Law, points: Columns) -> np.ndarray:
    """Returns which points are the largest HELD_OUT of all."""
    size = law.size(points)
    large: np.ndarray = size >= np.sort(size)[-max(1, round(HELD_OUT * len(size)))]
    return large


def extrapolate(law: Law, points: Columns) -> dict[str, Any]:
    """Returns the errors on the largest points of a fit to the others."""
    large = largest(law, points)
    rest = {name: column[~large] for name, column in points.items()}
    try:
        if not count(rest):
            raise Unidentified("all points have the same size")
        law.check(rest)
    except Unidentified as error:
        raise Unidentified(
            f"without the {large.sum()} largest points, which test extrapolation, the law is not determined: {error}"
        ) from None
    errors = law.residuals(law.estimate(rest), {name: column[large] for name, column in points.items()})
    return {"points": int(large.sum()), **summary(law, errors)}


def resample(law: Law, points: Columns, values: Values, wanted: int, seed: int) -> dict[int, Values]:
    """Returns the parameters of bootstrap draws by their number, without the draws that do not determine them.

    Draw k has the same rows in all sets with as many points, so that fits of the same settings can be compared draw by
    draw.
    """
    draws: dict[int, Values] = {}
    number = count(points)
    with Meter("bootstrap", wanted, "fits") as meter:
        for draw in range(TRIES * wanted):
            if len(draws) == wanted:
                break
            rows = np.random.default_rng([seed, draw]).integers(0, number, number)
            drawn = {name: column[rows] for name, column in points.items()}
            try:
                law.check(drawn)
                found = law.estimate(drawn, values)
            except UserError:
                continue
            if found.keys() == values.keys():  # a draw in which a cause does not vary has no coefficient for it
                draws[draw] = found
                meter.advance()
    if len(draws) < wanted:
        raise Unidentified(
            f"only {len(draws)} of {TRIES * wanted} bootstrap draws determine the law: it depends on too few points; "
            "add runs"
        )
    return draws


def summary(law: Law, residuals: np.ndarray) -> dict[str, Any]:
    """Returns statistics of the residuals (observed minus predicted)."""
    size = np.abs(residuals)
    return {
        "unit": law.unit,
        "mean": float(residuals.mean()),
        "mean_absolute": float(size.mean()),
        "root_mean_square": float(np.sqrt((residuals**2).mean())),
        "largest": float(size.max()),
    }


def count(points: Columns) -> int:
    """Returns the number of points."""
    return len(next(iter(points.values())))
