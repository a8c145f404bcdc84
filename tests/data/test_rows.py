"""Packed rows give the same scores as separate sequences."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_spo.data.packing import pair_costs, plan_rows
from megatron_spo.data.rows import Example, PackedRow, build_row


def make_example(prompt: list[int], chosen: list[int], rejected: list[int]) -> Example:
    left, right = prompt + chosen, prompt + rejected if rejected else []
    shared = 0
    while shared < min(len(left), len(right)) and left[shared] == right[shared]:
        shared += 1
    if not rejected:
        shared = len(left)
    return Example(np.array(left, np.int32), np.array(right, np.int32), len(prompt), shared)


tokens = st.integers(0, 3)  # few tokens, so that answers often begin alike or one is the start of the other
answers = st.lists(tokens, min_size=1, max_size=7)


@st.composite
def examples(draw: st.DrawFn) -> Example:
    prompt, chosen = draw(st.lists(tokens, min_size=1, max_size=6)), draw(answers)
    rejected = draw(st.one_of(st.just([]), answers.filter(lambda answer: answer != chosen)))
    return make_example(prompt, chosen, rejected)


def sequences(example: Example) -> list[np.ndarray]:
    return [example.chosen_ids, example.rejected_ids]


def visible(row: PackedRow, at: int) -> list[int]:
    """Returns the row positions that the token at position `at` attends to, itself included, in order."""
    start, shared, chosen, _ = next(s for s in row.segments[::-1] if s[0] <= at)
    first_rejected = start + shared + chosen
    own = range(start, min(at + 1, first_rejected))
    if at < first_rejected:
        return list(own)
    return [*range(start, start + shared), *range(first_rejected, at + 1)]


def log_prob(context: np.ndarray, target: int) -> float:
    """Stands for a model: the result depends on the whole context and on the target."""
    return -(1.0 + (hash((tuple(context.tolist()), target)) % 1000) / 1000.0)


@given(st.lists(examples(), max_size=5), st.sampled_from([1, 2, 8]))
@settings(deadline=None)
def test_row_scores_equal_one_by_one(batch: list[Example], multiple: int) -> None:
    row = build_row([(10 + i, example) for i, example in enumerate(batch)], multiple=multiple, pad_id=9)
    assert len(row.tokens) % multiple == 0 and len(row.tokens) >= 1
    assert row.pairs.tolist() == [10 + i for i in range(len(batch))]
    assert row.real_tokens == row.segments[:, 1:].sum()
    assert (row.tokens[row.real_tokens :] == 9).all()
    assert row.positions[row.real_tokens :].tolist() == list(range(len(row.tokens) - row.real_tokens))
    assert len(set(zip(row.predict_at.tolist(), row.targets.tolist(), strict=True))) == len(row.targets)

    entries = []
    for at, target in zip(row.predict_at.tolist(), row.targets.tolist(), strict=True):
        seen = visible(row, at)
        assert row.positions[seen].tolist() == list(range(len(seen)))  # every sequence counts from 0
        entries.append(log_prob(row.tokens[seen], target))
    scores = np.array(entries)[row.score_index]
    bounds = np.cumsum([0, *row.score_lengths])
    got = [scores[a:b].sum() for a, b in zip(bounds[:-1], bounds[1:], strict=True)]

    wanted = [
        sum(log_prob(ids[:t], int(ids[t])) for t in range(example.prompt_length, len(ids)))
        for example in batch
        for ids in sequences(example)
    ]
    np.testing.assert_allclose(got, wanted)
    assert row.chosen_tokens.tolist() == [len(e.chosen_ids) - e.prompt_length for e in batch]
    assert row.rejected_tokens.tolist() == [max(len(e.rejected_ids) - e.prompt_length, 0) for e in batch]


@given(examples())
@settings(deadline=None)
def test_row_holds_both_sequences(example: Example) -> None:
    row = build_row([(0, example)], multiple=1)
    _, shared, chosen, rejected = row.segments[0].tolist()
    left = row.tokens[: shared + chosen]
    assert left.tolist() == example.chosen_ids.tolist()
    if len(example.rejected_ids):
        right = np.concatenate([row.tokens[:shared], row.tokens[shared + chosen :]])
        assert right.tolist() == example.rejected_ids.tolist()
    else:
        assert rejected == 0


def test_a_row_by_hand() -> None:
    row = build_row([(7, make_example([5, 6], [1, 2], [1, 3, 4]))], multiple=4)
    assert row.tokens.tolist() == [5, 6, 1, 2, 3, 4, 0, 0]
    assert row.positions.tolist() == [0, 1, 2, 3, 3, 4, 0, 1]
    assert row.segments.tolist() == [[0, 3, 1, 2]]
    assert row.predict_at.tolist() == [1, 2, 2, 4]
    assert row.targets.tolist() == [1, 2, 3, 4]
    assert row.score_index.tolist() == [0, 1, 0, 2, 3]
    assert row.score_lengths.tolist() == [2, 3]


def test_an_empty_row() -> None:
    row = build_row([], multiple=4)
    assert row.tokens.tolist() == [0] * 4 and row.real_tokens == 0
    assert row.segments.shape == (0, 4) and len(row.predict_at) == len(row.score_index) == len(row.pairs) == 0


sizes = st.lists(st.integers(1, 50), max_size=40)


@given(sizes, st.integers(1, 5), st.integers(50, 120))
@settings(deadline=None)
def test_every_pair_is_planned_once(tokens: list[int], ranks: int, row_length: int) -> None:
    plan = plan_rows(np.array(tokens, dtype=np.int64), row_length=row_length, ranks=ranks)
    assert sorted(i for rank in plan for row in rank for i in row) == list(range(len(tokens)))
    assert len(plan) == ranks and len({len(rank) for rank in plan}) == 1 and len(plan[0]) >= 1
    assert all(sum(tokens[i] for i in row) <= row_length for rank in plan for row in rank)
    # no two rows of a best-fit packing could be one: all but one are more than half full on average
    assert len(plan[0]) <= -(-(2 * sum(tokens) // row_length + 1) // ranks)


def test_plan_is_balanced_and_minimal() -> None:
    generator = np.random.default_rng(0)
    tokens = generator.lognormal(5.5, 0.6, 256).astype(int).clip(20, 4096)
    plan = plan_rows(tokens, row_length=4096, ranks=4)
    loads = [tokens[[i for row in rank for i in row]].sum() for rank in plan]
    assert max(loads) / min(loads) < 1.02
    assert len(plan[0]) == -(-tokens.sum() // 4096 // 4)
    fixed = plan_rows([10, 10, 10, 10], [4.0, 1.0, 1.0, 2.0], row_length=100, ranks=2)
    assert sorted(sorted(i for row in rank for i in row) for rank in fixed) == [[0], [1, 2, 3]]


@pytest.mark.parametrize("medians", [(400, 40), (100, 200), (60, 120)])
@pytest.mark.parametrize(("pairs", "ranks"), [(64, 2), (256, 1), (512, 16)])
def test_ranks_and_rows_cost_alike(medians: tuple[int, int], pairs: int, ranks: int) -> None:
    """Ranks wait for the slowest rank, pipeline stages for the most expensive row."""
    generator = np.random.default_rng(0)
    prompt, response = medians
    parts = [(generator.lognormal(0, 0.5, pairs) * median).astype(int) + 1 for median in (prompt, response, response)]
    tokens = np.sum(parts, axis=0)
    costs = pair_costs(tokens)
    plan = plan_rows(tokens, row_length=4096, ranks=ranks)
    of_rows = np.array([[costs[row].sum() for row in rank] for rank in plan])
    assert of_rows.sum(1).max() / of_rows.sum(1).mean() < 1.03
    assert of_rows.max() / of_rows.mean() < 1.08
    rows = -(-int(tokens.sum()) // 4096)
    assert of_rows.size <= -(-(rows + 1) // ranks) * ranks  # one row more than fits without any gap


def test_whole_rows_move_where_balance_would_cost_a_row() -> None:
    # by cost alone one rank would get 60 + 30 + 30 and need two rows
    filled = plan_rows([60, 60, 60], row_length=100, ranks=1, rows_multiple=2)
    assert [len(row) for row in filled[0]] == [1, 1, 1, 0]
    plan = plan_rows([60, 60, 40, 40], [1.0, 2.0, 3.0, 5.9], row_length=100, ranks=2)
    assert [len(rank) for rank in plan] == [1, 1]
    assert plan_rows([], row_length=10, ranks=2) == [[[]], [[]]]
    with pytest.raises(ValueError, match="does not fit"):
        plan_rows([11], row_length=10, ranks=1)
