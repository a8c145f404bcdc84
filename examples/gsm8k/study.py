"""What the example runs: its sizes, its runs in their order, and the problems with their prompts."""

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from examples.common import PENALTY, StageFailed, read_jsonl
from megatron_spo.evaluate.scores import expected_answer

PROMPT = """Solve the problem in short lines, as in this example.

Problem: Tom has 3 boxes of 4 pens and gives away 5 pens. How many pens are left?
Solution: Tom has 3*4 = 12 pens.
He keeps 12-5 = 7 pens.
#### 7

Problem: {question}
Solution:"""
LOSSES = {
    "dpo": ("loss.name=dpo", "loss.beta=0.1"),
    "simpo": ("loss.name=simpo", "loss.beta=2.5", "loss.gamma_beta_ratio=0.3"),
    "alpha_dpo": ("loss.name=alpha_dpo", "loss.beta=2.5", "loss.gamma_beta_ratio=0.3", "loss.alpha=0.1"),
}
SCHEDULES = {
    "": ("spo.schedule=none",),
    "+spo": (*PENALTY, "spo.lambda=1"),
    "+spo-0.1": (*PENALTY, "spo.lambda=0.1"),
    "+dual": ("spo.schedule=dual", "spo.lambda_unit=relative", "spo.lambda=0.1"),
    "+pair": (*PENALTY, "spo.lambda=1", "spo.constraint=pair"),
}
CONTROL = "sft_on_chosen"
LADDER = ("1e-6", "2e-6", "5e-6")
"""Learning rates at which dpo and simpo alone are run, to find one that helps and one that collapses."""
RESULT = re.compile(r"\s*(####|A:)")
"""Start of the line of a solution that only has the result."""
SHORT_PROMPT = "Problem: {question}\nSolution:"
"""Prompt of a model that was trained on solutions first and so needs no example."""
OTHER_PROMPT = "{question} Answer with the result only."
CALCULATION = re.compile(r"<<.*?>>")
"""The calculator's notes in the solutions of GSM8K."""
COLLAPSES, HELPS = "5e-6", "1e-6"
SEEDS = (0, 1, 2)
MOST_LINES = 3
"""Lines of a problem's solution, the result not counted: a small model solves too few of the longer ones for pairs."""
LONGER = 2
"""The higher limit of tokens of an answer, in units of the usual one."""
SAMPLING_TEMPERATURE = 0.7
"""Temperature of the answers that the pairs are made of, and of the second test."""
SAMPLED = (CONTROL, "dpo", "dpo+spo")
"""Runs whose answers are also sampled (seed 0, at the learning rate that collapses), besides the base."""
TRACED = ("dpo", "simpo")
"""Runs that also answer problems during training (seed 0, at the learning rate that collapses)."""


@dataclass(frozen=True)
class Scale:
    """Sizes of the data and lengths of the training.

    Attributes:
        pair_problems: Training problems of which pairs may be made; SFT uses others.
        sampled_problems: The first of these, to which answers are sampled.
        samples: Answers per problem.
        per_problem: Largest number of pairs per problem.
        part: Problems per file of sampled answers; a finished file is not sampled again.
        pairs, held_out_pairs: Most pairs to train on, and pairs to evaluate on, of different problems.
        test_problems: Problems to solve after training.
        other_problems: Questions of another kind to answer after training.
        max_new_tokens: Most tokens of an answer.
        steps, batch, eval_every: Optimizer steps, pairs per step, and steps between evaluations.
        batch_size: Answers generated at a time.
        trace_every, traced: Steps between checkpoints that answer test problems during training; number of these
            problems, which are also answered with a higher limit of tokens after training.
        sft_batch: Solutions per step of the SFT before everything else, if it is asked for.
    """

    pair_problems: int = 400
    sampled_problems: int = 400
    samples: int = 5
    per_problem: int = 2
    part: int = 20
    pairs: int = 210
    held_out_pairs: int = 40
    test_problems: int = 200
    other_problems: int = 100
    max_new_tokens: int = 256
    steps: int = 24
    batch: int = 4
    eval_every: int = 12
    batch_size: int = 100
    trace_every: int = 6
    traced: int = 100
    sft_batch: int = 8


TINY = Scale(8, 8, 8, 2, 4, 8, 4, 6, 4, 16, 2, 2, 1, 32, 1, 4, 2)
"""Sizes that only test the code."""


