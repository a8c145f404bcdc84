"""Detects steps that must not change the weights: non-finite numbers and gradient spikes."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from megatron_spo.errors import Anomaly
from megatron_spo.train.run_directory import RunDirectory

WARM_UP = 20
"""Number of first steps whose gradient norms are averaged but not judged."""
DECAY = 0.98
"""Decay per step of the running mean of gradient norms."""
MOST_SKIPS = 10
"""Number of consecutive skipped steps after which training stops; the cause is then the weights, not a few rows."""


class BadStep(Anomaly):
    """A step or an evaluation whose result cannot be used, and the affected pairs; raised on all ranks alike."""

    def __init__(self, data: str, reason: str, pairs: Sequence[str]) -> None:
        self.data, self.reason, self.pairs = data, reason, list(pairs)
        more = f" and {len(pairs) - 8} more" if len(pairs) > 8 else ""
        super().__init__(f"{data}: {reason}; affected pairs: {', '.join(pairs[:8])}{more}")


def alarm(bad: BadStep, step: int, directory: RunDirectory, on_anomaly: str) -> None:
    """Logs what went wrong in a step or in the evaluation after it.

    Raises:
        Anomaly: `on_anomaly` is "stop".
    """
    directory.log("alarm", step, {"data": bad.data, "reason": bad.reason, "pairs": bad.pairs})
    if on_anomaly == "stop":
        good = directory.last_checkpoint
        raise Anomaly(
            f"step {step}, {bad}. This step changed no weight. The last good checkpoint is "
            f"{directory.checkpoints / good if good else 'none yet'}. Check these rows, lower optimizer.lr (in "
            "another output folder), or set training.on_anomaly=skip and start again"
        ) from bad


@dataclass(frozen=True)
class GradientNorms:
    """Running mean of the gradient norm over the taken steps, and the number of steps skipped since the last one."""

    total: float = 0.0
    steps: int = 0
    skips: int = 0

    @property
    def mean(self) -> float:
        """Exponentially weighted mean, corrected for its start at 0."""
        return self.total / (1 - DECAY**self.steps) if self.steps else 0.0

    def limit(self, factor: float | None) -> float:
        """Returns the largest gradient norm with which a step may be taken."""
        return math.inf if factor is None or self.steps < WARM_UP else factor * self.mean

    def taken(self, norm: float) -> "GradientNorms":
        """Returns the state after a taken step with this gradient norm."""
        return GradientNorms(DECAY * self.total + (1 - DECAY) * norm, self.steps + 1)

    def skipped(self) -> "GradientNorms":
        """Returns the state after a skipped step.

        Raises:
            Anomaly: MOST_SKIPS steps in a row have been skipped.
        """
        if self.skips + 1 >= MOST_SKIPS:
            raise Anomaly(
                f"{MOST_SKIPS} steps in a row were skipped (their rows are in metrics.jsonl, kind alarm), so the "
                "weights themselves are bad; start again in another output folder with a lower optimizer.lr or a "
                "longer warm-up"
            )
        return replace(self, skips=self.skips + 1)
