"""Alarms while a run trains: pure functions of the metric lines and of what earlier lines have left.

A line is judged when it is measured, written or not, so `logging.every` changes nothing. Held-out sets are judged as
measured; training batches, small and of other pairs each time, by a running mean. An alarm is raised once, when the
value passes its bound, and is armed again when the value is back within half of it.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from megatron_spo.config.schema import MonitorConfig

TRAIN = "train"
PAGE = "see docs/monitoring.md"
DECAY = 0.8
"""Of the running mean over training batches, per step."""
REARMED = 0.5
"""Share of the bound within which a value must be before the same alarm is raised again."""
HARMLESS = 0.125
"""Share of the displacement bound that the chosen answers must have lost, from where they stood best, before
`both_down` counts: the first steps move every answer by next to nothing, and half of them downwards."""
ENTROPY_FACTOR = 3.0
"""Alarm: the token entropy of a set is so many times its first one, or less than that one divided by it."""
ANSWERS_FALL = 0.05
"""Alarm: share of a held-out set's prompts that were answered correctly before training and are not any more."""
LEAST_ENTROPY = 1e-9
"""Nats: what counts for less, as 0 has no logarithm."""
AVERAGED = ("spo/chosen_shift", "spo/both_down", "spo/gap", "policy/entropy", "chosen_tokens", "pairs")


@dataclass(frozen=True)
class Judgement:
    """A value beside its bound, in the unit of `metric`; `excess` is how much of the way to the bound it has gone."""

    alarm: str
    metric: str
    value: float
    bound: float
    excess: float
    text: str


@dataclass(frozen=True)
class MonitorState:
    """What the monitor remembers; training state, since an alarm may raise lambda.

    Attributes:
        raised: messages of the alarms that are not armed, by "set: alarm".
        entropy: policy/entropy of the first line of each set, nats.
        best: the highest spo/chosen_shift of each set so far, nats; 0 is that of the reference.
        exact_match: share of right answers to each set's prompts, the first time.
        averages: sums of the training batches' metrics, weighted by DECAY per step.
        weight: of these sums.
    """

    raised: Mapping[str, str] = field(default_factory=dict)
    entropy: Mapping[str, float] = field(default_factory=dict)
    best: Mapping[str, float] = field(default_factory=dict)
    exact_match: Mapping[str, float] = field(default_factory=dict)
    averages: Mapping[str, float] = field(default_factory=dict)
    weight: float = 0.0

    @classmethod
    def from_dict(cls, state: Mapping[str, Any] | None) -> "MonitorState":
        """The inverse of `asdict`; None stands for a checkpoint from before there was a monitor."""
        return cls() if state is None else cls(**state)


def check(
    config: MonitorConfig, state: MonitorState, step: int, data: str, metrics: Mapping[str, float]
) -> tuple[MonitorState, list[dict[str, Any]]]:
    """Judge one line of metrics.

    Args:
        config: the bounds.
        state: what earlier lines have left.
        step: of the line.
        data: "train", or the name of the held-out set.
        metrics: of the line.

    Returns:
        The new state, and the alarms that this line raises, as the content of their own lines.
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
    """Judge the share of right answers to a held-out set's prompts beside the first such share; returns as `check`."""
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
    """The alarms that are not armed after these judgements, and the lines of those that they raise."""
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
        excess = way if share > config.both_down else min(way, 1.0)  # armed again once the chosen answers are back
        text = f"both answers fell in {share:.0%} of pairs, the preferred ones lost {lost:.2g} nats since their best"
        yield Judgement("both_down", "spo/both_down", share, config.both_down, excess, text)
    if "spo/gap" in metrics and ("spo/chosen_shift" not in metrics or "sft_rows" in metrics):
        gap = metrics["spo/gap"]  # else it is the displacement once more
        text = f"the SFT loss lies {gap:.2g} nats per token above v: the model is leaving the safe region"
        yield Judgement("gap", "spo/gap", gap, config.chosen_fall, gap / config.chosen_fall, text)
    if "rewards/margins" in metrics:  # SFT alone lowers the entropy, which is its purpose
        entropy, factor = metrics["policy/entropy"], ENTROPY_FACTOR
        ratio = max(entropy, LEAST_ENTROPY) / max(first_entropy, LEAST_ENTROPY)
        excess = abs(math.log(ratio)) / math.log(factor)
        bound = first_entropy * factor if entropy > first_entropy else first_entropy / factor
        text = f"the token entropy went from {first_entropy:.2g} to {entropy:.2g} nats"
        yield Judgement("entropy", "policy/entropy", entropy, bound, excess, text)