@dataclass(frozen=True)
class Run:
    """One training: `name` is that of the method, `lr` the learning rate as written in the overrides."""

    name: str
    lr: str
    seed: int = 0

    @property
    def key(self) -> str:
        """Name of the result file."""
        return f"{self.name}-lr{self.lr}" + (f"-seed{self.seed}" if self.seed else "")

    @property
    def sampled(self) -> bool:
        """Whether answers are also sampled."""
        return self.name in SAMPLED and self.lr == COLLAPSES and self.seed == 0

    @property
    def traced(self) -> bool:
        """Whether checkpoints of the run also answer problems."""
        return self.name in TRACED and self.lr == COLLAPSES and self.seed == 0

    def overrides(self) -> list[str]:
        """Returns what this run adds to preference.yaml."""
        loss, mark, rest = self.name.partition("+")
        method = (*LOSSES[loss], *SCHEDULES[mark + rest]) if loss in LOSSES else ("spo.schedule=sft",)
        return [*method, f"optimizer.lr={self.lr}", f"training.seed={self.seed}"]


def all_runs() -> list[Run]:
    """Returns every run, the most informative first."""
    first = [CONTROL, "dpo", "dpo+spo", "simpo", "simpo+spo"]
    ladder = [Run(name, lr) for lr in reversed(LADDER) for name in ("dpo", "simpo")]
    more = [f"{loss}{schedule}" for schedule in ("+spo-0.1", "+dual") for loss in ("dpo", "simpo")]
    alpha = [f"alpha_dpo{schedule}" for schedule in ("", "+spo", "+spo-0.1", "+dual")]
    seeds = [Run(name, COLLAPSES, seed) for seed in SEEDS[1:] for name in first]
    runs = [
        *(Run(name, COLLAPSES) for name in first),
        *ladder,
        *(Run(name, HELPS) for name in first),
        *(Run(name, COLLAPSES) for name in ("dpo+pair", *more)),
        *seeds,
        *(Run(name, COLLAPSES) for name in alpha),
        *(Run(name, HELPS) for name in [*more, *alpha]),
        *(Run(name, HELPS, seed) for seed in SEEDS[1:] for name in first),
    ]
    return list(dict.fromkeys(runs))


class Problem(NamedTuple):
    """A problem, its right final answer, and its solution."""

    question: str
    right: str
    solution: str


def read_problems(path: Path) -> list[Problem]:
    """Returns every problem of a file with at most MOST_LINES, without repetitions.

    A row has `question` or `prompt`, and `answer`, `completion` or `chosen` as its solution.
    """
    if not path.is_file():
        raise StageFailed(f"{path} does not exist; see examples/gsm8k/README.md")
    found: dict[str, Problem] = {}
    for number, row in enumerate(read_jsonl(path), 1):
        question, right = row.get("question", row.get("prompt")), expected_answer(row)
        if not isinstance(question, str) or right is None:
            raise StageFailed(f"{path} line {number}: needs a text `question` or `prompt`, and a solution that ends in "
                              "a number, in `answer`, `completion` or `chosen`")  # fmt: skip
        solution = str(next(row[key] for key in ("answer", "completion", "chosen") if key in row))
        if len([line for line in solution.splitlines() if line.strip() and not RESULT.match(line)]) <= MOST_LINES:
            found.setdefault(question.strip(), Problem(question.strip(), right, CALCULATION.sub("", solution)))
    return list(found.values())


def draw(problems: Sequence[Problem], count: int, seed: int, what: str) -> list[Problem]:
    """Returns `count` different problems."""
    if len(problems) < count:
        raise StageFailed(f"{what}: {count} problems are needed, but the file has {len(problems)}")
    return random.Random(f"{what} {seed}").sample(sorted(problems), count)


def prompt_row(question: str, right: str, *, chat: bool, prompt: str = PROMPT) -> dict[str, Any]:
    """Returns a row for `generate`: a user message if the model has a chat template, else text."""
    asked = prompt.format(question=question)
    return {"prompt": [{"role": "user", "content": asked}] if chat else asked, "answer": right}


def solution_row(problem: Problem, *, chat: bool, prompt: str) -> dict[str, Any]:
    """Returns an SFT row: the prompt of `prompt_row`, and the solution in the same form."""
    asked = prompt_row(problem.question, problem.right, chat=chat, prompt=prompt)["prompt"]
    answer = problem.solution
    return {"prompt": asked, "completion": [{"role": "assistant", "content": answer}] if chat else f" {answer}"}


def other_questions(count: int, seed: int = 0) -> Iterator[tuple[str, str]]:
    """Yields (question, answer) of another kind than the training problems, half sums and half Python expressions."""
    rng = random.Random(f"other {seed}")
    for i in range(count):
        a, b, c = (rng.randint(2, 60) for _ in range(3))
        values = [rng.randint(0, 30) for _ in range(4)]
        expressions = [
            (f"sorted({values})[1]", sorted(values)[1]),
            (f"max({values}) - {c}", max(values) - c),
            (f"len({'ab' * (c % 5 + 1)!r}) + {a}", 2 * (c % 5 + 1) + a),
            (f"{values}[2]", values[2]),
        ]
        text, value = rng.choice(expressions)
        if i % 2:
            yield f"What is the value of the Python expression `{text}`?", str(value)
        else:
            yield f"What is {a} + {b} - {c}?", str(a + b - c)
