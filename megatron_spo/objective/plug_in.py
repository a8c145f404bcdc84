"""The objective for another trainer: losses and schedules by name, without a configuration file.

`preference_loss` is the loss of each pair alone; `SpoObjective` adds the SFT term and the schedule. Both take tensors
[pairs] and know nothing of ranks and micro-batches. examples/plug_in uses them in a plain Megatron-Core training loop.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any, Literal

from torch import Tensor

from megatron_spo.config.losses import LOSS_SPECS, LossTerm
from megatron_spo.config.spo import SpoConfig, schedules_with
from megatron_spo.objective.losses import PairLogprobs, preference_losses, statistic_values
from megatron_spo.objective.schedules import ScheduleState, initial_state, observe, optimal_value, plan_step
from megatron_spo.objective.statistics import LossStatistics
from megatron_spo.objective.step_plan import Pass, StepPlan
from megatron_spo.objective.terms import GlobalCounts, objective


def preference_loss(
    name: str, pairs: PairLogprobs, *, statistics: LossStatistics | None = None, **parameters: float
) -> Tensor:
    """The preference loss of each pair, such as DPO's -log sigmoid(beta h) (arXiv 2305.18290, eq. 7).

    Formulas and their sources are in `megatron_spo.objective.losses`, one function per name; the defaults of their
    parameters, and where these come from, in `megatron_spo.config.losses`.

    Args:
        name: "dpo", "robust", "ipo", "hinge", "simpo", "alpha_dpo", "cpo", "orpo", "dpop", "exo_pair", "nca_pair",
            "apo_zero", "apo_down", "sppo_hard", "discopop" or "bco_pair".
        pairs: log-probs in nats, each tensor [pairs].
        statistics: for alpha_dpo, the running statistics of earlier steps; None before the first.
        parameters: of the loss, such as `beta`; those that are not given take the loss's defaults.

    Returns:
        [pairs], in nats, differentiable in `pairs.chosen` and `pairs.rejected`; not reduced. Average it over the pairs
        of the global batch.

    Raises:
        ValueError: no such loss, a parameter that it does not have, tensors of other shapes, or no reference
            log-probs for a loss that needs them.
    """
    _check_shapes(pairs)
    return preference_losses((_term(name, parameters),), pairs, statistics or LossStatistics())


@dataclass(frozen=True)
class SpoState:
    """What `SpoObjective` carries from one optimizer step to the next; immutable, the same on every rank.

    Attributes:
        schedule: the last gap g - v and its average (nats per chosen token), the multiplier of `dual`, the lowest g.
        statistics: running mean and deviation of the loss `alpha_dpo`.
    """

    schedule: ScheduleState
    statistics: LossStatistics = LossStatistics()

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers for a checkpoint."""
        return {"schedule": self.schedule.to_dict(), "statistics": self.statistics.to_dict()}

    @classmethod
    def from_dict(cls, state: dict[str, Any]) -> "SpoState":
        """The inverse of `to_dict`."""
        return cls(ScheduleState.from_dict(state["schedule"]), LossStatistics.from_dict(state["statistics"]))


