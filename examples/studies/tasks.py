"""The tasks of the scored studies by name, with the size of their data and the way their answers are scored."""

from collections.abc import Sequence
from typing import Any, Protocol

from examples.quickstart import task
from examples.quickstart.run import Scale
from examples.studies import gsm8k_answers, six_digits
from examples.studies.code import task as programs
from examples.styles import Task

TASKS: dict[str, tuple[Task, Scale]] = {
    "sums": (task, Scale()),
    "six-digits": (six_digits, Scale(sft_problems=600, sft_steps=1000)),
    "programs": (programs, Scale(pair_problems=1200, held_out_problems=240)),  # two thirds of the problems give a pair
    "programs-2400": (programs, Scale(pair_problems=4400, held_out_problems=240, pairs=2400, test_problems=500)),
}


class Scored(Protocol):
    """How answers are sampled and scored, as a module; `score` returns a dataclass of numbers."""

    MAX_NEW_TOKENS: int

    def score(self, generated: Sequence[dict[str, Any]]) -> Any: ...


SCORED: dict[str, Scored] = {name: task for name, (task, _) in TASKS.items()} | {"gsm8k": gsm8k_answers}
