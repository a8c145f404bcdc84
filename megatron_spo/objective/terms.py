"""The objective of one pass over a part of the global batch.

All terms are divided here by counts of the *global* batch, which are known before the forward pass. The value of a
part is its share of the objective, so the sum over parts, and its gradient, do not depend on how the batch is divided
into rows, micro-batches and ranks.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_spo.config.losses import LossTerm
from megatron_spo.config.spo import SpoConfig
from megatron_spo.objective.losses import PairLogprobs, preference_losses
from megatron_spo.objective.statistics import LossStatistics
from megatron_spo.objective.step_plan import Pass, Role


@dataclass(frozen=True)
class GlobalCounts:
    """Sizes of a set's global batch: f is a mean over its pairs, g over the tokens of all chosen responses."""

    pairs: int
    chosen_tokens: int


def objective(
    pairs: PairLogprobs,
    pass_: Pass,
    *,
    losses: Sequence[LossTerm],
    spo: SpoConfig,
    counts: GlobalCounts,
    statistics: LossStatistics,
    role: Role = Role.BOTH,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Returns this part's share of the pass's objective, and the loss of each pair.

    The objective is f + lambda * g (unit `token`) or f - lambda * beta * mean(s_w) (unit `relative`), where s_w
    is the chosen log-prob as the loss uses it (sum or token mean). The value v of the reference is a constant and
    is not subtracted. With `spo.constraint: pair`, a hinge on each pair replaces the SFT term. Several losses, and
    their relative terms, are added with their weights.

    Args:
        pairs: the pairs of this part; may be empty.
        pass_: the weights of the two terms; see `Pass` for the meaning of the SFT weight.
        losses: one or more preference losses.
        spo: the configuration of the SFT term.
        counts: counts of the global batch of the set that the pairs come from, not of this part.
        statistics: running statistics of the steps before this one.
        role: the terms that these pairs are used for. An SFT row of a separate set counts as a pair of its own set.

    Returns:
        A scalar, differentiable in the policy's log-probs, and detached [pairs] tensors by name:
        `preference`, the unweighted loss of each pair, in passes that have one.
    """
    per_pair: dict[str, Tensor] = {}
    value = pairs.chosen.new_zeros(())
    if pass_.preference and Role.PREFERENCE in role:
        # A Python branch on the values would make the host wait for the device in every micro-batch.
        torch._assert_async(
            (pairs.rejected_tokens > 0).all(), "a row without a rejected response has no preference loss"
        )
        values = preference_losses(losses, pairs, statistics)
        per_pair["preference"] = values.detach()
        value = value + pass_.preference * values.sum() / counts.pairs
    if pass_.sft and Role.SFT in role:
        term = _sft_term(pairs, losses, spo, counts) if pass_.preference else _nll(pairs, counts)
        value = value + pass_.sft * term
    return value, per_pair


def _nll(pairs: PairLogprobs, counts: GlobalCounts) -> Tensor:
    """g: negative log-prob per chosen token of the global batch (nats)."""
    return -pairs.chosen.sum() / counts.chosen_tokens


def _sft_term(pairs: PairLogprobs, losses: Sequence[LossTerm], spo: SpoConfig, counts: GlobalCounts) -> Tensor:
    """The SFT term next to a preference loss, according to `spo.constraint` and `spo.lambda_unit`, without lambda."""
    excess = torch.relu(pairs.chosen_fall / pairs.chosen_tokens - spo.epsilon) if spo.constraint == "pair" else None
    if spo.lambda_unit == "token":
        return _nll(pairs, counts) if excess is None else excess.sum() / counts.pairs
    value = pairs.chosen.new_zeros(())
    for term in losses:
        statistic, scale = term.spec.statistic, term.weight * term.parameters["beta"]
        assert statistic, f"loss {term.spec.name} has no scale for the unit relative"
        if excess is None:
            value = value - scale * (pairs.chosen if statistic == "sum" else pairs.chosen_mean).sum()
        else:
            # The hinge is per token; for a loss on sums, a nat per token counts n_w times.
            value = value + scale * (excess * (pairs.chosen_tokens if statistic == "sum" else 1.0)).sum()
    return value / counts.pairs
