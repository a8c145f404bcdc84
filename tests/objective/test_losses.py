"""Each loss, compared with values by hand and finite differences, and for extreme inputs."""

import inspect

import pytest
import torch

from megatron_spo.config.losses import LOSS_SPECS
from megatron_spo.objective.losses import (
    LOSSES,
    TRACKED,
    PairLogprobs,
    preference_losses,
    rewards,
    statistic_values,
)
from megatron_spo.objective.statistics import STD_FLOOR, LossStatistics
from tests.objective.samples import STATISTICS, defaults, make_pairs, only, random_pairs

# p_w = -4, p_l = -9 over 2 and 3 tokens, r_w = -5, r_l = -8: log-ratios 1 and -1, h = 2, per token .5 and
# -1/3.
GOLDEN = [
    ("dpo", {"beta": 0.5}, 0.3132616875),
    ("dpo", {"beta": 0.5, "label_smoothing": 0.1}, 0.4132616875),
    ("robust", {"beta": 0.5, "label_smoothing": 0.1}, 0.1882616875),
    ("ipo", {"beta": 0.5}, 0.0277777778),
    ("ipo", {"beta": 0.25, "average": False}, 0.0),
    ("hinge", {"beta": 0.25}, 0.5),
    ("simpo", {"beta": 2.0, "gamma_beta_ratio": 0.25}, 0.2014132780),
    ("alpha_dpo", {"beta": 2.0, "gamma_beta_ratio": 0.25, "alpha": 0.2}, 0.3223361894),
    ("cpo", {"beta": 0.1, "nll_weight": 0.5}, 1.4740769842),
    ("orpo", {"beta": 0.5}, 2.1443753922),
    ("dpop", {"beta": 0.5, "penalty": 2.0}, 0.3132616875),
    ("exo_pair", {"beta": 0.5, "label_smoothing": 0.1}, 0.1140821077),
    ("nca_pair", {"beta": 0.5}, 1.1981539684),
    ("apo_zero", {"beta": 0.5}, 0.7550813376),
    ("apo_down", {"beta": 0.5}, 0.8914007525),
    ("sppo_hard", {"beta": 0.25}, 2.0),
    ("discopop", {"beta": 0.5, "discopop_tau": 0.5}, 0.3613688453),
    ("bco_pair", {"beta": 0.5}, 0.9481539684),
]


def test_registry_and_specs_agree() -> None:
    assert LOSSES.keys() == LOSS_SPECS.keys()
    for name, function in LOSSES.items():
        keywords = set(inspect.signature(function).parameters) - {"pairs", "statistics"}
        assert keywords == set(LOSS_SPECS[name].parameters), name
        assert ("statistics" in inspect.signature(function).parameters) == (name in TRACKED)


@pytest.mark.parametrize(("name", "parameters", "expected"), GOLDEN)
def test_golden(name: str, parameters: dict[str, float], expected: float) -> None:
    pairs = make_pairs([-4.0], [-9.0], ([2], [3]), ([-5.0], [-8.0]))
    # Two pairs with values 1/2 -+ 1/8 sqrt(2): mean .5, deviation .25, so z = (5/6 - 1/2) / (1/4) = 4/3.
    statistics = LossStatistics().update(total=1.0, total_of_squares=0.5625, count=2)
    value = preference_losses(only(name, defaults(name, **parameters)), pairs, statistics)
    assert value.tolist() == pytest.approx([expected], abs=1e-9)


def test_dpop_penalises_only_a_fallen_chosen() -> None:
    fallen = make_pairs([-6.0], [-9.0], ([2], [3]), ([-5.0], [-8.0]))  # h = 0, r_w - p_w = 1, penalty 2
    assert LOSSES["dpop"](fallen, beta=0.5, penalty=2.0).item() == pytest.approx(1.3132616875)


