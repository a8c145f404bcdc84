"""Fits a law to points: parameters, bootstrap intervals, extrapolation error and conclusions; or says why it cannot."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_spo.errors import UserError
from megatron_spo.meter import Meter
from megatron_spo.scaling.additive import CHINCHILLA, POWER
from megatron_spo.scaling.law import LEVEL, Ask, Law, Unidentified, Values, interval
from megatron_spo.scaling.overoptimization import OVEROPTIMIZATION
from megatron_spo.scaling.points import Columns, Points
from megatron_spo.scaling.stability import STABILITY

LAWS: dict[str, Law] = {law.name: law for law in (CHINCHILLA, POWER, OVEROPTIMIZATION, STABILITY)}
BOOTSTRAP = 1000
"""Default number of bootstrap refits."""
HELD_OUT = 0.2
"""Share of the largest points that are held out to test extrapolation; points of equal size stay together."""
TRIES = 20
"""Most draws per bootstrap refit, since some draws do not determine the law."""


@dataclass(frozen=True)
class Fit:
    """A fitted law; `report` is the content of FIT.json, the rest is for plots."""

    law: Law
    points: Columns
    values: Values
    report: dict[str, Any]


def fit(law: Law, points: Points, ask: Ask, *, bootstrap: int = BOOTSTRAP, seed: int = 0) -> Fit:
    """Fits a law.

    Args:
        law: Law to fit.
        points: Points to fit it to.
        ask: Further quantities to compute.
        bootstrap: Number of bootstrap refits.
        seed: Seed of the bootstrap.

    Raises:
        UserError: If the points are invalid, or do not determine the law (Unidentified); the message says why.
    """
    columns = points.columns
    law.check(columns)
    values = law.estimate(columns)
    held_out = extrapolate(law, columns)
    draws = resample(law, columns, values, bootstrap, seed)
    intervals = {name: interval([draw[name] for draw in draws]) for name in values}
    law.judge(values, intervals, columns)
    report = {
        "law": law.name,
        "parameters": values,
        "intervals": intervals,
        "interval_of": {"level": LEVEL, "bootstrap": bootstrap, "seed": seed},
        "points": len(_any(columns)),
        "left_out": points.left_out,
        "residuals": summary(law, law.residuals(values, columns)),
        "held_out": held_out,
        **law.conclude(values, draws, columns, ask),
    }
    return Fit(law, columns, values, report)


def extrapolate(law: Law, points: Columns) -> dict[str, Any]:
    """Returns the errors on the largest points of a fit to the others."""
    size = law.size(points)
    bound = np.sort(size)[-max(1, round(HELD_OUT * len(size)))]
    large = size >= bound
    rest = {name: column[~large] for name, column in points.items()}
    try:
        if not len(_any(rest)):
            raise Unidentified("all points have the same size")
        law.check(rest)
    except Unidentified as error:
        raise Unidentified(
            f"without the {large.sum()} largest points, which test extrapolation, the law is not determined: {error}"
        ) from None
    errors = law.residuals(law.estimate(rest), {name: column[large] for name, column in points.items()})
    return {"points": int(large.sum()), **summary(law, errors)}


def resample(law: Law, points: Columns, values: Values, count: int, seed: int) -> list[Values]:
    """Returns the parameters of `count` bootstrap draws; a draw that does not determine them is repeated."""
    draws: list[Values] = []
    number = len(_any(points))
    generator = np.random.default_rng(seed)
    with Meter("bootstrap", count, "fits") as meter:
        for _ in range(TRIES * count):
            if len(draws) == count:
                break
            rows = generator.integers(0, number, number)
            drawn = {name: column[rows] for name, column in points.items()}
            try:
                law.check(drawn)
                found = law.estimate(drawn, values)
            except UserError:
                continue
            if found.keys() == values.keys():  # a draw in which a cause does not vary has no coefficient for it
                draws.append(found)
                meter.advance()
    if len(draws) < count:
        raise Unidentified(
            f"only {len(draws)} of {TRIES * count} bootstrap draws determine the law: it depends on too few points; "
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


def _any(points: Columns) -> np.ndarray:
    return next(iter(points.values()))
