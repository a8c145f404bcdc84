"""Builds the sections of a report; a section without data is omitted."""

import json
from collections.abc import Collection, Sequence
from itertools import groupby
from typing import Any

from megatron_spo.report.figures import (
    ALARM,
    PALETTE,
    SIDES,
    Curve,
    draw_curves,
    draw_shifts,
    draw_stacked,
    run_colours,
)
from megatron_spo.report.page import captioned, folded, grid, heading, legend, note, section, table, texts
from megatron_spo.report.results import PARTS, Group, group_runs, last_values, seconds_by_part, speed_row, summary
from megatron_spo.report.runs import Run, finite_points, is_number

METRICS = {
    "loss": "Loss",
    "rewards/accuracies": "Share of pairs ranked as by the judge",
    "spo/chosen_shift": "Change of log p(chosen), nats",
    "spo/rejected_shift": "Change of log p(rejected), nats",
    "spo/both_down": "Share of pairs where both fell",
    "spo/gap": "Gap g - v, nats per chosen token",
    "spo/lambda": "Lambda",
    "policy/entropy": "Entropy, nats per token",
}
"""Metrics that are plotted and tabulated: name in metrics.jsonl -> title of the plot."""
GENERATION = {
    "generation/exact_match": "Exact match",
    "generation/malformed": "Malformed",
    "generation/rep_4": "Repeated 4-grams",
    "generation/distinct_2": "Distinct 2-grams",
    "generation/length_ratio": "Length / reference",
}
MAX_TEXT = 2000
MAX_SHOWN = 10
"""Most worst pairs, and most sampled prompts, that are shown per run and data set."""


