"""The first lines of a report: whether the runs are healthy, and what they trained."""

import json
from collections.abc import Mapping
from typing import Any

from megatron_spo.report.page import facts, verdict
from megatron_spo.report.runs import NOT_NAMING, Run, is_number, label

MOST_NAMED = 5
"""Most runs that are named as not healthy."""


def overview(runs: Mapping[str, Run]) -> list[str]:
    """Returns the verdict on the runs, and what they have in common."""
    found = {name: health(run) for name, run in runs.items()}
    bad = {name: text for name, (good, text) in found.items() if not good}
    if len(runs) == 1:
        (text,) = (text for _, text in found.values())
        return [verdict(text, good=not bad), facts(described(next(iter(runs.values())).config))]
    text = f"{len(runs) - len(bad)} of {len(runs)} runs are healthy."
    if bad:
        more = f"; and {len(bad) - MOST_NAMED} more" if len(bad) > MOST_NAMED else ""
        text += f" With alarms or failed: {'; '.join(list(bad)[:MOST_NAMED])}{more}."
    return [verdict(text, good=not bad), facts(common(runs))]


def health(run: Run) -> tuple[bool, str]:
    """Returns whether a run is healthy, and a sentence that says why.

    A run is healthy if it raised no alarm and did not fail. Alarms are raised by `monitor.*`: the chosen answers fell,
    both answers fell, answers were lost, the entropy changed, or a number was not finite.
    """
    step, steps = run.last(None)["step"], run.status.get("steps")
    done = f"step {step} of {steps}" if steps else f"step {step}"
    if run.state == "failed":
        reason = json.loads(run.status.get("reason", "null")) or "see the log"
        return False, f"Failed after {done}: {reason}"
    if run.alarms:
        first = run.alarms[0]
        what = first.get("message") or f"step {first['step']}: {first.get('reason') or first.get('alarm')}"
        count = f"{len(run.alarms)} alarms, the first at " if len(run.alarms) > 1 else "alarm at "
        return False, f"Not healthy: {count}{what}"
    if not run.lines:
        return False, "No step yet."
    states = {
        "done": f"Healthy: all {step} steps are done, no alarm.",
        "stopped": f"Healthy so far: stopped after {done}, no alarm; the same command resumes it.",
    }
    return True, f"{states.get(run.state, f'Healthy so far: {done}, no alarm.')}{_measured(run)}"


def _measured(run: Run) -> str:
    """Returns the change of the chosen answers and the accuracy on the first held-out set, else on the last batch."""
    data = run.eval_sets[0] if run.eval_sets else None
    last, words = run.last(data), []
    if is_number(shift := last.get("spo/chosen_shift")):
        words.append(f"log p(chosen) {shift:+.2f} nats")
    if is_number(accuracy := last.get("rewards/accuracies")):
        words.append(f"accuracy {accuracy:.2f}")
    return f" On {data or 'the last batch'}: {', '.join(words)}." if words else ""


def common(runs: Mapping[str, Run]) -> list[str]:
    """Returns what all runs have in common, and the keys in which they differ."""
    configs = [run.config for run in runs.values()]
    keys = {key for config in configs for key in config}
    differing = {key for key in keys if len({config.get(key) for config in configs}) > 1}
    shared = {key: value for key, value in configs[0].items() if key not in differing}
    shown = sorted(key for key in differing if key not in NOT_NAMING)
    words = described(shared)
    return [*words, f"differs: {', '.join(shown)}"] if shown else words


def described(config: Mapping[str, str]) -> list[str]:
    """Returns model, loss, lambda, data, learning rate and batch size of a flat configuration, as far as known."""
    known: dict[str, Any] = {key: json.loads(value) for key, value in config.items()}
    words = []
    if path := known.get("model.path"):
        words.append(f"model {label(path)}")
    if name := known.get("loss.name"):
        beta = known.get("loss.beta")
        words.append(f"loss {label(name)}" + (f" (beta {beta:g})" if is_number(beta) else ""))
    if schedule := known.get("spo.schedule"):
        weight, unit = known.get("spo.lambda"), known.get("spo.lambda_unit")
        number = f", lambda {weight:g}" + (f" ({unit})" if unit else "") if is_number(weight) else ""
        words.append(f"SPO {schedule}{number}")
    if train := known.get("data.train"):
        words.append(f"data {label(train)}")
    forms = {
        "optimizer.lr": "lr {}",
        "training.global_batch_size": "{} pairs per step",
        "lora.rank": "LoRA rank {}",
    }
    return words + [
        form.format(label(known[key])) for key, form in forms.items() if is_number(known.get(key)) and known[key]
    ]