@dataclass(frozen=True)
class SpoObjective:
    """Stable Preference Optimization (arXiv 2507.07723): a preference loss f over pairs, an SFT loss g over the chosen
    responses, and a schedule that decides how both enter an optimizer step.

    f is a mean over the pairs of the global batch, g = -sum(log p chosen) / sum(chosen tokens) over the global batch,
    and v the optimal value of g: that of the reference on the same responses, unless `v` says otherwise. The gap g - v
    is in nats per chosen token. The object holds settings only; all methods are pure, and the state that some schedules
    and losses need is passed in and out as `SpoState`.

    Every setting means what the key of the same name means in a configuration's sections `loss` and `spo`, and has the
    same default; docs/loss.md says how to choose them.

    Args:
        loss: name of the preference loss, see `preference_loss`.
        parameters: of the loss, such as {"beta": 0.1}; those that are not given take the loss's defaults.
        schedule: "none" (f alone), "sft" (g alone), "penalty" (f + lambda g), "dual" (f + lambda g, lambda driven by
            the gap), "alternating" (g, then f), "lookahead" and "barrier". All but the last two are one pass per step.
        lambda_: weight of the SFT term, >= 0; for dual, its start.
        lambda_unit: "token" takes g itself as SFT term, "relative" -beta * mean(s), s the chosen log-prob as the loss
            uses it (sum or token mean), so that lambda does not depend on beta and on the length of responses. ipo,
            orpo and sppo_hard support "token" only.
        constraint: penalty only: "none" applies the SFT term always, "batch" only after a global batch whose gap
            exceeded epsilon, "pair" replaces it by a hinge on each pair that lies below its reference by more.
        v: optimal value of g, nats per chosen token; "running_min" for the lowest g of a global batch so far; None
            for the reference's own.
        epsilon: width of the safe region g <= v + epsilon, nats per chosen token, >= 0.
        ramp_steps: penalty only: optimizer steps over which lambda rises from 0.
        lambda_max, dual_lr: dual only: largest lambda, and change of lambda per step and nat of gap.
        sft_steps, preference_steps: alternating only: consecutive steps on g and on f, >= 1.
        lookahead_lr: lookahead only: length of the inner SFT step.
        barrier_rate: barrier only: how fast g must fall, per nat of gap beyond epsilon.

    Raises:
        ValueError: an unknown name, a parameter that the loss does not have, a setting that the schedule does not
            read, a number out of its range, or `lambda_unit` "relative" with a loss that does not support it.
    """

    loss: str = "dpo"
    parameters: Mapping[str, float] = field(default_factory=dict)
    schedule: str = "penalty"
    lambda_: float = 1.0
    lambda_unit: str = "relative"
    constraint: str = "none"
    v: float | Literal["running_min"] | None = None
    epsilon: float = 0.0
    ramp_steps: int = 0
    lambda_max: float = 10.0
    dual_lr: float = 0.1
    sft_steps: int = 1
    preference_steps: int = 1
    lookahead_lr: float = 1e-3
    barrier_rate: float = 100.0

    def __post_init__(self) -> None:
        for entry in fields(self):
            users = schedules_with(entry.name.rstrip("_"))
            if users and self.schedule not in users and getattr(self, entry.name) != entry.default:
                raise ValueError(
                    f"{entry.name} has no effect with schedule {self.schedule!r}; it belongs to {', '.join(users)}"
                )
        if self._spo.spec.has_unit and self.lambda_unit == "relative" and self._terms[0].spec.statistic is None:
            raise ValueError(f"{self.loss} does not support lambda_unit 'relative'; use 'token'")

    @cached_property
    def _spo(self) -> SpoConfig:
        """The settings as the section of a configuration, which checks their ranges."""
        own = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        del own["loss"], own["parameters"]
        return SpoConfig(**own)

    @property
    def _terms(self) -> tuple[LossTerm]:
        return (_term(self.loss, self.parameters),)

    def initial_state(self) -> SpoState:
        """The state before the first optimizer step."""
        return SpoState(initial_state(self._spo))

    def plan(self, step: int, state: SpoState) -> StepPlan:
        """What optimizer step `step` (from 0) does, as plain data.

        For all schedules but lookahead and barrier it is one pass, `plan.passes[0]`, over the micro-batches of the
        global batch. For those two there are several, whose gradients `plan.combine` combines into that of the step
        (see `megatron_spo.objective.step_plan`).
        """
        return plan_step(self._spo, step, state.schedule)

    def micro_batch_loss(
        self, pairs: PairLogprobs, pass_: Pass, state: SpoState, *, batch_pairs: int, batch_chosen_tokens: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The share of these pairs in the objective of a pass, and in the metrics of the global batch.

        Shares add up: their sum over all micro-batches and data-parallel ranks is the objective, and a metric, of the
        global batch, however it is cut. So undo what your trainer divides the loss by. Megatron-Core divides a loss
        that comes without a token count by the number of micro-batches, and its DDP averages gradients over the
        data-parallel ranks: return the loss times both.

        Args:
            pairs: log-probs of this micro-batch in nats, each tensor [pairs], possibly with no pairs.
            pass_: one of `plan(...).passes`.
            state: before this optimizer step.
            batch_pairs: pairs of the global batch.
            batch_chosen_tokens: response tokens of their chosen responses.

        Returns:
            A scalar with gradient, and detached fp64 scalars by name: "loss"; "loss/preference" (f, in passes that
            have it); "loss/sft" (g) and, with a reference, "loss/reference_sft" (its g), in nats per chosen token;
            "pairs"; for alpha_dpo "statistic" and "statistic_squared".

        Raises:
            ValueError: tensors of other shapes, or no reference log-probs where the loss or the constraint needs them.
        """
        _check_shapes(pairs)
        counts = GlobalCounts(batch_pairs, batch_chosen_tokens)
        value, per_pair = objective(
            pairs, pass_, losses=self._terms, spo=self._spo, counts=counts, statistics=state.statistics
        )
        shares = {"loss": value, "loss/sft": -pairs.chosen.double().sum() / batch_chosen_tokens}
        if pairs.reference_chosen is not None:
            shares["loss/reference_sft"] = -pairs.reference_chosen.double().sum() / batch_chosen_tokens
        if "preference" in per_pair:
            shares["loss/preference"] = per_pair["preference"].double().sum() / batch_pairs
        if (statistic := statistic_values(self._terms, pairs)) is not None:
            statistic = statistic.double()
            shares |= {"statistic": statistic.sum(), "statistic_squared": (statistic**2).sum()}
        shares["pairs"] = value.new_full((), len(pairs.chosen))
        return value, {name: share.detach().double() for name, share in shares.items()}

    def next_state(self, state: SpoState, totals: Mapping[str, float]) -> SpoState:
        """The state after an optimizer step.

        Args:
            state: before the step.
            totals: metrics of `micro_batch_loss` at the weights before the step, summed over all micro-batches and
                data-parallel ranks. Every rank must pass the same numbers.

        Raises:
            ValueError: dual, barrier or the constraint "batch" without a gap: neither reference nor `v` is given.
        """
        schedule, statistics = state.schedule.saw(totals["loss/sft"]), state.statistics
        v = optimal_value(self._spo, schedule, totals.get("loss/reference_sft"))
        if v is not None:
            schedule = observe(self._spo, schedule, totals["loss/sft"] - v)
        elif self._spo.spec.needs_gap or self.constraint == "batch":
            raise ValueError(f"schedule {self.schedule} reads the gap g - v: give the reference's log-probs, or v")
        if "statistic" in totals:
            pairs = round(totals["pairs"])
            statistics = statistics.update(totals["statistic"], totals["statistic_squared"], pairs)
        return SpoState(schedule, statistics)


def _term(name: str, parameters: Mapping[str, float]) -> LossTerm:
    """One loss with its parameters, each as given or at the loss's default."""
    if name not in LOSS_SPECS:
        raise ValueError(f"there is no loss {name!r}; it must be one of {', '.join(LOSS_SPECS)}")
    spec = LOSS_SPECS[name]
    if unknown := sorted(parameters.keys() - spec.parameters.keys()):
        raise ValueError(f"loss {name} has no parameter {unknown[0]!r}; it has {', '.join(spec.parameters)}")
    return LossTerm(spec, 1.0, {**spec.parameters, **parameters})


def _check_shapes(pairs: PairLogprobs) -> None:
    shapes = {
        entry.name: tuple(value.shape) for entry in fields(pairs) if (value := getattr(pairs, entry.name)) is not None
    }
    if len(set(shapes.values())) > 1 or pairs.chosen.ndim != 1:
        raise ValueError(f"all tensors of the pairs must have one shape [pairs], and have {shapes}")
