"""Fits a law to points: parameters, intervals, the error of extrapolating, what follows; or refuses with the reason."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from tqdm import tqdm

from megatron_spo.errors import UserError
from megatron_spo.scaling.additive import CHINCHILLA, POWER
from megatron_spo.scaling.law import LEVEL, Ask, Law, Unidentified, Values, interval
from megatron_spo.scaling.overoptimization import OVEROPTIMIZATION
from megatron_spo.scaling.points import Columns, Points
from megatron_spo.scaling.stability import STABILITY

LAWS: dict[str, Law] = {law.name: law for law in (CHINCHILLA, POWER, OVEROPTIMIZATION, STABILITY)}
BOOTSTRAP = 1000
"""Refits of points drawn with replacement, by default."""
HELD_OUT = 0.2
"""Share of the points, the largest, that a second fit does not see; all of one size together."""
TRIES = 20
"""Draws, per refit wanted, among which those must be that determine the law at all."""


@dataclass(frozen=True)
class Fit:
    """`report` is what FIT.json holds; the rest is for pictures."""

    law: Law
    points: Columns
    values: Values
    report: dict[str, Any]


def fit(law: Law, points: Points, ask: Ask, *, bootstrap: int = BOOTSTRAP, seed: int = 0) -> Fit:
    """Fit a law.

    Raises:
        UserError: the points are wrong, or do not determine the law (Unidentified): the message says why.
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
    """The errors, on the largest points, of a fit to the others."""
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
            f"without the {large.sum()} largest points, which test the extrapolation, nothing is determined: {error}"
        ) from None
    errors = law.residuals(law.estimate(rest), {name: column[large] for name, column in points.items()})
    return {"points": int(large.sum()), **summary(law, errors)}


def resample(law: Law, points: Columns, values: Values, count: int, seed: int) -> list[Values]:
    """Parameters of `count` draws of the points with replacement; a draw that cannot determine them is drawn again."""
    draws: list[Values] = []
    number = len(_any(points))
    generator = np.random.default_rng(seed)
    with tqdm(total=count, desc="bootstrap", unit="fit", disable=None) as progress:
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
            if found.keys() == values.keys():  # a cause that does not vary in a draw has no coefficient there
                draws.append(found)
                progress.update()
    if len(draws) < count:
        raise Unidentified(
            f"of {TRIES * count} draws from the points only {len(draws)} determine the law: too few points bear it"
        )
    return draws


def summary(law: Law, residuals: np.ndarray) -> dict[str, Any]:
    """Of seen minus predicted."""
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
