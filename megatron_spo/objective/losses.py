"""Preference losses: pure functions from the log-probs of pairs to one value per pair.

Notation of the docstrings, per pair: `p_w, p_l` log-probs of the chosen and the rejected response under the
policy, summed over response tokens; `r_w, r_l` under the reference; `n_w, n_l` token counts; `a = p/n`,
`b = r/n`; `ls` = log-sigmoid; `h = (p_w - r_w) - (p_l - r_l)`. Every function returns a tensor [pairs],
differentiable in the policy's log-probs, and neither reduces nor communicates. Adding a loss: one function
here, one line in `LOSSES`, one `LossSpec` in `config/losses.py` whose parameters are the function's keyword
arguments.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from megatron_spo.config.losses import ROUNDING, LossTerm
from megatron_spo.objective.statistics import LossStatistics


@dataclass(frozen=True)
class PairLogprobs:
    """Log-probs of a set of pairs; every tensor has shape [pairs].

    Attributes:
        chosen, rejected: the policy's log-probs summed over response tokens (nats), with gradient.
        chosen_tokens, rejected_tokens: response token counts as floats; `rejected_tokens` is 0 if a row has
            only a chosen response, and such a row must not be part of a preference loss.
        reference_chosen, reference_rejected: the same sums under the frozen reference, or None.
    """

    chosen: Tensor
    rejected: Tensor
    chosen_tokens: Tensor
    rejected_tokens: Tensor
    reference_chosen: Tensor | None = None
    reference_rejected: Tensor | None = None

    @property
    def chosen_mean(self) -> Tensor:
        """a_w, nats per token."""
        return self.chosen / self.chosen_tokens

    @property
    def rejected_mean(self) -> Tensor:
        """a_l, nats per token."""
        return self.rejected / self.rejected_tokens

    @property
    def chosen_ratio(self) -> Tensor:
        """p_w - r_w; ValueError without a reference."""
        return self.chosen - _present(self.reference_chosen)

    @property
    def rejected_ratio(self) -> Tensor:
        """p_l - r_l; ValueError without a reference."""
        return self.rejected - _present(self.reference_rejected)

    @property
    def chosen_fall(self) -> Tensor:
        """relu(r_w - p_w), with 0 for values within rounding.

        A run starts at the kink, where rounding would otherwise turn the gradient on.
        """
        fall = -self.chosen_ratio
        return torch.where(fall > ROUNDING * self.chosen.abs(), fall, 0.0)

    @property
    def gap(self) -> Tensor:
        """h, the difference of the two log-ratios."""
        return self.chosen_ratio - self.rejected_ratio

    @property
    def mean_gap(self) -> Tensor:
        """(a_w - b_w) - (a_l - b_l): the difference of the log-ratios per token."""
        return self.chosen_ratio / self.chosen_tokens - self.rejected_ratio / self.rejected_tokens


def _present(reference: Tensor | None) -> Tensor:
    if reference is None:
        raise ValueError("this loss needs the reference's log-probs, but none were given")
    return reference


def _smoothed(logits: Tensor, label_smoothing: float) -> Tensor:
    """Cross-entropy of the pair's label when it is flipped with probability `label_smoothing`."""
    return -(1 - label_smoothing) * logsigmoid(logits) - label_smoothing * logsigmoid(-logits)


def dpo(pairs: PairLogprobs, *, beta: float, label_smoothing: float) -> Tensor:
    """-(1-e) ls(beta h) - e ls(-beta h): DPO (arXiv 2305.18290, eq. 7), for e > 0 cDPO (Mitchell's note)."""
    return _smoothed(beta * pairs.gap, label_smoothing)


def robust(pairs: PairLogprobs, *, beta: float, label_smoothing: float) -> Tensor:
    """[-(1-e) ls(beta h) + e ls(-beta h)] / (1-2e), e < 1/2: robust DPO (arXiv 2403.00409)."""
    logits = beta * pairs.gap
    clean, flipped = -logsigmoid(logits), -logsigmoid(-logits)
    return ((1 - label_smoothing) * clean - label_smoothing * flipped) / (1 - 2 * label_smoothing)


def ipo(pairs: PairLogprobs, *, beta: float, average: bool) -> Tensor:
    """(gap - 1/(2 beta))^2: IPO (arXiv 2310.12036, eq. 17; beta is its tau).

    With `average`, gap is the difference of log-ratios per token, which the authors say they used for the paper's
    results and which TRL uses; otherwise it is the difference of sums, as in the formula and in older trainers.
    """
    return ((pairs.mean_gap if average else pairs.gap) - 1 / (2 * beta)) ** 2


