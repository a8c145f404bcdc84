"""Properties of the preference losses: requirements, parameters and defaults. Does not import torch.

The formulas are in `megatron_spo.objective.losses`, one function per name, with the same parameter names.

The defaults are those of the paper or of the authors' configurations if they give one value, else those of TRL (`beta`
0.1). simpo: within the authors' table (beta 2 to 2.5, ratio 0.1 to 0.8 for most models; beta 10 for two). TRL's SimPO
defaults (beta 0.1, gamma 0.5, which is a ratio of 5, and an NLL term of weight 1) differ from the authors'. alpha_dpo:
the authors' Llama-3-Instruct configuration. cpo: `nll_weight` is 1 in the paper and 0 here, because `spo.lambda`
controls the SFT term. dpop: beta and penalty as in the Smaug paper.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

Statistic = Literal["sum", "mean"]
ROUNDING = 4e-6
"""Relative rounding error of a sum of log-probs in fp32. A policy that equals its reference differs from it by this
much in another layout or with other pairs in its row. If the sign of a difference matters, smaller ones count as 0."""
BF16_ROUNDING = 2e-3
"""The same in bf16."""


@dataclass(frozen=True)
class LossSpec:
    """Properties of one preference loss that do not need tensors.

    Attributes:
        name: the value of `loss.name`.
        needs_reference: whether the formula uses log-probs of the reference. (The gap may need them with any loss.)
        parameters: accepted `loss.*` keys with their defaults; other keys are rejected.
        statistic: which chosen log-prob beta multiplies in the loss: its "sum" over the response or its "mean" over the
            tokens. `spo.lambda_unit: relative` depends on it. None: the loss has no single scale, so that unit is
            rejected.
        summary: one line for `--help`.
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
    _spec("dpo", "DPO; cDPO with label_smoothing > 0", beta=0.1, label_smoothing=0.0),
    _spec(
        "robust",
        "robust DPO, unbiased when labels are flipped at rate label_smoothing (< 0.5)",
        beta=0.1,
        label_smoothing=0.1,
    ),
    _spec(
        "ipo",
        "IPO: squared distance of the log-ratio gap to 1/(2 beta); average: per token, as in the authors' code",
        statistic=None,
        beta=0.1,
        average=True,
    ),
    _spec("hinge", "SLiC: hinge loss on the DPO margin", beta=0.1),
    _spec(
        "simpo",
        "SimPO: length-normalised log-probs, no reference, target margin gamma_beta_ratio",
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
        "ORPO: mean negative log-prob of the chosen response plus beta times the odds-ratio loss",
        statistic=None,
        needs_reference=False,
        beta=0.1,
    ),
    _spec(
        "dpop",
        "DPO-Positive (Smaug): DPO with a penalty if the chosen log-prob is below that of the reference",
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
    _spec("apo_zero", "APO-zero: increases the chosen and decreases the rejected log-prob", beta=0.1),
    _spec("apo_down", "APO-down: decreases both log-probs, the rejected one more", beta=0.1),
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
