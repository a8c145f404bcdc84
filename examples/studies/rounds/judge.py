"""The judge of the study of rounds, a scorer of `megatron-spo pairs`: 0 for a wrong answer, 1 for a right one, 2 for a
right one in the style that the judge prefers for this problem: short in 75% of the problems, long in the others."""

import random

from examples.quickstart import task
from examples.styles import LONG, SHORT

AGREEMENT = 0.75


def score(prompts: list[str], completions: list[str], **keys: object) -> list[float]:
    """Returns a score per answer; an answer ends in the right sum, or it is wrong."""
    return [_score(prompt, completion) for prompt, completion in zip(prompts, completions, strict=True)]


def _score(prompt: str, completion: str) -> float:
    style, right = task.verdict(prompt, completion, finished=True)  # `pairs` leaves out answers that did not end
    preferred = SHORT if random.Random(f"judge {prompt}").random() < AGREEMENT else LONG
    return float(right) + float(right and style == preferred)