def hinge(pairs: PairLogprobs, *, beta: float) -> Tensor:
    """relu(1 - beta h): SLiC's hinge (arXiv 2305.10425) on DPO's margin, as in RSO (arXiv 2309.06657)."""
    return torch.relu(1 - beta * pairs.gap)


def simpo(pairs: PairLogprobs, *, beta: float, gamma_beta_ratio: float, label_smoothing: float) -> Tensor:
    """-ls(beta (a_w - a_l - gamma_beta_ratio)): SimPO (arXiv 2405.14734)."""
    return _smoothed(beta * (pairs.chosen_mean - pairs.rejected_mean - gamma_beta_ratio), label_smoothing)


def alpha_dpo(
    pairs: PairLogprobs,
    *,
    beta: float,
    gamma_beta_ratio: float,
    alpha: float,
    label_smoothing: float,
    statistics: LossStatistics,
) -> Tensor:
    """-ls(beta ((a_w - a_l) - sg[alpha z + gamma_beta_ratio])): AlphaDPO (arXiv 2410.10148).

    z is the length-normalised log-ratio gap, standardised by running statistics of the steps before this one,
    so a pair's loss does not depend on its micro-batch and evaluation changes nothing. The authors' trainer
    includes the current micro-batch, even in evaluation, and divides by zero if the policy equals the
    reference.
    """
    margin = alpha * statistics.standardise(pairs.mean_gap.detach()) + gamma_beta_ratio
    return _smoothed(beta * (pairs.chosen_mean - pairs.rejected_mean - margin), label_smoothing)


def cpo(pairs: PairLogprobs, *, beta: float, label_smoothing: float, nll_weight: float) -> Tensor:
    """-ls(beta (p_w - p_l)) - nll_weight a_w: CPO (arXiv 2401.08417).

    The second term is a mean over pairs. TRL's `cpo_alpha` takes the mean over the chosen tokens of the
    micro-batch, which is the same if all chosen responses have the same length. `spo.lambda` in unit `token`
    weighs the token mean.
    """
    return _smoothed(beta * (pairs.chosen - pairs.rejected), label_smoothing) - nll_weight * pairs.chosen_mean


def _log1mexp(x: Tensor) -> Tensor:
    """log(1 - exp(x)) for x <= 0 without cancellation; x is kept one rounding step away from the pole at 0."""
    log_half = -math.log(2)
    # Each branch gets only arguments in its own range, because torch.where would turn an infinity in the unused
    # branch into a NaN gradient.
    near_zero = torch.log(-torch.expm1(x.clamp(min=log_half, max=-torch.finfo(x.dtype).eps)))
    far = torch.log1p(-torch.exp(x.clamp(max=log_half)))
    return torch.where(x < log_half, far, near_zero)


def orpo(pairs: PairLogprobs, *, beta: float) -> Tensor:
    """-a_w - beta ls(log odds ratio of exp(a_w) and exp(a_l)): ORPO (arXiv 2403.07691, where beta is lambda).

    The first term is a mean over pairs of the response's token mean, as in the paper. TRL takes the token mean
    over prompt and chosen response of the micro-batch instead; the odds-ratio term is the same.
    """
    chosen, rejected = pairs.chosen_mean, pairs.rejected_mean
    log_odds = (chosen - rejected) - (_log1mexp(chosen) - _log1mexp(rejected))
    return -chosen - beta * logsigmoid(log_odds)


def dpop(pairs: PairLogprobs, *, beta: float, penalty: float) -> Tensor:
    """-ls(beta (h - penalty relu(r_w - p_w))): DPO-Positive (Smaug, arXiv 2402.13228)."""
    return -logsigmoid(beta * (pairs.gap - penalty * pairs.chosen_fall))


def exo_pair(pairs: PairLogprobs, *, beta: float, label_smoothing: float) -> Tensor:
    """KL from (sigma(beta h), sigma(-beta h)) to (1-e, e), e > 0: EXO (arXiv 2402.00856, eq. 16)."""
    logits = beta * pairs.gap
    log_chosen, log_rejected = logsigmoid(logits), logsigmoid(-logits)
    chosen_term = torch.sigmoid(logits) * (log_chosen - math.log1p(-label_smoothing))
    return chosen_term + torch.sigmoid(-logits) * (log_rejected - math.log(label_smoothing))


def nca_pair(pairs: PairLogprobs, *, beta: float) -> Tensor:
    """-ls(u_w) - ls(-u_w)/2 - ls(-u_l)/2 with u = beta (p - r): NCA on pairs (arXiv 2402.05369)."""
    chosen, rejected = beta * pairs.chosen_ratio, beta * pairs.rejected_ratio
    return -logsigmoid(chosen) - 0.5 * logsigmoid(-chosen) - 0.5 * logsigmoid(-rejected)


