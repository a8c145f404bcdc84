"""Metrics of a step or an evaluation: per-pair values are summed on the device, all-reduced once, and named."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_spo.objective.losses import PairLogprobs
from megatron_spo.objective.terms import GlobalCounts
from megatron_spo.runtime.processes import Runtime

SUMS = (
    "objective", "preference", "chosen", "rejected", "reward_chosen", "reward_rejected", "accuracy",
    "chosen_shift", "rejected_shift", "both_down", "reference_chosen", "statistic", "statistic_squared",
    "entropy", "scored_tokens",
)  # fmt: skip
"""Names of the values that are summed over the pairs of a batch, in this order."""


@dataclass(frozen=True)
class PairValues:
    """Detached [pairs] values of one row from the objective; None if the data or the loss has no such value.

    `entropies` [pairs, 2]: sums over the tokens of the chosen and the rejected response (nats).
    `rewards_are_ratios`: the rewards are differences to the reference, so they are compared up to rounding.
    """

    pairs: PairLogprobs
    entropies: Tensor
    preference: Tensor | None
    rewards: tuple[Tensor, Tensor] | None
    statistic: Tensor | None
    rewards_are_ratios: bool


def row_sums(objective: Tensor, values: PairValues, rounding: float) -> Tensor:
    """Returns the sums of one row, fp64 [len(SUMS)]. `rounding`: relative rounding error of a log-prob."""
    pairs = values.pairs
    zero = torch.zeros_like(pairs.chosen)
    out: dict[str, Tensor] = {"chosen": pairs.chosen, "rejected": pairs.rejected}
    out |= {"entropy": values.entropies, "scored_tokens": pairs.chosen_tokens + pairs.rejected_tokens}
    noise = rounding * pairs.chosen.abs(), rounding * pairs.rejected.abs()
    if values.preference is not None:
        out["preference"] = values.preference
    if values.rewards is not None:
        chosen, rejected = values.rewards
        out["reward_chosen"], out["reward_rejected"] = chosen, rejected
        tie = pairs.gap.abs() <= noise[0] + noise[1] if values.rewards_are_ratios else chosen == rejected
        out["accuracy"] = torch.where(tie, 0.5, (chosen > rejected).float())
    if pairs.reference_chosen is not None:
        out["chosen_shift"], out["rejected_shift"] = pairs.chosen_ratio, pairs.rejected_ratio
        out["both_down"] = ((pairs.chosen_ratio < -noise[0]) & (pairs.rejected_ratio < -noise[1])).float()
        out["reference_chosen"] = pairs.reference_chosen
    if values.statistic is not None:
        out["statistic"], out["statistic_squared"] = values.statistic, values.statistic**2
    sums = [out.get(name, zero).detach().double().sum() for name in SUMS[1:]]
    return torch.stack([objective.detach().double(), *sums])


def reduce_sums(per_row: list[Tensor], *, runtime: Runtime) -> dict[str, float]:
    """Returns the sums over all rows of all ranks, by one all-reduce; only ranks that hold results contribute."""
    total = torch.zeros(len(SUMS), dtype=torch.float64, device=runtime.device)
    if runtime.holds_results and per_row:
        total += torch.stack(per_row).sum(0)
    with runtime.clock.phase("communication"):
        dist.all_reduce(total)
        return dict(zip(SUMS, total.tolist(), strict=True))


@dataclass(frozen=True)
class Measured:
    """Global sums of a batch or a data set, and which metrics they allow.

    Attributes:
        sums, counts: global sums and counts of the same rows.
        reference: whether a reference is available, so that shifts and v can be measured.
        rejected: whether the rows have rejected responses.
        rewarded: whether the preference loss can be computed.
    """

    sums: dict[str, float]
    counts: GlobalCounts
    reference: bool
    rejected: bool
    rewarded: bool

    @property
    def sft_loss(self) -> float:
        """g of these rows, nats per token."""
        return -self.sums["chosen"] / self.counts.chosen_tokens

    @property
    def reference_sft_loss(self) -> float | None:
        """The reference's g of the same rows, nats per token; None without a reference."""
        return -self.sums["reference_chosen"] / self.counts.chosen_tokens if self.reference else None


def named_metrics(pairs: Measured, lower: Measured, *, v: float | None) -> dict[str, float]:
    """Returns the metrics of a batch or a data set, computed from its global sums, by name.

    Args:
        pairs: sums of the pairs; all metrics but `loss/sft` and `spo/gap` come from these.
        lower: sums of the lower level's rows, for `loss/sft` and `spo/gap`; the same object as `pairs` if the lower
            level is the chosen responses of the pairs.
        v: the lower level's optimal value in nats per chosen token, or None if unknown.
    """
    mean = {name: total / pairs.counts.pairs for name, total in pairs.sums.items()}
    loss = pairs.sums["objective"] + (lower.sums["objective"] if lower is not pairs else 0.0)
    metrics = {"loss": loss, "loss/sft": lower.sft_loss, "logps/chosen": mean["chosen"]}
    metrics["policy/entropy"] = pairs.sums["entropy"] / pairs.sums["scored_tokens"]
    if pairs.rejected:
        metrics["logps/rejected"] = mean["rejected"]
    if pairs.rejected and pairs.rewarded:
        metrics |= {
            "loss/preference": mean["preference"],
            "rewards/chosen": mean["reward_chosen"],
            "rewards/rejected": mean["reward_rejected"],
            "rewards/accuracies": mean["accuracy"],
            "rewards/margins": mean["reward_chosen"] - mean["reward_rejected"],
        }
    if pairs.reference:
        metrics["spo/chosen_shift"] = mean["chosen_shift"]
        if pairs.rejected:
            metrics |= {"spo/rejected_shift": mean["rejected_shift"], "spo/both_down": mean["both_down"]}
    if v is not None:
        metrics["spo/gap"] = lower.sft_loss - v
    metrics |= {"pairs": pairs.counts.pairs, "chosen_tokens": pairs.counts.chosen_tokens}
    return metrics if lower is pairs else {**metrics, "sft_rows": lower.counts.pairs}
