import pytest

from examples.quickstart import task
from examples.quickstart.task import LONG, SHORT, Problem
from examples.studies import six_digits


def style(row: dict, side: str) -> str | None:
    return task.verdict(row["prompt"], row[side], True)[0]


def test_worked_answers_add_up() -> None:
    assert task.solution(Problem(78, 345), LONG) == "8+5+0=3c1;7+4+1=2c1;0+3+1=4c0>423"
    assert task.solution(Problem(78, 345), SHORT) == "850=3c1;741=2c1;031=4c0>423"
    assert task.solution(Problem(999, 1), SHORT) == "910=0c1;901=0c1;901=0c1>1000"
    longest = max(len(task.solution(problem, LONG)) for problem in task.draw_problems([500], 0)[0])
    assert longest < task.MAX_NEW_TOKENS


def test_problems_are_all_different_and_follow_the_seed() -> None:
    first, second = task.draw_problems((300, 500), 1)
    assert len({*first, *second}) == 800
    assert task.draw_problems((300, 500), 1) == [first, second]
    assert task.draw_problems((300, 500), 2)[0] != first
    assert all(Problem.from_prompt(problem.prompt) == problem for problem in first)


def test_numbers_of_more_digits() -> None:
    (problems,) = six_digits.draw_problems([300], 0)
    assert Problem.from_prompt("000078+999345=") == Problem(78, 999_345, 6)
    assert len({problem.prompt for problem in problems}) == 300 and {len(p.prompt) for p in problems} == {14}
    rows = six_digits.sft_rows(problems)
    assert {task.verdict(row["prompt"], row["completion"], True) for row in rows} == {(LONG, True), (SHORT, True)}
    assert max(len(row["completion"]) for row in rows) < six_digits.MAX_NEW_TOKENS
    three = task.solution(Problem(78, 345), SHORT)
    assert task.verdict("000078+000345=", three, True) == (None, True)


def test_sft_rows_are_60_to_40() -> None:
    rows = task.sft_rows(task.draw_problems([10], 0)[0])
    styles = [style(row, "completion") for row in rows]
    assert styles.count(LONG) == 30 and styles.count(SHORT) == 20


@pytest.mark.parametrize(
    ("response", "finished", "style", "right"),
    [
        ("8+5+0=3c1;7+4+1=2c1;0+3+1=4c0>423", True, LONG, True),
        ("850=3c1;741=2c1;031=4c0>423", True, SHORT, True),
        ("850=3c1;741=2c1;031=4c0>424", True, SHORT, False),
        ("850=3c1;741=2c1;031=4c0>423", False, None, False),
        ("850=3c1;7+4+1=2c1;031=4c0>423", True, None, True),  # mixed styles: malformed, yet right
        ("850=3c1;741=2c1>423", True, None, True),
        ("850=3c1;741=2c1;031=4c0>1423", True, SHORT, False),
        ("", True, None, False),
    ],
)
def test_style_and_rightness(response: str, finished: bool, style: str | None, right: bool) -> None:
    assert task.style_of(Problem(78, 345), response, finished) == style
    assert task.is_right(Problem(78, 345), response, finished) == right


def sampled(problem: Problem, *responses: str) -> dict:
    return {"prompt": problem.prompt, "responses": list(responses), "finished": [True] * len(responses)}


def test_pairs_are_right_in_both_styles_and_judged_with_noise() -> None:
    problems = task.draw_problems([2000], 0)[0]
    rows = [sampled(p, "junk", task.solution(p, LONG), task.solution(p, SHORT)) for p in problems]
    pairs = task.preference_pairs(rows, 1500, 0.75, seed=3)
    assert len(pairs) == 1500 == len({pair["prompt"] for pair in pairs})
    for pair in pairs:
        assert {style(pair, side) for side in ("chosen", "rejected")} == {LONG, SHORT}
    short = sum(style(pair, "chosen") == SHORT for pair in pairs) / len(pairs)
    assert abs(short - 0.75) < 0.05
    assert task.preference_pairs(rows, 1500, 0.75, seed=3) == pairs


def test_problems_without_both_styles_right_give_no_pair() -> None:
    problem = Problem(78, 345)
    wrong_short = task.solution(problem, SHORT).replace("423", "424")
    assert task.preference_pairs([sampled(problem, task.solution(problem, LONG), wrong_short)], 9, 1.0, 0) == []


def test_score() -> None:
    problem = Problem(78, 345)
    right_short, right_long = task.solution(problem, SHORT), task.solution(problem, LONG)
    rows = [sampled(problem, right_short, right_long), sampled(problem, right_short.replace("423", "1"), "?")]
    score = task.score(rows)
    assert (score.accuracy, score.malformed, score.preferred, score.win) == (0.5, 0.25, 0.5, 0.25)
