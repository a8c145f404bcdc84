"""One test of the plans per schedule, and of the state in a checkpoint."""

import json
from dataclasses import replace

import pytest

from megatron_spo.config.spo import SpoConfig
from megatron_spo.objective.schedules import (
    SCHEDULES,
    ScheduleState,
    initial_state,
    observe,
    plan_step,
)
from megatron_spo.objective.step_plan import Add, Barrier, Pass, Shift, StepPlan
from tests.objective.samples import spo_config

ON_F = StepPlan((Pass(preference=1.0, sft=0.0),), lambda_=0.0)
ON_G = StepPlan((Pass(preference=0.0, sft=1.0),), lambda_=0.0)


def both(lambda_: float) -> StepPlan:
    return StepPlan((Pass(preference=1.0, sft=lambda_),), lambda_=lambda_)


def plans(spo: SpoConfig, steps: int) -> list[StepPlan]:
    return [plan_step(spo, step, initial_state(spo)) for step in range(steps)]


def test_none_and_sft() -> None:
    assert plans(spo_config(schedule="none"), 2) == [ON_F, ON_F]
    assert plans(spo_config(schedule="sft"), 2) == [ON_G, ON_G]


def test_penalty_is_constant_or_ramped() -> None:
    assert plans(spo_config(lambda_=2.0), 2) == [both(2.0)] * 2
    assert plans(spo_config(lambda_=2.0, ramp_steps=4), 6) == [both(x) for x in (0.5, 1.0, 1.5, 2.0, 2.0, 2.0)]


def test_batch_constraint_follows_the_last_gap() -> None:
    spo = spo_config(lambda_=2.0, constraint="batch", epsilon=0.1)
    state = initial_state(spo)
    assert plan_step(spo, 0, state) == both(0.0)
    for gap, expected in [(0.05, 0.0), (0.1, 0.0), (0.11, 2.0), (-1.0, 0.0)]:
        state = observe(spo, state, gap)
        assert plan_step(spo, 1, state) == both(expected)


def test_pair_constraint_is_a_matter_of_the_terms() -> None:
    assert plans(spo_config(constraint="pair"), 1) == [both(1.0)]


def test_dual_climbs_the_smoothed_gap_and_stays_in_its_box() -> None:
    spo = spo_config(schedule="dual", lambda_=0.5, dual_lr=2.0, epsilon=0.1, lambda_max=1.0)
    state = initial_state(spo)
    assert plan_step(spo, 0, state) == both(0.5)
    state = observe(spo, state, 0.2)  # smoothed .2: .5 + 2 (.2 - .1)
    assert state.lambda_ == pytest.approx(0.7)
    state = observe(spo, state, -0.8)  # smoothed .9 * .2 - .1 * .8 = .1: unchanged
    assert state.lambda_ == pytest.approx(0.7)
    assert state.gap == -0.8
    assert state.gap_ema == pytest.approx(0.1)
    assert plan_step(spo, 2, state).lambda_ == state.lambda_
    assert observe(spo, state, 5.0).lambda_ == 1.0
    assert observe(spo, state, -5.0).lambda_ == 0.0


def test_alternating_counts_from_the_first_step() -> None:
    spo = spo_config(schedule="alternating", sft_steps=2, preference_steps=1)
    assert plans(spo, 7) == [ON_G, ON_G, ON_F, ON_G, ON_G, ON_F, ON_G]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_state_survives_json_and_goes_on_alike(schedule: str) -> None:
    spo = spo_config(schedule=schedule)
    state = initial_state(spo)
    for gap in (0.3, -0.1, 1 / 3):
        reloaded = ScheduleState.from_dict(json.loads(json.dumps(state.to_dict())))
        assert reloaded == state
        assert observe(spo, reloaded, gap) == observe(spo, state, gap)
        state = observe(spo, state, gap)
        assert state.gap == gap  # kept under every schedule, for the log
        assert (state.lambda_ != spo.lambda_) == (schedule == "dual")


def test_lookahead_takes_f_one_inner_step_ahead_and_applies_it_here() -> None:
    plan = plan_step(spo_config(schedule="lookahead", lookahead_lr=0.01, lambda_=0.5), 3, initial_state(spo_config()))
    inner, outer = plan.passes
    assert (inner.preference, inner.sft, inner.shift) == (0.0, 1.0, None)
    assert (outer.preference, outer.sft, outer.shift) == (1.0, 0.0, Shift(inner.slot, 0.01))
    assert plan.combine == Add(((outer.slot, 1.0), (inner.slot, 0.5)))
    assert plan.lambda_ == 0.5


@pytest.mark.parametrize(("gap", "rate"), [(None, 0.0), (0.05, 0.0), (0.3, 0.4)])
def test_barrier_asks_for_a_fall_of_g_outside_the_safe_region(gap: float | None, rate: float) -> None:
    settings = spo_config(schedule="barrier", barrier_rate=2.0, epsilon=0.1)
    plan = plan_step(settings, 0, replace(initial_state(settings), gap=gap))
    f, g = plan.passes
    assert (f.preference, f.sft, g.preference, g.sft) == (1.0, 0.0, 0.0, 1.0)
    assert isinstance(plan.combine, Barrier)
    assert (plan.combine.f, plan.combine.g) == (f.slot, g.slot)
    assert plan.combine.rate == pytest.approx(rate)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_upper_pass_is_that_of_the_preference_loss(schedule: str) -> None:
    for plan in plans(spo_config(schedule=schedule), 2):
        weighing = [one for one in plan.passes if one.preference]
        assert plan.upper == (weighing[0] if weighing else plan.passes[0])
        assert len(weighing) <= 1
