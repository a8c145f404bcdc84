"""The tasks of the scored studies, by name, and how much data each needs."""

from examples.quickstart import task
from examples.quickstart.run import Scale
from examples.studies import six_digits
from examples.studies.code import task as programs
from examples.styles import Task

TASKS: dict[str, tuple[Task, Scale]] = {
    "sums": (task, Scale()),
    "six-digits": (six_digits, Scale(sft_problems=600, sft_steps=1000)),
    "programs": (programs, Scale(pair_problems=1200, held_out_problems=240)),  # two of three give a pair
}
