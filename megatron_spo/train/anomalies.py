"""Steps that must not change the weights: numbers that are not finite, and sudden large gradients."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from megatron_spo.errors import Anomaly
from megatron_spo.train.run_directory import RunDirectory

WARM_UP = 20
"""Steps whose gradient norms are only averaged."""
DECAY = 0.98
"""Of the running mean, per step."""
MOST_SKIPS = 10
"""Consecutive skipped steps after which training stops: the weights are wrong then, not a few rows."""


class BadStep(Anomaly):
    """A step, or an evaluation, that gave what cannot be used, with the pairs concerned; the same on all ranks."""

    def __init__(self, data: str, reason: str, pairs: Sequence[str]) -> None:
        self.data, self.reason, self.pairs = data, reason, list(pairs)
        more = f" and {len(pairs) - 8} more" if len(pairs) > 8 else ""
        super().__init__(f"{data}: {reason}; affected pairs: {', '.join(pairs[:8])}{more}")


def alarm(bad: BadStep, step: int, directory: RunDirectory, on_anomaly: str) -> None:
    """Write down what went wrong in a step or in the evaluation after it.

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
    """Running mean of the gradient's norm over the steps that were taken, and the steps skipped since the last one."""

    total: float = 0.0
    steps: int = 0
    skips: int = 0

    @property
    def mean(self) -> float:
        """Exponentially weighted, free of the start's bias."""
        return self.total / (1 - DECAY**self.steps) if self.steps else 0.0

    def limit(self, factor: float | None) -> float:
        """The largest norm of a step that may be taken."""
        return math.inf if factor is None or self.steps < WARM_UP else factor * self.mean

    def taken(self, norm: float) -> "GradientNorms":
        """After a step of this norm."""
        return GradientNorms(DECAY * self.total + (1 - DECAY) * norm, self.steps + 1)

    def skipped(self) -> "GradientNorms":
        """After a step that was not taken.

        Raises:
            Anomaly: it is one too many.
        """
        if self.skips + 1 >= MOST_SKIPS:
            raise Anomaly(
                f"{MOST_SKIPS} steps in a row were skipped (their rows are in metrics.jsonl, kind alarm), so the "
                "weights themselves are bad; start again in another output folder with a lower optimizer.lr or a "
                "longer warm-up"
            )
        return replace(self, skips=self.skips + 1)
