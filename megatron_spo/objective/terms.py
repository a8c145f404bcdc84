"""The objective of one pass over a part of the global batch.

Everything is divided here, once, by counts of the *global* batch that are known before the forward pass. A
part's value is its share, so summing over parts gives the same objective and gradient however the batch is
cut into rows, micro-batches and ranks.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_spo.config.losses import LOSS_SPECS
from megatron_spo.objective.losses import PairLogprobs, preference_losses
from megatron_spo.objective.plan import Pass
from megatron_spo.objective.schedules import SpoSettings
from megatron_spo.objective.statistics import LossStatistics


@dataclass(frozen=True)
class GlobalCounts:
    """Sizes of the global batch: f is a mean over its pairs, g over all response tokens of the chosen."""

    pairs: int
    chosen_tokens: int


def objective(
    pairs: PairLogprobs,
    pass_: Pass,
    *,
    loss_name: str,
    parameters: Mapping[str, float | bool],
    spo: SpoSettings,
    counts: GlobalCounts,
    statistics: LossStatistics,
) -> tuple[Tensor, dict[str, Tensor]]:
    """This part's share of the pass's objective, and what was computed per pair on the way.

    The objective is f + lambda * g (unit `token`) or f - lambda * beta * mean(s_w) (unit `relative`), s_w
    being the chosen log-prob as the loss uses it (sum or token mean). The value v of the reference is a
    constant and is not subtracted. With `spo.constraint: pair` a hinge on each pair takes the place of the
    SFT term.

    Args:
        pairs: the pairs of this part, possibly none.
        pass_: the weights of the two terms; see `Pass` for what the SFT weight means.
        loss_name, parameters: the preference loss and its resolved parameters.
        counts: of the global batch, not of this part.
        statistics: running statistics of the steps before this one.

    Returns:
        A scalar, differentiable in the policy's log-probs, and detached [pairs] tensors by name:
        `preference`, the unweighted loss of each pair, in passes that have one.
    """
    per_pair: dict[str, Tensor] = {}
    value = pairs.chosen.new_zeros(())
    if pass_.preference:
        # Not a Python branch on the values: that would make the host wait for the device in every
        # micro-batch.
        torch._assert_async(
            (pairs.rejected_tokens > 0).all(), "a row without a rejected response has no preference loss"
        )
        losses = preference_losses(loss_name, pairs, parameters, statistics)
        per_pair["preference"] = losses.detach()
        value = value + pass_.preference * losses.sum() / counts.pairs
    if pass_.sft:
        beta = parameters["beta"]
        term = _penalty(pairs, loss_name, beta, spo, counts) if pass_.preference else _nll(pairs, counts)
        value = value + pass_.sft * term
    return value, per_pair


def _nll(pairs: PairLogprobs, counts: GlobalCounts) -> Tensor:
    """g: negative log-prob per chosen token of the global batch (nats)."""
    return -pairs.chosen.sum() / counts.chosen_tokens


def _penalty(pairs: PairLogprobs, loss_name: str, beta: float, spo: SpoSettings, counts: GlobalCounts) -> Tensor:
    """The term that lambda weighs beside a preference loss, by `spo.constraint` and `spo.lambda_unit`."""
    relative = spo.lambda_unit == "relative"
    statistic = LOSS_SPECS[loss_name].statistic
    assert not relative or statistic, f"loss {loss_name} has no scale for the unit relative"
    if spo.constraint == "pair":
        excess = torch.relu(pairs.chosen_fall / pairs.chosen_tokens - spo.epsilon)
        if relative:
            # The hinge is per token; a loss that sums feels a nat per token n_w times.
            excess = beta * excess * (pairs.chosen_tokens if statistic == "sum" else 1.0)
        return excess.sum() / counts.pairs
    if relative:
        statistics = pairs.chosen if statistic == "sum" else pairs.chosen_mean
        return -beta * statistics.sum() / counts.pairs
    return _nll(pairs, counts)
