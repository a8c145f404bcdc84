"""Formats fits as text for the terminal, and as sentences for captions."""

import math
from collections.abc import Mapping
from typing import Any

from megatron_spo.scaling.fit import Fit
from megatron_spo.scaling.groups import Grouped


def fit_text(fit: Fit) -> str:
    """Returns the parameters of a fit with their intervals, one per line; of a refused fit what was found."""
    report = fit.report
    head = f"{fit.law.name}: {report['points']} points"
    if "held_out" in report:
        held = report["held_out"]
        head += f", held out {held['points']}: mean absolute error {held['mean_absolute']:.3g} ({held['unit']})"
    lines = [head]
    for name, value in (fit.values or {}).items():
        lines.append(f"{name:>10s} {value:12.5g}   {_range(report.get('intervals', {}).get(name))}".rstrip())
    if fit.refusal is not None:
        lines.append(f"not determined: {fit.refusal}")
    return "\n".join([*lines, *answers(report)])


def caption(fit: Fit) -> str:
    """Returns what a fit shows, in a sentence or two."""
    if fit.refusal is not None:
        return f"The points do not determine the law: {fit.refusal}."
    known = _held_out(fit)
    return f"{_finding(fit)} {known}"


def _held_out(fit: Fit) -> str:
    held = fit.report["held_out"]
    error = held["mean_absolute"]
    if held["unit"].startswith("log"):
        return f"The largest {held['points']} points are predicted from the rest with a mean error of a factor of " \
               f"{math.exp(error):.3g}."  # fmt: skip
    return f"The largest {held['points']} points are predicted from the rest with a mean error of {error:.3g}."


def _finding(fit: Fit) -> str:
    name, values, intervals = fit.law.name, fit.values or {}, fit.report["intervals"]

    def shown(parameter: str) -> str:
        return f"{values[parameter]:.3g} ({_range(intervals[parameter])})"

    outcome = fit.report["columns"].get(fit.law.outcome, fit.law.outcome)
    if name == "overoptimization":
        peak = fit.report["peak"]
        where = "" if peak["within_points"] else ", beyond the points"
        return f"The reward is highest at a KL of {peak['kl']:.3g} nats ({_range(peak['kl_interval'])}){where}."
    if name == "stability":
        parts = [f"{cause.removeprefix('c_')}: {shown(cause)}" for cause in values if cause.startswith("c_")]
        parts = [part.replace("lambda:", "1 + lambda:") for part in parts]
        return f"Steps until the bound is crossed grow with these powers of the causes: {', '.join(parts)}."
    sizes = {"alpha": "N", "beta": "D"} if "beta" in values else {"alpha": "x"}
    exponents = {name: fit.report["columns"].get(size, size) for name, size in sizes.items()}
    said = f"{outcome} falls with " + " and with ".join(f"{size}^-{shown(e)}" for e, size in exponents.items()) + "."
    if "worth_of_epochs" in fit.report:
        worth = ", ".join(f"{count} epochs {share:.0%}" for count, share in fit.report["worth_of_epochs"].items())
        said += f" Epochs over the same data are worth these shares of new data: {worth}."
    if best := fit.report.get("compute_optimal"):
        said += (f" At the lowest loss for a given compute C, N grows as C^{best['N_exponent']:.3g} "
                 f"({_range(best['N_exponent_interval'])}).")  # fmt: skip
    return said


def groups_text(grouped: Grouped) -> str:
    """Returns the parameters of all groups, their differences, and the common exponents."""
    blocks = [f"{grouped.by} = {name}\n{fit_text(fit)}" for name, fit in grouped.fits.items()]
    lines = [sentence for one in grouped.report["differences"] for sentence in differences(one)]
    if lines:
        blocks.append("differences:\n" + "\n".join(f"  {line}" for line in lines))
    if common := grouped.report.get("common_exponents"):
        known = common.get("intervals", {})
        sizes = common["mean_absolute_residual"]
        exponents = [
            f"  {name} {value:.4g}   {_range(known.get(name))}" for name, value in common["parameters"].items()
        ]
        sizes_line = f"  mean absolute residual {sizes['common']:.3g}; with own exponents {sizes['own']:.3g}"
        blocks.append("\n".join(["common exponents, with own amounts for each group:", *exponents, sizes_line]))
    return "\n\n".join(blocks)


def differences(one: Mapping[str, Any]) -> list[str]:
    """Returns a sentence for each parameter in which two groups are compared."""
    found = []
    for name, value in one.items():
        if not isinstance(value, dict):
            continue
        low, high = value["interval"]
        said = "differ" if value["differs"] else "no difference shown"
        names = f"{name} of {one['of']} minus {one['minus']}"
        found.append(f"{names}: {value['difference']:.3g} ({low:.3g} to {high:.3g}), {said}")
    return found


def answers(report: Mapping[str, Any]) -> list[str]:
    """Returns one line for each value of --flops and --stable-steps."""
    lines = [
        f"{one['flops']:.3g} FLOPs: N = {one['N']:.3g} ({_range(one['N_interval'])}) parameters and D = {one['D']:.3g} "
        f"({_range(one['D_interval'])}) tokens give the lowest loss, {one['loss']:.4g} ({_range(one['loss_interval'])})"
        for one in report.get("compute_optimal", {}).get("at", [])
    ]
    for one in report.get("stable_lambda", []):
        known = "no lambda keeps a run" if one["lambda"] is None else f"lambda = {one['lambda']:.3g} keeps a run"
        if one["lambda_interval"]:
            known += f" ({_range(one['lambda_interval'])})"
        lines.append(f"{one['steps']:,.0f} steps: {known} within the bound with probability {one['probability']:g}")
    return lines


def _range(bounds: Any) -> str:
    return "" if bounds is None else f"{bounds[0]:.4g} to {bounds[1]:.4g}"
