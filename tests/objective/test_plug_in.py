"""The objective for another trainer: what the trainer of this package computes, by name, and errors by name."""

from dataclasses import fields, replace
from typing import Any

import pytest
import torch

from megatron_spo.config.losses import LOSS_SPECS
from megatron_spo.config.spo import SpoConfig
from megatron_spo.objective.losses import LOSSES, TRACKED, PairLogprobs
from megatron_spo.objective.plug_in import SpoObjective, SpoState, preference_loss
from tests.objective.samples import STATISTICS, defaults, make_pairs, random_pairs


@pytest.mark.parametrize("name", LOSS_SPECS)
def test_a_loss_by_name(name: str) -> None:
    pairs = random_pairs(5)
    more: dict[str, Any] = {"statistics": STATISTICS} if name in TRACKED else {}
    torch.testing.assert_close(preference_loss(name, pairs, **more), LOSSES[name](pairs, **defaults(name), **more))
    changed = preference_loss(name, pairs, beta=0.3, statistics=STATISTICS)
    torch.testing.assert_close(changed, LOSSES[name](pairs, **defaults(name, beta=0.3), **more))


def test_the_defaults_are_those_of_the_configuration() -> None:
    config = SpoConfig()
    for entry in fields(SpoObjective):
        if entry.name not in ("loss", "parameters"):
            assert getattr(SpoObjective(), entry.name) == getattr(config, entry.name), entry.name
    of_data = {"sft_data", "sft_batch_size"}
    assert {entry.name for entry in fields(SpoObjective)} - {"loss", "parameters"} == set(
        SpoConfig.model_fields
    ) - of_data


def part(pairs: PairLogprobs, indices: list[int]) -> PairLogprobs:
    given = {entry.name: value for entry in fields(pairs) if (value := getattr(pairs, entry.name)) is not None}
    return replace(pairs, **{name: value[indices] for name, value in given.items()})


def totals_of(
    spo: SpoObjective, state: SpoState, step: int, parts: list[list[int]], pairs: PairLogprobs
) -> dict[str, float]:
    """One step's metrics of a global batch that is cut into parts."""
    counts = {"batch_pairs": len(pairs.chosen), "batch_chosen_tokens": int(pairs.chosen_tokens.sum())}
    (pass_,) = spo.plan(step, state).passes
    shares = [spo.micro_batch_loss(part(pairs, indices), pass_, state, **counts) for indices in parts]
    for loss, metrics in shares:
        assert loss.item() == pytest.approx(float(metrics["loss"])) and not metrics["loss"].requires_grad
    return {name: sum(float(metrics[name]) for _, metrics in shares) for name in shares[0][1]}


@pytest.mark.parametrize("loss", ["dpo", "alpha_dpo"])
@pytest.mark.parametrize("schedule", ["none", "sft", "penalty", "dual", "alternating"])
def test_shares_add_up_over_steps(loss: str, schedule: str) -> None:
    """Three steps with the global batch whole, and in parts of which one is empty: the same metrics and states."""
    spo = SpoObjective(loss=loss, schedule=schedule, constraint="batch" if schedule == "penalty" else "none")
    whole = parts = spo.initial_state()
    for step in range(3):
        pairs = random_pairs(7, seed=step)
        expected = totals_of(spo, whole, step, [list(range(7))], pairs)
        got = totals_of(spo, parts, step, [[3, 0], [], [1, 2, 6, 5, 4]], pairs)
        assert got == pytest.approx(expected) and expected["pairs"] == 7
        whole, parts = spo.next_state(whole, expected), spo.next_state(parts, got)
        assert whole.to_dict() == {name: pytest.approx(value) for name, value in parts.to_dict().items()}
        assert whole.schedule.gap == pytest.approx(expected["loss/sft"] - expected["loss/reference_sft"])
        assert SpoState.from_dict(whole.to_dict()) == whole
    assert (whole.statistics.updates == 3) == (loss == "alpha_dpo")
    assert (whole.schedule.lambda_ != 1.0) == (schedule == "dual")


def test_the_lowest_g_stands_for_v() -> None:
    """Without a reference."""
    spo = SpoObjective("simpo", schedule="dual", v="running_min")
    pairs = make_pairs([-4.0, -6.0], [-9.0, -3.0], ([2, 6], [3, 1]))
    state = spo.next_state(spo.initial_state(), totals_of(spo, spo.initial_state(), 0, [[0, 1]], pairs))
    assert state.schedule.best_sft == 10 / 8 and state.schedule.gap == 0
    assert spo.next_state(state, {"loss/sft": 1.5}).schedule.gap == 0.25


def test_lookahead_has_two_passes() -> None:
    spo = SpoObjective(schedule="lookahead")
    inner, outer = spo.plan(0, spo.initial_state()).passes
    pairs, state = random_pairs(3), spo.initial_state()
    counts = {"batch_pairs": 3, "batch_chosen_tokens": int(pairs.chosen_tokens.sum())}
    assert "loss/preference" not in spo.micro_batch_loss(pairs, inner, state, **counts)[1]
    assert "loss/preference" in spo.micro_batch_loss(pairs, outer, state, **counts)[1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss": "dop"}, "there is no loss 'dop'; it must be one of dpo, robust"),
        ({"parameters": {"gamma": 1}}, "loss dpo has no parameter 'gamma'; it has beta, label_smoothing"),
        ({"schedule": "penalties"}, "schedule\n.*Input should be 'none', 'sft', 'penalty'"),
        ({"lambda_unit": "nats"}, "lambda_unit\n.*Input should be 'token' or 'relative'"),
        ({"constraint": "row"}, "constraint\n.*Input should be 'none', 'batch' or 'pair'"),
        ({"loss": "ipo"}, "ipo does not support lambda_unit 'relative'; use 'token'"),
        ({"lambda_": -1.0}, "lambda_\n.*greater than or equal to 0"),
        ({"schedule": "alternating", "sft_steps": 0}, "sft_steps\n.*greater than or equal to 1"),
        ({"v": "lowest"}, "v.word\n.*Input should be 'running_min'"),
        ({"schedule": "none", "lambda_": 2.0}, "lambda_ has no effect with schedule 'none'; it belongs to penalty"),
    ],
)
def test_wrong_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SpoObjective(**settings)


def test_wrong_pairs() -> None:
    without = make_pairs([-4.0], [-9.0], ([2], [3]))
    with pytest.raises(ValueError, match="needs the reference's log-probs"):
        preference_loss("dpo", without)
    with pytest.raises(ValueError, match="one shape .*'chosen': .1,., 'rejected': .2,."):
        preference_loss("simpo", make_pairs([-4.0], [-9.0, -1.0], ([2], [3])))
    spo = SpoObjective("simpo", schedule="dual")
    totals = totals_of(spo, spo.initial_state(), 0, [[0]], without)
    with pytest.raises(ValueError, match="schedule dual reads the gap"):
        spo.next_state(spo.initial_state(), totals)
