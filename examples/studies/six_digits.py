"""The quickstart's additions with numbers of six digits, whose answers are twice as long."""

from functools import partial

from examples.quickstart import task
from examples.quickstart.task import preference_pairs, score, sft_rows, write_model

__all__ = ["MAX_NEW_TOKENS", "draw_problems", "preference_pairs", "score", "sft_rows", "write_model"]

MAX_NEW_TOKENS = 76  # the longest right answer has 67 characters and the end-of-text token
draw_problems = partial(task.draw_problems, digits=6)
