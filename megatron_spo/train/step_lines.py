"""Logs the progress of a training: one line per step that is logged, and at least one a minute."""

import logging
import time
from collections.abc import Mapping

from megatron_spo.meter import duration, number

LOG = logging.getLogger(__name__)

AT_LEAST = 60.0
"""Seconds after which a line is logged even if `logging.every` has not passed."""


class StepLines:
    """Logs lines such as

    step 120/469  loss 0.61  chosen +1.2  acc 0.71  2.8 s/step  867 tok/s/GPU  MFU 36%  left 16 min

    Speeds are means over the steps since the line before. The time left follows from the time that all steps of this
    process but the first have taken, with evaluations and saving. It only uses metrics that are computed anyway.
    """

    def __init__(self, *, done: int, steps: int, processes: int, on_gpu: bool, every: int, shown: bool) -> None:
        """Args:
        done: step that this process starts after.
        steps: last step.
        processes: number of processes, by which tokens per second are divided.
        on_gpu: whether a process has a GPU.
        every: steps between lines.
        shown: False logs nothing.
        """
        self._steps, self._every, self.shown = steps, every, shown
        self._processes, self._each = processes, "/GPU" if on_gpu else "/process" if processes > 1 else ""
        self._first, self._began = done + 1, 0.0
        self._seconds = self._tokens = 0.0
        self._count, self._said = 0, float("-inf")

    def after(self, step: int, metrics: Mapping[str, float]) -> None:
        """Counts a step, and logs a line if one is due. `metrics` is empty for a step that was skipped."""
        now = time.monotonic()
        if step == self._first:
            self._began = now
        if not metrics:
            return
        self._seconds += metrics["seconds"]
        self._tokens += metrics["tokens"]
        self._count += 1
        due = step % self._every == 0 or step in (self._first, self._steps) or now - self._said > AT_LEAST
        if due:
            self.say(f"step {step}/{self._steps}", *shown_metrics(metrics), *self._speeds(step, metrics, now))
            self._seconds = self._tokens = 0.0
            self._count, self._said = 0, now

    def say(self, *words: str) -> None:
        """Logs words as one line, if lines are shown."""
        if self.shown:
            LOG.info("  ".join(words))

    def _speeds(self, step: int, metrics: Mapping[str, float], now: float) -> list[str]:
        each = self._seconds / self._count
        wall = (now - self._began) / (step - self._first) if step > self._first else each
        speed = self._tokens / self._seconds / self._processes
        words = [f"{number(each)} s/step", f"{number(speed)} tok/s{self._each}"]
        if "mfu" in metrics:
            words.append(f"MFU {metrics['mfu']:.0%}")
        return [*words, f"left {duration(wall * (self._steps - step))}"] if step < self._steps else words


def shown_metrics(metrics: Mapping[str, float]) -> list[str]:
    """Returns the loss, the change of the chosen log-prob and the accuracy as far as they are measured."""
    forms = {"loss": "loss {:.3g}", "spo/chosen_shift": "chosen {:+.2f}", "rewards/accuracies": "acc {:.2f}"}
    return [form.format(round(metrics[name], 6) + 0.0) for name, form in forms.items() if name in metrics]
