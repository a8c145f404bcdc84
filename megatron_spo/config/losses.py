"""What the configuration knows about each preference loss: needs, parameters, defaults. No torch.

The formulas are in `megatron_spo.objective.losses`, one function per name, with keyword arguments named as
here.

Sources of the defaults: the loss's paper or its authors' configurations where they name one value, else TRL's
default (`beta` 0.1). simpo: within the authors' table (beta 2 to 2.5, ratio .1 to .8 for most models; beta 10
for two). TRL's own SimPO defaults (beta 0.1, gamma 0.5, that is a ratio of 5, and an NLL term of weight 1)
are not theirs. alpha_dpo: the authors' Llama-3-Instruct configuration. cpo: `nll_weight` is 1 in the paper
and 0 here, because the SFT term is the business of `spo.lambda`. dpop: beta and penalty as in the Smaug
paper.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

Statistic = Literal["sum", "mean"]
ROUNDING = 4e-6
"""Relative rounding of an fp32 sum of log-probs. A policy that equals its reference is off by so much in another
layout, or with other neighbours in its row; where the sign of a difference decides, a smaller one counts as none."""


@dataclass(frozen=True)
class LossSpec:
    """The facts of one preference loss that do not need tensors.

    Attributes:
        name: the value of `loss.name`.
        needs_reference: whether the reference's log-probs enter the formula (they may still be wanted to
            measure the gap of a loss that does not need them).
        parameters: accepted `loss.*` keys with their defaults; every other key is refused.
        statistic: the form in which the chosen log-prob enters the loss, next to `beta`: its "sum" over the
            response or its token "mean". `spo.lambda_unit: relative` acts on it; None means that the loss has
            no such common scale and refuses the unit.
        summary: one line for `--help` and the generated reference configuration.
    """

    name: str
    needs_reference: bool
    parameters: Mapping[str, float | bool]
    statistic: Statistic | None
    summary: str


@dataclass(frozen=True)
class LossTerm:
    """One loss of the upper level f = sum of weight * loss, with its resolved parameters."""

    spec: LossSpec
    weight: float
    parameters: Mapping[str, float | bool]


def _spec(
    name: str,
    summary: str,
    *,
    statistic: Statistic | None = "sum",
    needs_reference: bool = True,
    **parameters: float | bool,
) -> LossSpec:
    return LossSpec(name, needs_reference, MappingProxyType(parameters), statistic, summary)


_SPECS = (
    _spec("dpo", "DPO; label_smoothing > 0 is cDPO", beta=0.1, label_smoothing=0.0),
    _spec(
        "robust",
        "robust DPO, unbiased when labels are flipped at rate label_smoothing (< 0.5)",
        beta=0.1,
        label_smoothing=0.1,
    ),
    _spec(
        "ipo",
        "IPO: squared distance of the log-ratio gap to 1/(2 beta); average: per token, the authors' form",
        statistic=None,
        beta=0.1,
        average=True,
    ),
    _spec("hinge", "SLiC hinge on the DPO margin", beta=0.1),
    _spec(
        "simpo",
        "SimPO: length-normalised, no reference, target margin gamma_beta_ratio",
        statistic="mean",
        needs_reference=False,
        beta=2.5,
        gamma_beta_ratio=0.3,
        label_smoothing=0.0,
    ),
    _spec(
        "alpha_dpo",
        "AlphaDPO: SimPO with a margin that follows the standardised log-ratio gap",
        statistic="mean",
        beta=2.5,
        gamma_beta_ratio=0.6,
        alpha=0.2,
        label_smoothing=0.0,
    ),
    _spec(
        "cpo",
        "CPO: DPO without a reference; nll_weight adds the chosen response's mean negative log-prob",
        needs_reference=False,
        beta=0.1,
        label_smoothing=0.0,
        nll_weight=0.0,
    ),
    _spec(
        "orpo",
        "ORPO: chosen mean negative log-prob plus beta times the odds-ratio loss",
        statistic=None,
        needs_reference=False,
        beta=0.1,
    ),
    _spec(
        "dpop",
        "DPO-Positive (Smaug): DPO, penalised where the chosen log-prob is below the reference's",
        beta=0.3,
        penalty=50.0,
    ),
    _spec(
        "exo_pair",
        "EXO: reverse KL from the pair's policy distribution to smoothed labels (label_smoothing > 0)",
        beta=0.1,
        label_smoothing=1e-3,
    ),
    _spec("nca_pair", "NCA: noise-contrastive alignment on a pair", beta=0.01),
    _spec("apo_zero", "APO-zero: chosen up, rejected down", beta=0.1),
    _spec("apo_down", "APO-down: both down, rejected more", beta=0.1),
    _spec(
        "sppo_hard",
        "SPPO with hard labels: squared distance of each log-ratio to +-1/(2 beta)",
        statistic=None,
        beta=0.001,
    ),
    _spec(
        "discopop",
        "DiscoPOP: logistic and exponential losses blended by the log-ratio (0 < discopop_tau <= 1)",
        beta=0.05,
        discopop_tau=0.05,
    ),
    _spec("bco_pair", "BCO on a pair: binary classification of chosen and rejected", beta=0.01),
)

LOSS_SPECS: Mapping[str, LossSpec] = MappingProxyType({spec.name: spec for spec in _SPECS})