def apo_zero(pairs: PairLogprobs, *, beta: float) -> Tensor:
    """(1 - sigma(u_w)) + sigma(u_l) with u = beta (p - r): APO-zero (arXiv 2408.06266, eq. 7)."""
    return torch.sigmoid(-beta * pairs.chosen_ratio) + torch.sigmoid(beta * pairs.rejected_ratio)


def apo_down(pairs: PairLogprobs, *, beta: float) -> Tensor:
    """sigma(u_w) + (1 - sigma(beta h)) with u = beta (p - r): APO-down (arXiv 2408.06266, eq. 8)."""
    return torch.sigmoid(beta * pairs.chosen_ratio) + torch.sigmoid(-beta * pairs.gap)


def sppo_hard(pairs: PairLogprobs, *, beta: float) -> Tensor:
    """((p_w-r_w) - 1/(2 beta))^2 + ((p_l-r_l) + 1/(2 beta))^2: SPPO, hard labels (arXiv 2405.00675)."""
    return (pairs.chosen_ratio - 0.5 / beta) ** 2 + (pairs.rejected_ratio + 0.5 / beta) ** 2


def discopop(pairs: PairLogprobs, *, beta: float, discopop_tau: float) -> Tensor:
    """(1-m) (-ls(beta h)) + m exp(-beta h), m = sigma(beta h / tau): DiscoPOP (arXiv 2406.08414, eq. 5).

    The product m exp(-beta h) is computed as one exponential, because for tau <= 1 it stays below 1 even if
    exp(-beta h) overflows.
    """
    logits = beta * pairs.gap
    blend = logits / discopop_tau
    return -logsigmoid(logits) * torch.sigmoid(-blend) + torch.exp(logsigmoid(blend) - logits)


def bco_pair(pairs: PairLogprobs, *, beta: float) -> Tensor:
    """-ls(u_w) - ls(-u_l) with u = beta (p - r): BCO on pairs (arXiv 2404.04656, section 4).

    The reward shift of the paper and of older TRL (a running mean of rewards) is omitted, as in TRL 1.16.
    """
    return -logsigmoid(beta * pairs.chosen_ratio) - logsigmoid(-beta * pairs.rejected_ratio)


LOSSES: Mapping[str, Callable[..., Tensor]] = MappingProxyType(
    {
        function.__name__: function
        for function in (
            dpo,
            robust,
            ipo,
            hinge,
            simpo,
            alpha_dpo,
            cpo,
            orpo,
            dpop,
            exo_pair,
            nca_pair,
            apo_zero,
            apo_down,
            sppo_hard,
            discopop,
            bco_pair,
        )
    }
)
# For losses with running statistics: the value per pair that they track. Their functions take `statistics`.
TRACKED: Mapping[str, Callable[[PairLogprobs], Tensor]] = MappingProxyType({"alpha_dpo": lambda pairs: pairs.mean_gap})


def preference_losses(terms: Sequence[LossTerm], pairs: PairLogprobs, statistics: LossStatistics) -> Tensor:
    """Returns the upper level's loss of each pair, [pairs]: the sum of weight * loss over the terms."""
    return torch.stack([term.weight * _loss(term, pairs, statistics) for term in terms]).sum(0)


def _loss(term: LossTerm, pairs: PairLogprobs, statistics: LossStatistics) -> Tensor:
    name = term.spec.name
    if name in TRACKED:
        return LOSSES[name](pairs, **term.parameters, statistics=statistics)
    return LOSSES[name](pairs, **term.parameters)


def statistic_values(terms: Sequence[LossTerm], pairs: PairLogprobs) -> Tensor | None:
    """Returns the value per pair that `LossStatistics` tracks ([pairs], detached), or None if no loss tracks one."""
    tracked = [term.spec.name for term in terms if term.spec.name in TRACKED]
    return TRACKED[tracked[0]](pairs).detach() if tracked else None


def rewards(terms: Sequence[LossTerm], pairs: PairLogprobs) -> tuple[Tensor, Tensor]:
    """Returns the implicit rewards of both responses, [pairs], detached: beta (p - r), or beta a if reference-free.

    The rewards of several losses are added with the losses' weights, as their gradients are.
    """
    chosen, rejected = torch.zeros_like(pairs.chosen), torch.zeros_like(pairs.rejected)
    for term in terms:
        scale = term.weight * term.parameters["beta"]
        if term.spec.needs_reference:
            chosen += scale * pairs.chosen_ratio.detach()
            rejected += scale * pairs.rejected_ratio.detach()
        else:
            chosen += scale * pairs.chosen_mean.detach()
            rejected += scale * pairs.rejected_mean.detach()
    return chosen, rejected
