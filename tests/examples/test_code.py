"""The task of examples/studies/code: machine, formulas, both compilers and checker."""

import pytest

from examples.studies.code import task
from examples.studies.code.machine import Fault, run
from examples.studies.code.task import LEAVES, LONG, SHORT, Problem
from examples.styles import Score

XY = {"x": 7, "y": -4}
FORMULA = Problem("((x+3)*y)-(2*x)")
LONG_PROGRAM, SHORT_PROGRAM = "x3+Aay*B2x*Cbc-", "x3+y*2x*-"


@pytest.mark.parametrize(
    ("program", "output"),
    [
        ("5", 5),
        ("x", 7),
        ("xy-", 11),
        ("yx-", -11),
        ("xy*3+", -25),
        ("9xy+-", 6),
        ("xAaa*", 49),
        ("1A2Aa", 2),  # a register holds what was written last
        ("3DdXd", None),
        ("xA", None),  # nothing left
        ("xy", None),  # two left
        ("x+", None),
        ("+", None),
        ("xAb", None),  # b was never written
        ("A", None),
        ("x y", None),
        ("x/1", None),
        ("", None),
    ],
)
def test_machine(program: str, output: int | None) -> None:
    if output is None:
        with pytest.raises(Fault):
            run(program, XY)
    else:
        assert run(program, XY) == output


def test_a_fault_names_its_instruction() -> None:
    with pytest.raises(Fault, match=r"instruction 3, '\+': the stack is empty"):
        run("xA+", XY)
    with pytest.raises(Fault, match="instruction 2, 'b': unknown instruction, or a register that was not written"):
        run("xb", XY)
    with pytest.raises(Fault, match="leaves 2 values"):
        run("xy", XY)


@pytest.mark.parametrize(
    ("formula", "output"),
    [("x-y", 11), ("5-((x-y)*y)", 49), ("((x+3)*y)-(2*x)", -54), ("x*(y-((5-y)*7))", 7 * (-4 - 63))],
)
def test_values_of_formulas(formula: str, output: int) -> None:
    tree = task.parse(formula)
    assert task.value(tree, XY) == output
    assert task.text(tree) == f"({formula})"


def test_programs_of_both_styles() -> None:
    assert task.solution(FORMULA, LONG) == LONG_PROGRAM
    assert task.solution(FORMULA, SHORT) == SHORT_PROGRAM
    for problem in task.draw_problems([500], 0)[0]:
        for style in (LONG, SHORT):
            program = task.solution(problem, style)
            assert task.verdict(problem.prompt, program, True) == (style, True)
            assert len(program) < task.MAX_NEW_TOKENS
            assert set(problem.prompt + program) <= set(task.CHARACTERS)


def test_problems_are_all_different_and_follow_the_seed() -> None:
    first, second = task.draw_problems((300, 500), 1)
    assert (len(first), len(second), len({*first, *second})) == (300, 500, 800)
    assert task.draw_problems((300, 500), 1) == [first, second]
    assert task.draw_problems((300, 500), 2)[0] != first
    for problem in first:
        assert Problem.from_prompt(problem.prompt) == problem
        assert sum(character.isalnum() for character in problem.formula) == LEAVES
        assert {"x", "y"} <= set(problem.formula)
    assert {operator for problem in first for operator in problem.formula} >= set("+-*")


@pytest.mark.parametrize(
    ("program", "finished", "style", "right"),
    [
        (SHORT_PROGRAM, True, SHORT, True),
        (SHORT_PROGRAM, False, None, False),
        (LONG_PROGRAM, True, LONG, True),
        ("yx3+*x2*-", True, SHORT, True),  # operands of + and * swapped: only the outputs count
        ("x3+y*x-x-", True, SHORT, True),
        ("x3+Aay*2x*-", True, LONG, True),  # one register: right, but longer than necessary
        ("2x*x3+y*-", True, SHORT, False),  # the difference with the wrong sign
        ("x3+y*2x*+", True, SHORT, False),
        ("x3+Aay*B2x*Cac-", True, LONG, False),
        ("x3+y*2x*", True, None, False),
        ("((x+3)*y)-(2*x)", True, None, False),
        ("", True, None, False),
    ],
)
def test_verdict(program: str, finished: bool, style: str | None, right: bool) -> None:
    assert task.verdict(FORMULA.prompt, program, finished) == (style, right)


def test_every_hidden_input_counts() -> None:
    """17+y equals x+y only for the first of the hidden inputs."""
    assert task.HIDDEN[0]["x"] == 17 and run("98+y+", task.HIDDEN[0]) == run("xy+", task.HIDDEN[0])
    assert task.verdict("(x+y)+(x-x)=", "98+y+", True) == (SHORT, False)
    assert task.verdict("(x+y)+(x-x)=", "xy+", True) == (SHORT, True)


def test_pairs_and_scores() -> None:
    responses = ["x", LONG_PROGRAM, "x3+y*2x*+", SHORT_PROGRAM]
    row = {"prompt": FORMULA.prompt, "responses": responses, "finished": [True] * 4}
    pair = {"prompt": FORMULA.prompt, "chosen": SHORT_PROGRAM, "rejected": LONG_PROGRAM}
    assert task.preference_pairs([row], 9, 1.0, 0) == [pair]
    assert task.preference_pairs([row], 9, 0.0, 0) == [{**pair, "chosen": LONG_PROGRAM, "rejected": SHORT_PROGRAM}]
    assert task.preference_pairs([{**row, "finished": [True, True, True, False]}], 9, 1.0, 0) == []
    assert task.score([row]) == Score(accuracy=0.5, malformed=0.0, preferred=0.75, win=0.25)
    assert task.score([{**row, "finished": [False] * 4}]) == Score(0.0, 1.0, 0.0, 0.0)