def make_sections(runs: dict[str, Run]) -> list[str]:
    """Returns all sections for which the runs have data."""
    groups = group_runs(runs)
    by_group = run_colours([group.name for group in groups])
    again = {group.name for i, group in enumerate(groups) if (i // len(PALETTE)) % 2}  # the colours are used up
    colours = {name: by_group[group.name] for group in groups for name in group.runs}
    dashed = {name for group in groups if group.name in again for name in group.runs}
    by_group = {f"{name} (dashed)" if name in again else name: colour for name, colour in by_group.items()}
    sections = [
        section("Results", *results(groups)),
        alarms(runs),
        curves(runs, colours, by_group, dashed),
        generation(runs, colours, by_group, dashed),
        shifts(runs),
        worst_pairs(runs),
        samples(runs),
        speed(runs),
        differences(runs),
        section("Provenance", *(folded(name, provenance(run)) for name, run in runs.items())),
    ]
    return [one for one in sections if one]


def results(groups: Sequence[Group]) -> list[str]:
    """Returns a table of every group's last metrics on the training batch and on each held-out set."""
    places = [(group, data) for group in groups for data in (None, *group.eval_sets)]
    shown = [metric for metric in METRICS if any(last_values(group, data, metric) for group, data in places)]
    rows = []
    for group, data in places:
        steps = sorted({run.last(data)["step"] for run in group.runs.values()})
        numbers = [summary(last_values(group, data, metric)) for metric in shown]
        rows.append([group.name, data or "last batch", ", ".join(map(str, steps)), *numbers, group.state])
    parts = [table(["run", "data", "step", *shown, "state"], rows)]
    if any(len(group.runs) > 1 for group in groups):
        parts.append(note("Runs that differ only in their seed share a row: mean ± half of the 95% interval."))
    return parts


def alarms(runs: dict[str, Run]) -> str:
    """Returns a table of every alarm of every run."""
    rows = []
    for name, run in runs.items():
        for line in run.alarms:
            numbers = [f"{line[key]:.4g}" if is_number(line.get(key)) else "" for key in ("value", "bound")]
            message = line.get("message") or f"step {line['step']}: {line.get('reason') or line.get('alarm') or ''}"
            rows.append([name, message, _text(line.get("metric")), *numbers])
    header = ["run", "alarm", "metric", "value", "bound"]  # the message comes first, for narrow screens
    return section("Alarms", table(header, rows, words=True)) if rows else ""


def curves(
    runs: dict[str, Run], colours: dict[str, str], by_group: dict[str, str], dashed: Collection[str] = ()
) -> str:
    """Returns plots of every metric over the steps, with all runs in one plot."""
    figures = [
        draw_curves(drawn, title)
        for metric, title in METRICS.items()
        if (drawn := metric_curves(runs, metric, colours, dashed))
    ]
    reading = "Faint curves are training batches." if any(run.eval_sets for run in runs.values()) else ""
    if any(run.alarms for run in runs.values()):
        by_group = {**by_group, "alarm (triangle)": ALARM}
    return section("Curves", legend(by_group), *([note(reading)] if reading else []), grid(*figures)) if figures else ""


def metric_curves(
    runs: dict[str, Run], metric: str, colours: dict[str, str], dashed: Collection[str] = ()
) -> list[Curve]:
    """Returns a curve for each run and data set; training is faint if there are held-out curves."""
    drawn = []
    for name, run in runs.items():
        held_out = {data: points for data in run.eval_sets if (points := run.points(metric, data)) and len(points) > 1}
        if training := run.points(metric, None):
            marked = alarm_points(run, metric, (None, "train"))
            faint, again = bool(held_out), name in dashed
            drawn.append(Curve(name, colours[name], training, faint=faint, dashed=again, alarms=marked))
        for data, points in held_out.items():
            marked = alarm_points(run, metric, (data,))
            drawn.append(Curve(name, colours[name], points, dashed=name in dashed, alarms=marked))
    return drawn


def alarm_points(run: Run, metric: str, data: Sequence[str | None]) -> list[tuple[int, float]]:
    """Returns the (step, value) of alarms about a metric on the data sets `data`."""
    found = [line for line in run.alarms if line.get("metric") == metric and line.get("data") in data]
    return finite_points(found, "value")


def generation(
    runs: dict[str, Run], colours: dict[str, str], by_group: dict[str, str], dashed: Collection[str] = ()
) -> str:
    """Returns plots of the scores of answers that were sampled during training."""
    figures = []
    for metric, title in GENERATION.items():
        drawn = []
        for name, run in runs.items():
            lines = sorted(run.of_kind("generation"), key=lambda line: str(line.get("data")))
            for _, of_set in groupby(lines, key=lambda line: line.get("data")):
                if points := finite_points(list(of_set), metric):
                    drawn.append(Curve(name, colours[name], points, dashed=name in dashed))
        figures += [draw_curves(drawn, title)] if drawn else []
    return section("Generated answers", legend(by_group), grid(*figures)) if figures else ""


def shifts(runs: dict[str, Run]) -> str:
    """Returns plots of the distribution of the held-out pairs' log-prob changes."""
    figures = []
    for name, run in runs.items():
        for data, found in run.held_out.items():
            sides = {
                side: [pair[f"{side}_shift"] for pair in found["pairs"] if is_number(pair[f"{side}_shift"])]
                for side in SIDES
            }
            if any(sides.values()):
                figures.append(captioned(f"{name}, {data}, step {found['step']}", draw_shifts(sides)))
    reading = "Change of each held-out pair's log-probs from the reference; the dashed line marks no change."
    return section("Held-out pairs", legend(SIDES), note(reading), grid(*figures)) if figures else ""


def worst_pairs(runs: dict[str, Run]) -> str:
    """Returns the texts of the pairs whose chosen answer lost most log-prob."""
    parts = []
    for name, run in runs.items():
        for data, found in run.held_out.items():
            if found["worst"]:
                parts.append(heading(f"{name}, {data}"))
                parts += [_worst(row) for row in found["worst"][:MAX_SHOWN]]
    return section("Pairs whose chosen answer fell most", *parts) if parts else ""


def _worst(row: dict[str, Any]) -> str:
    moved = ", ".join(f"{side} {row[f'{side}_shift']:+.1f}" for side in SIDES if is_number(row[f"{side}_shift"]))
    title = f"row {row.get('row')}: {moved} nats: {_text(row.get('prompt'))[:80]}"
    return folded(title, texts({key: _text(row.get(key)) for key in ("prompt", *SIDES)}))


def samples(runs: dict[str, Run]) -> str:
    """Returns the first and the last answers to the sampled prompts."""
    parts = []
    for name, run in runs.items():
        by_prompt: dict[tuple[str, str], list[dict[str, Any]]] = {}
        for sample in run.samples:
            by_prompt.setdefault((_text(sample["data"]), _text(sample["prompt"])), []).append(sample)
        if by_prompt:
            parts.append(heading(name))
        for (data, prompt), found in list(by_prompt.items())[:MAX_SHOWN]:
            named = {"prompt": prompt}
            for sample in [found[0], found[-1]] if len(found) > 1 else found:
                named[f"step {sample['step']}: {_verdict(sample)}"] = _text(sample["answer"])
            if reference := found[0].get("reference"):
                named["reference"] = _text(reference)
            parts.append(folded(f"{data}: {prompt[:80]} ({_verdict(found[-1])})", texts(named)))
    return section("Samples", *parts) if parts else ""


def _verdict(sample: dict[str, Any]) -> str:
    match = sample.get("exact_match")
    words = [] if match is None else ["right" if match else "wrong"]
    return ", ".join([*words, *(["malformed"] if sample.get("malformed") else [])]) or "not scored"


def speed(runs: dict[str, Run]) -> str:
    """Returns the throughput of each run, and the parts of its step time."""
    rows = [[name, *cells] for name, run in runs.items() if (cells := speed_row(run))]
    if not rows:
        return ""
    header = ["run", "seconds per step", "tokens/s", "pairs/s"]
    measured = {name: seconds for name, run in runs.items() if (seconds := seconds_by_part(run))}
    if not measured:
        return section("Speed", table(header, [row[: len(header)] for row in rows]))
    colours = dict(zip(PARTS, PALETTE, strict=False))
    names = {part: part.replace("_", " + ") for part in PARTS}
    picture = draw_stacked(measured, colours, "Seconds per step")
    return section(
        "Speed",
        table([*header, *names.values()], rows),
        legend({names[part]: colour for part, colour in colours.items()}),
        picture,
    )


def differences(runs: dict[str, Run]) -> str:
    """Returns a table of the configuration keys whose values differ between runs."""
    keys = sorted({key for run in runs.values() for key in run.config})
    rows = [[key, *(run.config.get(key, "") for run in runs.values())] for key in keys]
    rows = [row for row in rows if len(set(row[1:])) > 1]
    return section("What differs between the runs", table(["key", *runs], rows, words=True)) if rows else ""


def provenance(run: Run) -> str:
    """Returns the status, provenance and configuration of a run."""
    known = {"status": run.status, "provenance": run.provenance, "configuration": run.config}
    shown = {title: [f"{key}: {value}" for key, value in values.items()] for title, values in known.items() if values}
    return texts({title: "\n".join(lines) for title, lines in shown.items()})


def _text(value: Any) -> str:
    """Returns a text or a list of messages as text, shortened if it is very long."""
    if isinstance(value, list) and all(isinstance(message, dict) for message in value):
        value = "\n".join(f"{message.get('role')}: {message.get('content')}" for message in value)
    text = value if isinstance(value, str) else "" if value is None else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= MAX_TEXT else f"{text[:MAX_TEXT]} ... ({len(text) - MAX_TEXT} characters more)"