@pytest.mark.parametrize("name", ["dpo", "robust", "exo_pair", "discopop", "dpop"])
def test_at_the_reference_nothing_is_preferred(name: str) -> None:
    pairs = make_pairs([-3.0], [-7.0], ([2], [3]), ([-3.0], [-7.0]))
    expected = {"exo_pair": 2.7612307, "discopop": 0.8465736}.get(name, 0.6931472)
    value = preference_losses(only(name), pairs, STATISTICS)
    assert value.item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_gradients(name: str) -> None:
    pairs = random_pairs(6)

    def value(chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
        moved = PairLogprobs(
            chosen,
            rejected,
            pairs.chosen_tokens,
            pairs.rejected_tokens,
            pairs.reference_chosen,
            pairs.reference_rejected,
        )
        if name in TRACKED:  # its margin is a constant to the gradient, so it must not move with the inputs here
            frozen = defaults(name, alpha=0.0)
            return preference_losses(only(name, frozen), moved, STATISTICS)
        return preference_losses(only(name), moved, STATISTICS)

    assert torch.autograd.gradcheck(value, (pairs.chosen, pairs.rejected))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("tokens", [1, 500])
@pytest.mark.parametrize("name", LOSSES)
def test_extreme_inputs_stay_finite(name: str, tokens: int, dtype: torch.dtype) -> None:
    ends = [0.0, -1e-7, -1.0, -1e4]
    grid = torch.cartesian_prod(*[torch.tensor(ends, dtype=dtype)] * 4)
    sizes = [tokens] * len(grid)
    reference = (grid[:, 2].tolist(), grid[:, 3].tolist())
    pairs = make_pairs(grid[:, 0], grid[:, 1], (sizes, sizes), reference, dtype)
    statistics = LossStatistics().update(0.0, 0.0, 8)
    value = preference_losses(only(name), pairs, statistics)
    value.sum().backward()
    for tensor in (value.detach(), pairs.chosen.grad, pairs.rejected.grad):
        assert tensor is not None
        assert tensor.isfinite().all()


@pytest.mark.parametrize("name", [n for n, spec in LOSS_SPECS.items() if not spec.needs_reference])
def test_reference_free_losses_take_none(name: str) -> None:
    pairs = make_pairs([-4.0], [-9.0], ([2], [3]))
    assert preference_losses(only(name), pairs, STATISTICS).isfinite().all()
    chosen, rejected = rewards(only(name, {"beta": 2.0}), pairs)
    assert (chosen.item(), rejected.item()) == (-4.0, -6.0)
    assert not chosen.requires_grad


@pytest.mark.parametrize("name", [n for n, spec in LOSS_SPECS.items() if spec.needs_reference])
def test_other_losses_say_what_is_missing(name: str) -> None:
    with pytest.raises(ValueError, match="reference"):
        preference_losses(only(name), make_pairs([-4.0], [-9.0], ([2], [3])), STATISTICS)


def test_rewards_with_reference() -> None:
    pairs = make_pairs([-4.0], [-9.0], ([2], [3]), ([-5.0], [-8.0]))
    chosen, rejected = rewards(only("dpo", {"beta": 0.5}), pairs)
    assert (chosen.item(), rejected.item()) == (0.5, -0.5)


def test_statistics_are_corrected_averages_of_batches() -> None:
    batches = torch.tensor([[0.1, 0.4, 0.1, 0.2], [1.0, 0.5, 0.25, 1.25], [-1.0, 2.0, 0.0, 3.0]]).double()
    statistics = LossStatistics()
    assert statistics.standardise(batches[0]).tolist() == [0.0] * 4
    for batch in batches:
        statistics = statistics.update(batch.sum().item(), batch.square().sum().item(), len(batch))
    weights = torch.tensor([0.81, 0.9, 1.0]).double()
    weights /= weights.sum()
    assert statistics.mean == pytest.approx((weights @ batches.mean(1)).item())
    assert statistics.std == pytest.approx((weights @ batches.std(1)).item())
    assert LossStatistics.from_dict(statistics.to_dict()) == statistics


def test_statistics_floor_the_spread() -> None:
    statistics = LossStatistics().update(0.0, 0.0, 16)  # the step at which the policy is the reference
    assert statistics.standardise(torch.tensor([STD_FLOOR])).item() == pytest.approx(1.0)


def test_only_tracked_losses_have_statistics() -> None:
    pairs = random_pairs(3)
    values = statistic_values(only("alpha_dpo"), pairs)
    assert values is not None
    assert not values.requires_grad
    gap = pairs.chosen_mean - pairs.rejected_mean
    assert pairs.reference_chosen is not None
    assert pairs.reference_rejected is not None
    gap = gap - pairs.reference_chosen / pairs.chosen_tokens + pairs.reference_rejected / pairs.rejected_tokens
    torch.testing.assert_close(values, gap.detach())
    assert statistic_values(only("dpo"), pairs) is None
