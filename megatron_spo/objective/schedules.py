"""Bilevel schedules: pure functions from (settings, step, state) to the plan of one optimizer step.

No schedule touches a tensor. What a schedule remembers is `ScheduleState`, part of the checkpoint; whatever
the step number alone decides (ramp, phase of the alternation) is computed from it and not stored, so a
resumed run agrees.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from types import MappingProxyType

from megatron_spo.config.spo import RUNNING_MIN, SpoConfig
from megatron_spo.objective.step_plan import Add, Barrier, Pass, Shift, StepPlan

GAP_EMA = 0.9
"""Decay per step of the moving average of the gap that `dual` follows."""
GAP_ROUNDING = 1e-5
"""Nats per chosen token below which a gap above epsilon is the layout's rounding."""


@dataclass(frozen=True)
class ScheduleState:
    """What a schedule carries from step to step.

    Attributes:
        lambda_: the current multiplier of `dual`; for the other schedules the configured one, unchanged.
        gap: g - v of the last global batch, nats per chosen token; None before the first.
        gap_ema: its exponential moving average (decay GAP_EMA), started at the first gap.
        best_sft: the lowest g of a global batch so far, nats per chosen token; None before the first.
        raised: what alarms have multiplied the configured lambda by (`raise_lambda`).
    """

    lambda_: float
    gap: float | None = None
    gap_ema: float | None = None
    best_sft: float | None = None
    raised: float = 1.0

    def saw(self, sft: float) -> "ScheduleState":
        """The state once a training batch had the SFT loss g = `sft`."""
        return replace(self, best_sft=sft if self.best_sft is None else min(self.best_sft, sft))

    def to_dict(self) -> dict[str, float | None]:
        """Plain numbers for the checkpoint."""
        return asdict(self)

    @classmethod
    def from_dict(cls, state: dict[str, float | None]) -> "ScheduleState":
        """The inverse of `to_dict`."""
        lambda_, raised = state["lambda_"], state.get("raised", 1.0)
        assert lambda_ is not None and raised is not None
        return cls(lambda_, state["gap"], state["gap_ema"], state["best_sft"], raised)


def _none(spo: SpoConfig, step: int, state: ScheduleState) -> StepPlan:
    return StepPlan((Pass(preference=1.0, sft=0.0),), lambda_=0.0)


def _sft(spo: SpoConfig, step: int, state: ScheduleState) -> StepPlan:
    return StepPlan((Pass(preference=0.0, sft=1.0),), lambda_=0.0)


def _with_lambda(lambda_: float) -> StepPlan:
    return StepPlan((Pass(preference=1.0, sft=lambda_),), lambda_=lambda_)


def _penalty(spo: SpoConfig, step: int, state: ScheduleState) -> StepPlan:
    """Constant lambda, or a linear ramp that reaches it at step `ramp_steps` - 1, like a learning rate's
    warm-up.

    The batch constraint switches the term off unless the last measured gap lies above epsilon, beyond rounding;
    before the first measurement the policy is still the reference, whose gap is 0.
    """
    if spo.constraint == "batch" and (state.gap is None or state.gap <= spo.epsilon + GAP_ROUNDING):
        return _with_lambda(0.0)
    ramp = min(1.0, (step + 1) / spo.ramp_steps) if spo.ramp_steps else 1.0
    return _with_lambda(spo.lambda_ * state.raised * ramp)


def _dual(spo: SpoConfig, step: int, state: ScheduleState) -> StepPlan:
    return _with_lambda(state.lambda_)


def _alternating(spo: SpoConfig, step: int, state: ScheduleState) -> StepPlan:
    """`sft_steps` steps on g, then `preference_steps` on f, and again."""
    on_sft = step % (spo.sft_steps + spo.preference_steps) < spo.sft_steps
    return _sft(spo, step, state) if on_sft else _none(spo, step, state)


def _lookahead(spo: SpoConfig, step: int, state: ScheduleState) -> StepPlan:
    """One inner SFT step, theta' = theta - lookahead_lr * grad g(theta); then the optimizer applies
    grad f(theta') + lambda * grad g(theta) at theta (arXiv 2507.07723v1)."""
    inner = Pass(preference=0.0, sft=1.0, slot="g")
    outer = Pass(preference=1.0, sft=0.0, slot="f", shift=Shift("g", spo.lookahead_lr))
    lambda_ = spo.lambda_ * state.raised
    return StepPlan((inner, outer), lambda_, Add((("f", 1.0), ("g", lambda_))))


def _barrier(spo: SpoConfig, step: int, state: ScheduleState) -> StepPlan:
    """grad f, plus as much of grad g as makes g fall at barrier_rate * max(last gap - epsilon, 0) (dynamic barrier)."""
    excess = max((state.gap or 0.0) - spo.epsilon, 0.0)
    passes = (Pass(preference=1.0, sft=0.0, slot="f"), Pass(preference=0.0, sft=1.0, slot="g"))
    return StepPlan(passes, 0.0, Barrier("f", "g", spo.barrier_rate * excess))


SCHEDULES: Mapping[str, Callable[[SpoConfig, int, ScheduleState], StepPlan]] = MappingProxyType(
    {
        "none": _none,
        "sft": _sft,
        "penalty": _penalty,
        "dual": _dual,
        "alternating": _alternating,
        "lookahead": _lookahead,
        "barrier": _barrier,
    }
)


def initial_state(spo: SpoConfig) -> ScheduleState:
    """The state before step 0."""
    return ScheduleState(lambda_=spo.lambda_)


def plan_step(spo: SpoConfig, step: int, state: ScheduleState) -> StepPlan:
    """The plan of optimizer step `step`, counted from 0 over the whole run."""
    return SCHEDULES[spo.schedule](spo, step, state)


def optimal_value(spo: SpoConfig, state: ScheduleState, measured: float | None) -> float | None:
    """v, the lower level's optimal value in nats per chosen token; None where it is not known.

    `spo.v` null takes `measured`, the reference's own SFT loss on the rows whose g is compared with it. A number
    stands for itself. `running_min` is the setting without an SFT model: the lowest g of a training batch so far. In
    training that includes the batch itself, so that its gap is never negative and the first is 0; in an evaluation,
    whose rows are others, the gap may be of either sign. A batch's g is noisy and its minimum lies below the mean
    that any one model reaches: the noisier the batches, the wider should epsilon be.
    """
    if spo.v is None:
        return measured
    return state.best_sft if spo.v == RUNNING_MIN else float(spo.v)


def observe(spo: SpoConfig, state: ScheduleState, gap: float) -> ScheduleState:
    """The state after a step whose global batch had the gap g - v = `gap` (nats per chosen token).

    `dual` moves its multiplier along the smoothed gap: clip(lambda + dual_lr * (gap - epsilon), 0,
    lambda_max).
    """
    smoothed = gap if state.gap_ema is None else GAP_EMA * state.gap_ema + (1 - GAP_EMA) * gap
    state = replace(state, gap=gap, gap_ema=smoothed)
    if spo.schedule != "dual":
        return state
    moved = state.lambda_ + spo.dual_lr * (smoothed - spo.epsilon)
    return replace(state, lambda_=min(max(moved, 0.0), spo.lambda_max))


def raise_lambda(spo: SpoConfig, state: ScheduleState, factor: float) -> ScheduleState:
    """The state with lambda multiplied by `factor`, for schedules that have one; that of `dual` up to lambda_max."""
    if spo.schedule == "dual":
        return replace(state, lambda_=min(state.lambda_ * factor, spo.lambda_max))
    return replace(state, raised=state.raised * factor)
