import numpy as np
import pytest

from megatron_spo.evaluate.scores import (
    difference,
    distinct,
    estimate,
    expected_answer,
    final_answer,
    is_match,
    reference_text,
    repeated,
    score,
    score_answer,
    split_words,
)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("first 3, then 7-5 = 2", "2"),
        ("7-5", "5"),
        ("it is (3)-4", "4"),
        ("x is -5.", "-5"),
        ("it costs $1,200.50.", "$1,200.50"),
        ("costs .5", ".5"),
        ("12,345,678 cats", "12,345,678"),
        ("1,23", "23"),
        ("12 eggs\n#### 1,234\nand 5", "1,234"),
        ("#### 3 but \\boxed{4}", "4"),
        ("\\boxed{\\frac{3}{4}} done 9", "\\frac{3}{4}"),
        ("\\boxed{4", "4"),
        ("none", None),
        ("", None),
    ],
)
def test_final_answer(text: str, answer: str | None) -> None:
    assert final_answer(text) == answer


@pytest.mark.parametrize(
    ("text", "expected", "match"),
    [
        ("It is $18.00", "18", True),
        ("#### 1,234", "1234", True),
        ("minus: −4", "-4", True),
        ("it is 18 or 19", "18", False),
        ("nothing", "18", False),
        ("paris.", "Paris", True),
        ("of course #### Paris", "Paris", True),
        ("Paris or Rome", "Paris", False),
        ("so \\boxed{ \\frac{1}{2} }", "\\frac{1}{2}", True),
    ],
)
def test_match(text: str, expected: str, match: bool) -> None:
    assert is_match(text, expected) is match


def test_what_a_row_expects() -> None:
    assert expected_answer({"answer": "6*3=18 so\n#### 18"}) == "18"
    assert expected_answer({"answer": 18}) == "18"
    assert expected_answer({"answer": "Paris", "chosen": "#### 3"}) == "Paris"
    assert expected_answer({"chosen": "12+30=42"}) == "42"
    assert expected_answer({"chosen": [{"role": "assistant", "content": "The answer is 42."}]}) == "42"
    assert expected_answer({"chosen": "There are 42 apples"}) is None  # a number in passing is no answer
    assert expected_answer({"prompt": "1+1="}) is None
    assert reference_text({"answer": "18", "prompt": "p"}) is None
    assert reference_text({"answer": "6*3 #### 18"}) == "6*3 #### 18"


def test_words_repetition_and_variety() -> None:
    assert split_words("Don't stop: 12+30 中文") == ["Don", "'", "t", "stop", ":", "12", "+", "30", "中", "文"]
    assert repeated("a b c", 4) == 0
    assert repeated("a a a a a a", 4) == pytest.approx(2 / 3)
    assert repeated("a b c d a b c d", 4) == pytest.approx(1 / 5)
    assert distinct(["a b", "a b c"], 2) == pytest.approx(2 / 3)
    assert distinct(["", "a"], 2) == 0


def test_malformed() -> None:
    assert score_answer("it is 4", True, "5", None).malformed is False  # wrong is not malformed
    assert score_answer("it is four", True, "5", None).malformed
    assert score_answer("it is 5", False, "5", None).malformed
    assert score_answer("in Rome", True, "Paris", None).malformed is False
    assert score_answer("  ", True, None, None).malformed


def test_means_are_over_answers_and_bootstraps_over_rows() -> None:
    rows = [{"chosen": "1 + 1 = 2"}, {"chosen": "so 3"}, {"prompt": "say hi"}]
    scores = score(rows, [["2", "3"], ["a b c d e f 3", "3"], ["hi", "hi"]], [[True, False]] * 3)
    assert scores.exact_match == 0.75 and scores.malformed == 0.5
    assert scores.length_ratio == pytest.approx((1 / 5 + 1 / 5 + 7 / 2 + 1 / 2) / 4)
    of_rows = scores.of_rows("exact_match")
    assert of_rows[:2].tolist() == [0.5, 1.0] and np.isnan(of_rows[2])
    assert "answers" not in scores.metrics() and scores.metrics()["malformed"] == 0.5
    assert score([{"prompt": "p"}], [["hi"]], [[True]]).exact_match is None
    with pytest.raises(ValueError, match="no answer"):
        score([], [], [])


def test_intervals_cover_the_truth_as_often_as_they_say() -> None:
    rng = np.random.default_rng(0)
    hits = sum(
        found.low <= 0.3 <= found.high
        for seed in range(200)
        if (found := estimate((rng.random(150) < 0.3).astype(float), seed=seed))
    )
    assert 180 <= hits <= 198  # 95% of 200, give or take


def test_pairing_takes_the_rows_own_difficulty_out() -> None:
    rng = np.random.default_rng(1)
    difficulty = rng.normal(size=100)
    one, other = difficulty + 0.1 + 0.01 * rng.normal(size=100), difficulty
    other[3] = np.nan
    found = difference(one, other)
    assert found is not None and found.rows == 99
    assert 0.09 < found.low < found.value < found.high < 0.11
    assert found == difference(one, other)
    assert estimate(np.array([np.nan])) is None
