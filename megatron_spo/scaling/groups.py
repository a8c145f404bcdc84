"""Fits of one law to several groups of runs, such as methods, and how their parameters differ.

The bootstrap is joint: if all groups have the same settings, a draw has the same settings in each of them, so that what
the groups share (data, seeds, models) does not widen the interval of a difference.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import minimize

from megatron_spo.errors import UserError
from megatron_spo.scaling.additive import Additive, Frame, huber, initial
from megatron_spo.scaling.fit import BOOTSTRAP, Fit, attempt, count
from megatron_spo.scaling.law import Ask, Law, Unidentified, Values, interval
from megatron_spo.scaling.points import Columns, Points

MOST_GROUPS = 12


@dataclass(frozen=True)
class Grouped:
    """The fits of all groups by name; `report` is the content of FIT.json."""

    law: Law
    by: str
    fits: Mapping[str, Fit]
    report: dict[str, Any]


def fit_groups(
    law: Law, by: str, groups: Mapping[str, Points], ask: Ask, *, bootstrap: int = BOOTSTRAP, seed: int = 0
) -> Grouped:
    """Fits each group, compares their parameters, and fits common exponents; a group's fit may be refused.

    Raises:
        UserError: If there are too few or too many groups, or points are invalid.
    """
    if not 2 <= len(groups) <= MOST_GROUPS:
        raise UserError(f"--by {by}: the column has {len(groups)} values; it must have 2 to {MOST_GROUPS}")
    ordered = {name: _sorted(law, points) for name, points in groups.items()}
    paired = _same_settings(law, [points.columns for points in ordered.values()])
    fits = {
        name: attempt(law, points, ask, bootstrap=bootstrap, seed=seed if paired else seed + 1000 * (i + 1))
        for i, (name, points) in enumerate(ordered.items())
    }
    found = {name: one for name, one in fits.items() if one.values is not None and one.draws}
    report: dict[str, Any] = {
        "law": law.name,
        "by": by,
        "paired": paired,
        "groups": {name: one.report for name, one in fits.items()},
        "differences": [_difference(a, b, found) for a, b in itertools.combinations(found, 2)],
    }
    if isinstance(law, Additive) and len(found) > 1:
        report["common_exponents"] = _common(law, found)
    return Grouped(law, by, fits, report)


def _sorted(law: Law, points: Points) -> Points:
    """Returns the points in the order of their settings."""
    settings = [column for name, column in points.columns.items() if name != law.outcome]
    order = np.lexsort(settings[::-1])
    return Points({name: column[order] for name, column in points.columns.items()}, points.left_out, points.names)


def _same_settings(law: Law, groups: Sequence[Columns]) -> bool:
    settings = [{name: column for name, column in one.items() if name not in (law.outcome, "crossed", "kl")}
                for one in groups]  # fmt: skip
    first = settings[0]
    return all(one.keys() == first.keys() and count(groups[0]) == count(groups[i]) and
               all(np.allclose(one[name], first[name], rtol=0.02) for name in first)
               for i, one in enumerate(settings))  # fmt: skip


def _difference(first: str, second: str, fits: Mapping[str, Fit]) -> dict[str, Any]:
    """Returns second minus first of every parameter, with intervals over the draws that both have."""
    a, b = fits[first], fits[second]
    both = sorted(a.draws.keys() & b.draws.keys())
    found: dict[str, Any] = {"of": second, "minus": first, "draws": len(both)}
    for name in a.values or {}:
        if name not in (b.values or {}) or not both:
            continue
        low, high = interval([b.draws[draw][name] - a.draws[draw][name] for draw in both])
        assert a.values and b.values
        found[name] = {
            "difference": b.values[name] - a.values[name],
            "interval": (low, high),
            "differs": not low <= 0 <= high,
        }
    return found


def _common(law: Additive, fits: Mapping[str, Fit]) -> dict[str, Any]:
    """Returns a fit in which the groups share the exponents, each with its own amounts."""
    columns = {name: one.points for name, one in fits.items()}
    exponents, amounts = estimate_common(law, columns, [one.values for one in fits.values() if one.values])
    shared = sorted(set.intersection(*(set(one.draws) for one in fits.values())))
    draws = []
    for draw in shared:
        drawn = {name: _drawn(one, draw) for name, one in fits.items()}
        try:
            draws.append(estimate_common(law, drawn, [{**amounts[next(iter(amounts))], **exponents}])[0])
        except Unidentified:
            continue
    residuals = {name: law.residuals({**amounts[name], **exponents}, points) for name, points in columns.items()}
    own = {name: law.residuals(one.values or {}, one.points) for name, one in fits.items()}
    found: dict[str, Any] = {"parameters": exponents, "by_group": amounts, "draws": len(draws)}
    if draws:
        found["intervals"] = {name: interval([draw[name] for draw in draws]) for name in exponents}
    found["mean_absolute_residual"] = {"common": _size(residuals), "own": _size(own)}
    return found


def _size(residuals: Mapping[str, np.ndarray]) -> float:
    return float(np.abs(np.concatenate(list(residuals.values()))).mean())


def _drawn(one: Fit, draw: int) -> Columns:
    """Returns the points of a draw of the bootstrap, as `resample` draws them."""
    number = count(one.points)
    rows = np.random.default_rng([one.report["interval_of"]["seed"], draw]).integers(0, number, number)
    return {name: column[rows] for name, column in one.points.items()}


def estimate_common(
    law: Additive, groups: Mapping[str, Columns], starts: Sequence[Values]
) -> tuple[Values, dict[str, Values]]:
    """Returns common exponents, and the amounts of each group, of the lowest sum of the Huber losses."""
    frames: list[Frame] = [law.frame(points) for points in groups.values()]
    sizes, amounts = len(law.sizes), len(law.amounts)

    def parts(vector: np.ndarray) -> list[np.ndarray]:
        own = vector[:-sizes].reshape(len(frames), amounts)
        return [np.concatenate([one, vector[-sizes:]]) for one in own]

    def cost(vector: np.ndarray) -> tuple[float, np.ndarray]:
        found = [huber(part, frame.x, frame.y) for part, frame in zip(parts(vector), frames, strict=True)]
        slopes = [gradient[:-sizes] for _, gradient in found]
        return sum(value for value, _ in found), np.concatenate([*slopes, sum(g[-sizes:] for _, g in found)])

    fits = []
    for start in starts:
        exponents = [start[name] for name in law.exponents]
        own = [initial(frame, exponents, amounts)[:-sizes] for frame in frames]
        fits.append(minimize(cost, np.concatenate([*own, exponents]), method="BFGS", jac=True, options={"gtol": 1e-7}))
    best = parts(min(fits, key=lambda one: one.fun).x)
    named = {name: law.named(frame.leave(part)) for name, frame, part in zip(groups, frames, best, strict=True)}
    first = next(iter(named.values()))
    return (
        {name: first[name] for name in law.exponents},
        {name: {key: values[key] for key in law.amounts} for name, values in named.items()},
    )
