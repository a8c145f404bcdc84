"""Running statistics for a loss that standardises values by those of earlier steps (alpha_dpo)."""

from dataclasses import asdict, dataclass

from torch import Tensor

DECAY = 0.9
# Smallest standard deviation, nats per token. Below it policy and reference are practically equal, and dividing by
# their tiny spread would turn rounding into a margin: in the second step of a run that starts at the reference, z
# could be arbitrarily large.
STD_FLOOR = 1e-2


@dataclass(frozen=True)
class LossStatistics:
    """Exponential moving averages of the global batch's mean and standard deviation.

    They are part of the training state. After each optimizer step, `update` takes the sums over the global batch.
    The loss of a step therefore uses the steps before it, and evaluation does not change the statistics.

    Attributes:
        mean_ema, std_ema: averages that start at 0, not corrected for this, in units of the tracked value.
        updates: number of steps in the averages.
    """

    mean_ema: float = 0.0
    std_ema: float = 0.0
    updates: int = 0

    @property
    def mean(self) -> float:
        """Average of the means, corrected for its start at 0."""
        return self._corrected(self.mean_ema)

    @property
    def std(self) -> float:
        """Average of the standard deviations, corrected for its start at 0; without the lower limit STD_FLOOR."""
        return self._corrected(self.std_ema)

    def _corrected(self, average: float) -> float:
        return average / (1 - DECAY**self.updates) if self.updates else 0.0

    def standardise(self, values: Tensor) -> Tensor:
        """Returns (values - mean) / max(std, STD_FLOOR); zeros before the first update."""
        if not self.updates:
            return values.new_zeros(values.shape)
        return (values - self.mean) / max(self.std, STD_FLOOR)

    def update(self, total: float, total_of_squares: float, count: int) -> "LossStatistics":
        """Returns the statistics after one more global batch, given its sum, sum of squares and number of pairs.

        The standard deviation is the unbiased one, and 0 for a single pair.
        """
        mean = total / count
        variance = max(total_of_squares - count * mean**2, 0.0) / max(count - 1, 1)
        return LossStatistics(
            mean_ema=DECAY * self.mean_ema + (1 - DECAY) * mean,
            std_ema=DECAY * self.std_ema + (1 - DECAY) * variance**0.5,
            updates=self.updates + 1,
        )

    def to_dict(self) -> dict[str, float | int]:
        """Returns the state as plain numbers for the checkpoint."""
        return asdict(self)

    @classmethod
    def from_dict(cls, state: dict[str, float | int]) -> "LossStatistics":
        """Inverse of `to_dict`."""
        return cls(float(state["mean_ema"]), float(state["std_ema"]), int(state["updates"]))
