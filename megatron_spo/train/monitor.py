"""Alarms during training, as pure functions of the metric lines and the monitor's state.

Every measured line is checked, whether it is logged or not, so `logging.every` changes nothing. Values of held-out sets
are checked directly. Values of training batches are checked as a running mean, because the batches are small and differ
from step to step. An alarm is raised once when its value passes the bound; it is armed again when the value is back
within half of the bound.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from megatron_spo.config.schema import MonitorConfig

TRAIN = "train"
PAGE = "see docs/monitoring.md"
DECAY = 0.8
"""Decay per step of the running mean over training batches."""
REARMED = 0.5
"""Share of the bound below which a value must fall before the same alarm can be raised again."""
HARMLESS = 0.125
"""Share of the displacement bound by which the chosen answers must have fallen below their best value before
`both_down` counts. The first steps move every answer by almost nothing, and half of them downwards."""
ENTROPY_FACTOR = 3.0
"""Alarm: the token entropy of a set is so many times its first one, or less than that one divided by it."""
ANSWERS_FALL = 0.05
"""Alarm: share of a held-out set's prompts that were answered correctly before training and are not any more."""
LEAST_ENTROPY = 1e-9
"""Lower limit of an entropy (nats), since 0 has no logarithm."""
AVERAGED = ("spo/chosen_shift", "spo/both_down", "spo/gap", "policy/entropy", "chosen_tokens", "pairs")


@dataclass(frozen=True)
class Judgement:
    """A value and its bound, in the unit of `metric`; `excess` is the fraction of the way to the bound (1: at it)."""

    alarm: str
    metric: str
    value: float
    bound: float
    excess: float
    text: str


@dataclass(frozen=True)
class MonitorState:
    """State of the monitor. It is part of the training state, since an alarm may raise lambda.

    Attributes:
        raised: messages of the alarms that are raised and not armed again yet, by "set: alarm".
        entropy: policy/entropy in the first line of each set, nats.
        best: the highest spo/chosen_shift of each set so far, nats; the reference's is 0.
        exact_match: the first measured share of correct answers to each set's prompts.
        averages: sums of the training batches' metrics, weighted by DECAY per step.
        weight: total weight of these sums.
    """

    raised: Mapping[str, str] = field(default_factory=dict)
    entropy: Mapping[str, float] = field(default_factory=dict)
    best: Mapping[str, float] = field(default_factory=dict)
    exact_match: Mapping[str, float] = field(default_factory=dict)
    averages: Mapping[str, float] = field(default_factory=dict)
    weight: float = 0.0

    @classmethod
    def from_dict(cls, state: Mapping[str, Any] | None) -> "MonitorState":
        """Inverse of `asdict`; None is the state in a checkpoint from before the monitor existed."""
        return cls() if state is None else cls(**state)


def check(
    config: MonitorConfig, state: MonitorState, step: int, data: str, metrics: Mapping[str, float]
) -> tuple[MonitorState, list[dict[str, Any]]]:
    """Checks one line of metrics.

    Args:
        config: the bounds.
        state: the state after the earlier lines.
        step: step of the line.
        data: "train", or the name of the held-out set.
        metrics: metrics of the line.

    Returns:
        The new state, and the content of one log line for each alarm that this line raises.
    """
    first = {data: metrics["policy/entropy"], **state.entropy}
    averages, weight = state.averages, state.weight
    if data == TRAIN:
        averages = {name: DECAY * averages.get(name, 0.0) + metrics[name] for name in AVERAGED if name in metrics}
        weight = DECAY * weight + 1
        metrics = {**metrics, **{name: total / weight for name, total in averages.items()}}
    best = {**state.best, data: max(state.best.get(data, 0.0), metrics.get("spo/chosen_shift", 0.0))}
    raised, lines = _raise(state.raised, _judged(config, metrics, first[data], best[data]), step, data)
    return replace(state, raised=raised, entropy=first, best=best, averages=averages, weight=weight), lines


def check_answers(
    state: MonitorState, step: int, data: str, exact_match: float
) -> tuple[MonitorState, list[dict[str, Any]]]:
    """Checks the share of correct answers to a held-out set's prompts against the first such share.

    Returns:
        As `check`.
    """
    first = {data: exact_match, **state.exact_match}
    before = first[data]
    text = f"right answers went from {before:.0%} to {exact_match:.0%} of the prompts"
    fall = Judgement("answers", "generation/exact_match", exact_match, before - ANSWERS_FALL,
                     (before - exact_match) / ANSWERS_FALL, text)  # fmt: skip
    raised, lines = _raise(state.raised, [fall], step, data)
    return replace(state, raised=raised, exact_match=first), lines


def _raise(
    before: Mapping[str, str], judged: Iterable[Judgement], step: int, data: str
) -> tuple[dict[str, str], list[dict[str, Any]]]:
    """Returns the alarms that are not armed after these judgements, and the log lines of the newly raised ones."""
    raised, lines = dict(before), []
    for one in judged:
        name = f"{data}: {one.alarm}"
        if one.excess > 1 and name not in raised:
            raised[name] = f"step {step}, {data}: {one.text}; {PAGE}"
            lines.append({"data": data, "alarm": one.alarm, "metric": one.metric, "value": one.value,
                          "bound": one.bound, "message": raised[name]})  # fmt: skip
        elif one.excess < REARMED:
            raised.pop(name, None)
    return raised, lines


def _judged(
    config: MonitorConfig, metrics: Mapping[str, float], first_entropy: float, best: float
) -> Iterator[Judgement]:
    fall = -metrics.get("spo/chosen_shift", 0.0)
    limit = config.chosen_fall * metrics["chosen_tokens"] / metrics["pairs"]
    if "spo/chosen_shift" in metrics:
        both = f", both fell in {metrics['spo/both_down']:.0%} of pairs" if "spo/both_down" in metrics else ""
        text = f"the preferred answers lost {fall:.2g} nats{both}: the model is leaving the safe region"
        yield Judgement("displacement", "spo/chosen_shift", -fall, -limit, fall / limit, text)
    if "spo/both_down" in metrics:
        share, lost = metrics["spo/both_down"], best + fall
        way = lost / (HARMLESS * limit)
        excess = way if share > config.both_down else min(way, 1.0)  # armed again once the chosen answers recover
        text = f"both answers fell in {share:.0%} of pairs, the preferred ones lost {lost:.2g} nats since their best"
        yield Judgement("both_down", "spo/both_down", share, config.both_down, excess, text)
    if "spo/gap" in metrics and ("spo/chosen_shift" not in metrics or "sft_rows" in metrics):
        gap = metrics["spo/gap"]  # with shifts it would repeat the displacement alarm
        text = f"the SFT loss lies {gap:.2g} nats per token above v: the model is leaving the safe region"
        yield Judgement("gap", "spo/gap", gap, config.chosen_fall, gap / config.chosen_fall, text)
    if "rewards/margins" in metrics:  # SFT alone is meant to lower the entropy
        entropy, factor = metrics["policy/entropy"], ENTROPY_FACTOR
        ratio = max(entropy, LEAST_ENTROPY) / max(first_entropy, LEAST_ENTROPY)
        excess = abs(math.log(ratio)) / math.log(factor)
        bound = first_entropy * factor if entropy > first_entropy else first_entropy / factor
        text = f"the token entropy went from {first_entropy:.2g} to {entropy:.2g} nats"
        yield Judgement("entropy", "policy/entropy", entropy, bound, excess, text)
