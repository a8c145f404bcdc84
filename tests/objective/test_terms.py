"""The objective of a pass: its terms, compared with values by hand, do not depend on how the batch is divided."""

from dataclasses import fields

import pytest
import torch
from torch import Tensor

from megatron_spo.config.losses import LOSS_SPECS
from megatron_spo.config.spo import SpoConfig
from megatron_spo.objective.losses import LOSSES, PairLogprobs, preference_losses
from megatron_spo.objective.step_plan import Pass
from megatron_spo.objective.terms import GlobalCounts, objective
from tests.objective.samples import STATISTICS, defaults, make_pairs, only, random_pairs, spo_config

BOTH = Pass(preference=1.0, sft=2.0)
RELATIVE = [name for name, spec in LOSS_SPECS.items() if spec.statistic]
UNITS = [(name, "token") for name in LOSSES] + [(name, "relative") for name in RELATIVE]


def two_pairs() -> PairLogprobs:
    """a_w = -2 and -1 with b_w = -2.5 and -.5; 2 + 6 chosen tokens."""
    return make_pairs([-4.0, -6.0], [-9.0, -3.0], ([2, 6], [3, 1]), ([-5.0, -3.0], [-8.0, -3.0]))


def value_of(pairs: PairLogprobs, name: str, pass_: Pass, spo: SpoConfig, counts: GlobalCounts | None = None) -> Tensor:
    counts = counts or counts_of(pairs)
    value, _ = objective(
        pairs,
        pass_,
        losses=only(name),
        spo=spo,
        counts=counts,
        statistics=STATISTICS,
    )
    return value


def counts_of(pairs: PairLogprobs) -> GlobalCounts:
    return GlobalCounts(len(pairs.chosen), int(pairs.chosen_tokens.sum()))


def part(pairs: PairLogprobs, indices: list[int]) -> PairLogprobs:
    return PairLogprobs(*(getattr(pairs, field.name)[indices] for field in fields(pairs)))


@pytest.mark.parametrize(
    ("name", "unit", "term"),
    [
        ("dpo", "token", 10 / 8),
        ("ipo", "token", 10 / 8),
        ("dpo", "relative", 0.1 * 5.0),
        ("cpo", "relative", 0.1 * 5.0),
        ("simpo", "relative", 2.5 * 1.5),
        ("alpha_dpo", "relative", 2.5 * 1.5),
    ],
)
def test_penalty(name: str, unit: str, term: float) -> None:
    pairs = two_pairs()
    preference = preference_losses(only(name), pairs, STATISTICS).mean()
    value = value_of(pairs, name, BOTH, spo_config(lambda_unit=unit))
    assert (value - preference).item() == pytest.approx(2.0 * term)


@pytest.mark.parametrize(
    ("name", "unit", "term"),
    [
        ("dpo", "token", 0.4 / 2),
        ("dpo", "relative", 0.1 * 6 * 0.4 / 2),
        ("simpo", "relative", 2.5 * 0.4 / 2),
    ],
)
def test_hinge_on_pairs(name: str, unit: str, term: float) -> None:
    # b_w - a_w - eps: the first pair rose by .5 and is inside, the second fell by .5 and is .4 outside.
    pairs = two_pairs()
    spo = spo_config(lambda_unit=unit, constraint="pair", epsilon=0.1)
    preference = preference_losses(only(name), pairs, STATISTICS).mean()
    assert (value_of(pairs, name, BOTH, spo) - preference).item() == pytest.approx(2.0 * term)


@pytest.mark.parametrize("unit", ["token", "relative"])
@pytest.mark.parametrize("constraint", ["none", "pair"])
def test_a_pass_on_g_alone_is_plain_sft(unit: str, constraint: str) -> None:
    value = value_of(
        two_pairs(), "dpo", Pass(preference=0.0, sft=1.0), spo_config(lambda_unit=unit, constraint=constraint)
    )
    assert value.item() == pytest.approx(10 / 8)


def test_relative_unit_means_the_same_pull_for_any_beta() -> None:
    # At the reference sigma(-beta h) = 1/2, so lambda 1 triples the coefficient of the chosen log-prob's
    # gradient.
    for beta in (0.02, 0.5):
        pairs = make_pairs([-4.0], [-9.0], ([2], [3]), ([-4.0], [-9.0]))
        parameters = defaults("dpo", beta=beta)
        counts = counts_of(pairs)
        value, _ = objective(
            pairs,
            Pass(1.0, 1.0),
            losses=only("dpo", parameters),
            spo=spo_config(),
            counts=counts,
            statistics=STATISTICS,
        )
        value.backward()
        assert pairs.chosen.grad is not None
        assert pairs.rejected.grad is not None
        assert pairs.chosen.grad.item() == pytest.approx(-1.5 * beta)
        assert pairs.rejected.grad.item() == pytest.approx(0.5 * beta)


@pytest.mark.parametrize("constraint", ["none", "pair"])
@pytest.mark.parametrize(("name", "unit"), UNITS)
def test_cutting_the_batch_changes_nothing(name: str, unit: str, constraint: str) -> None:
    whole = random_pairs(7)
    counts, spo = counts_of(whole), spo_config(lambda_unit=unit, constraint=constraint)
    expected = value_of(whole, name, BOTH, spo, counts)
    gradients = torch.autograd.grad(expected, (whole.chosen, whole.rejected))
    for cut in ([[0], [1, 2, 3], [], [4, 5, 6]], [[6, 2], [0, 1, 3, 4], [5]]):
        parts = [value_of(part(whole, indices), name, BOTH, spo, counts) for indices in cut]
        total = torch.stack(parts).sum()
        torch.testing.assert_close(total, expected)
        torch.testing.assert_close(torch.autograd.grad(total, (whole.chosen, whole.rejected)), gradients)


def test_per_pair_values_are_the_unweighted_losses() -> None:
    pairs = two_pairs()
    _, per_pair = objective(
        pairs,
        Pass(0.5, 3.0),
        losses=only("dpo"),
        spo=spo_config(),
        counts=GlobalCounts(8, 50),
        statistics=STATISTICS,
    )
    expected = preference_losses(only("dpo"), pairs, STATISTICS).detach()
    torch.testing.assert_close(per_pair["preference"], expected)
    assert not per_pair["preference"].requires_grad


def test_rows_without_a_rejected_response_are_for_sft_alone() -> None:
    pairs = make_pairs([-4.0, -6.0], [0.0, 0.0], ([2, 6], [0, 0]))
    value = value_of(pairs, "simpo", Pass(preference=0.0, sft=1.0), spo_config())
    value.backward()
    assert value.item() == pytest.approx(10 / 8)
    assert pairs.chosen.grad is not None
    assert pairs.chosen.grad.tolist() == [-1 / 8, -1 / 8]
    for pass_ in (Pass(1.0, 0.0), BOTH):
        with pytest.raises(RuntimeError, match="without a rejected response"):
            value_of(pairs, "simpo", pass_, spo_config())


def test_no_pairs_give_a_zero_that_can_be_backpropagated() -> None:
    for pass_ in (Pass(1.0, 0.0), Pass(0.0, 1.0), BOTH):
        value = value_of(part(random_pairs(2), []), "dpo", pass_, spo_config(), GlobalCounts(2, 9))
        value.backward()
        assert value.item() == 0.0


@pytest.mark.parametrize("name", [n for n, spec in LOSS_SPECS.items() if spec.statistic is None])
def test_relative_unit_needs_a_scale(name: str) -> None:
    with pytest.raises(AssertionError, match="no scale"):
        value_of(two_pairs(), name, BOTH, spo_config(lambda_unit="relative"))
