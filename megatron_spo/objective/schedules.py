"""Bilevel schedules: pure functions from (settings, step, state) to the plan of one optimizer step.

No schedule uses tensors. The state of a schedule is `ScheduleState`, which is part of the checkpoint. Everything
that depends only on the step number (ramp, phase of the alternation) is computed from it and not stored, so a
resumed run gives the same plans.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from types import MappingProxyType

from megatron_spo.config.spo import RUNNING_MIN, SpoConfig
from megatron_spo.objective.step_plan import Add, Barrier, Pass, Shift, StepPlan

GAP_EMA = 0.9
"""Decay per step of the moving average of the gap that `dual` follows."""
GAP_ROUNDING = 1e-5
"""Nats per chosen token by which a gap may exceed epsilon because of rounding, which depends on the layout."""


@dataclass(frozen=True)
class ScheduleState:
    """The state that a schedule carries from step to step.

    Attributes:
        lambda_: the current multiplier of `dual`; for other schedules the configured value, unchanged.
        gap: g - v of the last global batch, nats per chosen token; None before the first.
        gap_ema: exponential moving average of the gap (decay GAP_EMA), starting at the first one.
        best_sft: the lowest g of a global batch so far, nats per chosen token; None before the first.
        raised: factor by which alarms have multiplied the configured lambda (`raise_lambda`).
    """

    lambda_: float
    gap: float | None = None
    gap_ema: float | None = None
    best_sft: float | None = None
    raised: float = 1.0

    def saw(self, sft: float) -> "ScheduleState":
        """Returns the state after a training batch with the SFT loss g = `sft` (nats per chosen token)."""
        return replace(self, best_sft=sft if self.best_sft is None else min(self.best_sft, sft))

    def to_dict(self) -> dict[str, float | None]:
        """Returns the state as plain numbers for the checkpoint."""
        return asdict(self)

    @classmethod
    def from_dict(cls, state: dict[str, float | None]) -> "ScheduleState":
        """Inverse of `to_dict`."""
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
    """Constant lambda, or a linear ramp that reaches it at step `ramp_steps` - 1, like a learning rate warm-up.

    The batch constraint switches the term off unless the last measured gap exceeds epsilon by more than rounding.
    Before the first measurement the policy is still the reference, whose gap is 0.
    """
    if spo.constraint == "batch" and (state.gap is None or state.gap <= spo.epsilon + GAP_ROUNDING):
        return _with_lambda(0.0)
    ramp = min(1.0, (step + 1) / spo.ramp_steps) if spo.ramp_steps else 1.0
    return _with_lambda(spo.lambda_ * state.raised * ramp)


def _dual(spo: SpoConfig, step: int, state: ScheduleState) -> StepPlan:
    return _with_lambda(state.lambda_)


def _alternating(spo: SpoConfig, step: int, state: ScheduleState) -> StepPlan:
    """Repeats `sft_steps` steps on g, then `preference_steps` steps on f."""
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
    """grad f, plus the smallest multiple of grad g that makes g fall at the rate barrier_rate * max(last gap - epsilon,
    0) (dynamic barrier)."""
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
    """Returns the state before step 0."""
    return ScheduleState(lambda_=spo.lambda_)


def plan_step(spo: SpoConfig, step: int, state: ScheduleState) -> StepPlan:
    """Returns the plan of optimizer step `step`, counted from 0 over the whole run."""
    return SCHEDULES[spo.schedule](spo, step, state)


def optimal_value(spo: SpoConfig, state: ScheduleState, measured: float | None) -> float | None:
    """Returns v, the lower level's optimal value in nats per chosen token, or None if it is unknown.

    If `spo.v` is null, v is `measured`, the reference's SFT loss on the rows whose g is compared with it. If `spo.v` is
    a number, v is that number. `running_min` is for runs without an SFT model: v is the lowest g of a training batch so
    far. In training this includes the batch itself, so its gap is never negative and the first gap is 0. In an
    evaluation, which has other rows, the gap may have either sign. The g of a batch is noisy, and its minimum lies
    below the mean that any single model reaches, so noisier batches need a larger epsilon.
    """
    if spo.v is None:
        return measured
    return state.best_sft if spo.v == RUNNING_MIN else float(spo.v)


def observe(spo: SpoConfig, state: ScheduleState, gap: float) -> ScheduleState:
    """Returns the state after a step whose global batch had the gap g - v = `gap` (nats per chosen token).

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
    """Returns the state with lambda multiplied by `factor`, for schedules with a lambda; for `dual` at most
    lambda_max."""
    if spo.schedule == "dual":
        return replace(state, lambda_=min(state.lambda_ * factor, spo.lambda_max))
    return replace(state, raised=state.raised * factor)
