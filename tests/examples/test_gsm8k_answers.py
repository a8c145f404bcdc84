"""The scores of GSM8K solutions, wrong ones included."""

from typing import Any

import pytest

from examples.studies.gsm8k_answers import Score, holds, score


@pytest.mark.parametrize(
    ("calculation", "result", "right"),
    [
        ("48/2", "24", True),
        ("2*1/2", "1.0", True),
        ("(3 + 4)*-2", "-14", True),
        ("+2", "2", True),
        ("10/3", "3.33", True),  # solutions round
        ("10/3", "3.4", False),
        ("48+24", "71", False),
        ("1/0", "0", False),
        ("2x", "4", False),
        ("x+1", "3", False),
        ("", "3", False),
        ("2**9**9**9", "1", False),  # never computed
        ("9" * 500 + "*2.0", "1", False),
        ("(" * 500 + "1" + ")" * 500, "1", False),
    ],
)
def test_calculations(calculation: str, result: str, right: bool) -> None:
    assert holds(calculation, result) is right


def test_scores() -> None:
    chosen = "48/2 = <<48/2=24>>24 clips\nA: 24"
    responses = {
        chosen: True,  # right
        "<<48/2=24>>24 and <<24+1=26>>26\nA: 26": True,  # well formed, with a wrong calculation
        "<<48/2=24>>24 and so": False,  # cut off, though 24 is its last number
        "there are none": True,  # no number, no calculation
    }
    rows = [{"chosen": chosen, "responses": [text], "finished": [ends]} for text, ends in responses.items()]
    repeated: Any = pytest.approx(1 / 15 / 4)  # "48 / 2 =" in the first solution, one of its 15 runs of 4 words
    assert score(rows) == Score(accuracy=0.25, malformed=0.5, calculations=1.0, hold=0.75, sound=0.25, rep_4=repeated)
