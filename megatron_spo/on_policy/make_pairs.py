"""Implements `megatron-spo pairs`: from files of answers to a file of pairs and a summary."""

import json
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from tabulate import tabulate

from megatron_spo.data.json_lines import write_rows
from megatron_spo.errors import UserError
from megatron_spo.evaluate.answers import answer_rows
from megatron_spo.files import write_output
from megatron_spo.on_policy.answered import Answered, completion
from megatron_spo.on_policy.choice import NO_PAIR, NOT_USED, Choice, choose
from megatron_spo.on_policy.rules import PairRules
from megatron_spo.on_policy.scorers import score_all

REPLACED = ("responses", "finished", "chosen", "rejected", "completion", "messages")
"""Keys of a row of answers that its pairs do not keep."""


@dataclass
class Summary:
    """What became of the prompts and answers.

    Attributes:
        prompts, answers, pairs: Numbers of each.
        prompts_with_pairs: Number of prompts that gave at least one pair.
        without_pairs: Number of prompts by the reason why they gave none.
        not_used: Number of answers by the reason why they could not be in a pair.
        means: Means of the score of all answers (`score`), of score and length in characters of the chosen and the
            rejected ones (`score_chosen`, `characters_rejected`, ...), and of the answers that ended (`finished`).
    """

    prompts: int = 0
    answers: int = 0
    pairs: int = 0
    prompts_with_pairs: int = 0
    without_pairs: dict[str, int] = field(default_factory=dict)
    not_used: dict[str, int] = field(default_factory=dict)
    means: dict[str, float] = field(default_factory=dict)

    def table(self) -> str:
        """Returns the summary for the terminal."""
        share = f"{self.prompts_with_pairs / self.prompts:.1%}"
        lines = [
            ["pairs", self.pairs, ""],
            ["prompts with a pair", self.prompts_with_pairs, f"{share} of {self.prompts}"],
            *([f"without: {reason}", count, ""] for reason, count in self.without_pairs.items() if count),
            ["answers", self.answers, ""],
            *([f"not used: {reason}", count, ""] for reason, count in self.not_used.items() if count),
            *([f"mean of {name}", f"{value:.4g}", ""] for name, value in self.means.items()),
        ]
        return tabulate(lines, tablefmt="plain", disable_numparse=True, colalign=("left", "right", "left"))


def make_pairs(files: Sequence[Path], out: Path, rules: PairRules, summary_file: Path | None = None) -> Summary:
    """Scores the answers of files written by `generate`, and writes the chosen pairs in the format of `data.train`.

    Raises:
        UserError: a file, a row or the scorer is invalid, or no prompt gives a pair.
    """
    answered = [Answered(f"{file} line {line}", row) for file in files for line, row in answer_rows(file)]
    scores = score_all(answered, rules)
    choices = [
        choose(one.responses, one.row["finished"], of_row, rules, random.Random(f"{rules.seed} {i}"))
        for i, (one, of_row) in enumerate(zip(answered, scores, strict=True))
    ]
    chosen = zip(answered, choices, strict=True)
    rows = [pair for one, choice in chosen for pair in pairs_of(one, choice, rules.scorer)]
    summary = summarize(answered, scores, choices, rows)
    if summary_file is not None:
        write_output(summary_file, json.dumps(asdict(summary), indent=1) + "\n")
    if not rows:
        reasons = ", ".join(f"{reason} {count}" for reason, count in summary.without_pairs.items() if count)
        raise UserError(f"{', '.join(map(str, files))}: none of the {len(answered)} prompts gives a pair ({reasons}); "
                        "sample more answers, at a higher temperature, or loosen the options")  # fmt: skip
    write_rows(out, rows)
    return summary


def pairs_of(one: Answered, choice: Choice, scorer: str) -> list[dict[str, Any]]:
    """Returns the rows of a prompt's pairs: the keys of its row, both answers, their scores and sample numbers."""
    kept = {key: value for key, value in one.row.items() if key not in REPLACED}
    prompt, rows = one.row["prompt"], []
    for numbers in choice.pairs:
        row = dict(kept)
        for side, number in zip(("chosen", "rejected"), numbers, strict=True):
            row[side] = completion(prompt, one.responses[number])
            row[f"score_{side}"] = choice.scores[number]
            row[f"sample_{side}"] = number
        rows.append({**row, "scorer": scorer, "sampled_from": one.where})
    return rows


def summarize(
    answered: Sequence[Answered],
    scores: Sequence[Sequence[float]],
    choices: Sequence[Choice],
    rows: Sequence[dict[str, Any]],
) -> Summary:
    """Returns the summary of scores, choices and the rows made from them."""
    reasons = Counter(choice.reason for choice in choices)
    dropped = Counter(reason for choice in choices for reason in choice.not_used.values())
    means = {
        "score": fmean(score for of_row in scores for score in of_row),
        "finished": fmean(ended for one in answered for ended in one.row["finished"]),
    }
    for side in ("chosen", "rejected") if rows else ():
        texts = [row[side] if isinstance(row[side], str) else row[side][0]["content"] for row in rows]
        means[f"score_{side}"] = fmean(row[f"score_{side}"] for row in rows)
        means[f"characters_{side}"] = fmean(map(len, texts))
    return Summary(
        prompts=len(answered),
        answers=sum(map(len, scores)),
        pairs=len(rows),
        prompts_with_pairs=reasons[""],
        without_pairs={reason: reasons[reason] for reason in NO_PAIR},
        not_used={reason: dropped[reason] for reason in NOT_USED},
        means=means,
    )
