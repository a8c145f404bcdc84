"""Batches: the rows of batch k depend only on sizes, weights, seed, epoch and batch size."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_spo.data.packing import Sampler, batches_per_epoch, epoch_order, rows_per_epoch
from megatron_spo.errors import UserError

sources = st.lists(st.tuples(st.integers(1, 20), st.sampled_from([0.3, 0.5, 1.0, 1.7, 3.0])), min_size=1, max_size=3)


@given(sources, st.integers(0, 5), st.integers(0, 3), st.booleans())
@settings(deadline=None)
def test_an_epoch_holds_round_weight_times_size(
    parts: list[tuple[int, float]], seed: int, epoch: int, shuffle: bool
) -> None:
    sizes, weights = zip(*parts, strict=True)
    order = epoch_order(sizes, weights, seed=seed, epoch=epoch, shuffle=shuffle)
    starts = np.cumsum([0, *sizes])
    for i, (size, weight) in enumerate(parts):
        mine = order[(order >= starts[i]) & (order < starts[i + 1])] - starts[i]
        assert len(mine) == round(size * weight)
        counts = np.bincount(mine, minlength=size)
        assert set(counts.tolist()) <= {int(size * weight) // size, -(-round(size * weight) // size)}
    again = epoch_order(sizes, weights, seed=seed, epoch=epoch, shuffle=shuffle)
    assert order.tolist() == again.tolist()


def test_epochs_and_seeds_differ() -> None:
    orders = [epoch_order([50], [1.0], seed=seed, epoch=epoch) for seed in (0, 1) for epoch in (0, 1)]
    assert len({tuple(order.tolist()) for order in orders}) == 4
    assert epoch_order([5, 3], [1.0, 1.0], seed=0, epoch=7, shuffle=False).tolist() == list(range(8))


def test_every_step_can_be_asked_for_in_any_order() -> None:
    options: dict[str, Any] = {"seed": 3, "global_batch_size": 4}
    sampler, other = Sampler([10], [1.0], **options), Sampler([10], [1.0], **options)
    assert sampler.steps_per_epoch == 3
    forward = [sampler.indices_of_step(step).tolist() for step in range(9)]
    backward = [other.indices_of_step(step).tolist() for step in reversed(range(9))][::-1]
    assert forward == backward
    assert [len(batch) for batch in forward[:3]] == [4, 4, 2]
    assert sorted(sum(forward[3:6], [])) == list(range(10))


def test_the_last_batch_may_be_smaller() -> None:
    assert batches_per_epoch([10], [1.0], global_batch_size=4) == 3
    assert batches_per_epoch([3], [1.0], global_batch_size=4) == 1
    with pytest.raises(UserError, match="an epoch has no rows"):
        batches_per_epoch([3], [0.1], global_batch_size=4)
    assert rows_per_epoch([10, 3], [0.25, 2.0]) == [2, 6]
