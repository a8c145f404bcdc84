"""`megatron-spo evaluate`: scores answers, or a model on pairs or tasks. `--help` imports no libraries."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_spo.errors import UserError
from megatron_spo.files import check_output, write_output

if TYPE_CHECKING:
    from megatron_spo.evaluate.answers import Answers

MODES = {
    "ANSWERS": {"answers", "alpaca_eval", "generator", "reward_model", "scores", "batch_size"},
    "--pairs": {"model", "pairs", "reference", "batch_size", "max_length", "truncation", "bad_rows"},
    "--tasks": {"model", "tasks", "batch_size"},
}
"""Modes and the options that each allows, besides `--out`."""
BATCH_SIZE = 8


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the command. Options that are not given are None."""
    parser.add_argument("answers", metavar="ANSWERS.jsonl", nargs="*", default=[], type=Path, help="output of "
                        "`generate`; two files with the same prompts: also the paired difference, second minus "
                        "first")  # fmt: skip
    parser.add_argument("--out", type=Path, help="JSON file to write all results to")
    parser.add_argument(
        "--alpaca-eval", type=Path, metavar="FILE", help="file to write the answers to in AlpacaEval's format"
    )
    parser.add_argument("--generator", help="model name in the AlpacaEval file [FOLDER/NAME of ANSWERS.jsonl]")
    parser.add_argument("--reward-model", type=Path, metavar="FOLDER", help="score the answers with a reward model, a "
                        "Hugging Face sequence classifier; two files: also the win rate of the second")  # fmt: skip
    parser.add_argument("--scores", type=Path, nargs="+", metavar="SCORES.jsonl", help="scores of a judge instead: one "
                        "file for each file of answers, with a list `scores` in each row")  # fmt: skip
    model = parser.add_argument_group("evaluation of a model instead of answers")
    model.add_argument("--model", type=Path, help="model folder in Hugging Face format")
    model.add_argument("--pairs", metavar="DATA", help="preference pairs to rank: file or hub id, as in data.train")
    model.add_argument(
        "--reference", type=Path, help="reference model folder in Hugging Face format; adds implicit rewards"
    )
    model.add_argument("--max-length", type=int, help="as data.max_length [2048, or the context length of the model]")
    model.add_argument("--truncation", choices=["error", "drop", "left", "right"], help="as data.truncation [error]")
    model.add_argument("--bad-rows", choices=["error", "drop"], help="as data.bad_rows [error]")
    model.add_argument("--tasks", nargs="+", metavar="TASK", help="lm-evaluation-harness tasks to run: names or YAML "
                       "files (requires the extra `eval`)")  # fmt: skip
    model.add_argument("--batch-size", type=int, help=f"sequences per batch [{BATCH_SIZE}]")


def run(options: argparse.Namespace) -> None:
    """Evaluates, prints a table, and writes the results.

    Raises:
        UserError: options, answers, model or data are invalid.
    """
    mode = _mode(options)
    if options.batch_size is not None and options.batch_size < 1:
        raise UserError(f"evaluate: --batch-size is {options.batch_size}; must be at least 1")
    for path in (options.out, options.alpaca_eval):
        if path is not None:
            check_output(path)
    shown, found = {"ANSWERS": _answers, "--pairs": _pairs, "--tasks": _tasks}[mode](options)
    if options.out:
        _write(options.out, found)
    print(shown)


def _mode(options: argparse.Namespace) -> str:
    given = {name for names in MODES.values() for name in names if getattr(options, name) not in (None, [])}
    modes = [mode for mode in MODES if mode.removeprefix("--").lower() in given]
    if len(modes) != 1:
        raise UserError("evaluate: give exactly one of ANSWERS.jsonl, --model with --pairs, or --model with --tasks")
    if unused := sorted(given - MODES[modes[0]]):
        raise UserError(f"evaluate: --{unused[0].replace('_', '-')} is not supported with {modes[0]}; remove it")
    if modes[0] != "ANSWERS" and options.model is None:
        raise UserError(f"evaluate: {modes[0]} requires --model")
    if options.generator and not options.alpaca_eval:
        raise UserError("evaluate: --generator requires --alpaca-eval")
    return modes[0]


def _answers(options: argparse.Namespace) -> tuple[str, Any]:
    from megatron_spo.evaluate.answers import alpaca_eval, differences, read_answers, table

    if len(options.answers) > 2:
        raise UserError(f"evaluate: got {len(options.answers)} answer files; give one, or two to compare")
    files = _judged([read_answers(path) for path in options.answers], options)
    compared = differences(*files) if len(files) == 2 else {}
    if options.alpaca_eval:
        if len(files) == 2:
            raise UserError("evaluate: --alpaca-eval supports only one answer file")
        path = files[0].path.resolve()
        _write(options.alpaca_eval, alpaca_eval(files[0], options.generator or f"{path.parent.name}/{path.stem}"))
    found = {"files": [file.as_json() for file in files]}
    if compared:
        found["differences"] = {name: vars(one) for name, one in compared.items()}  # type: ignore[assignment]
    wins = None
    if len(files) == 2 and files[0].rewards and files[1].rewards:
        from megatron_spo.evaluate.judge import win_rate

        wins = win_rate(files[0].rewards, files[1].rewards)
        found["win_rate"] = vars(wins)  # type: ignore[assignment]
    return table(files, compared, wins), found


def _judged(files: list[Answers], options: argparse.Namespace) -> list[Answers]:
    """Returns the files of answers with the scores of a judge or a reward model, if one is given."""
    if options.scores and options.reward_model:
        raise UserError("evaluate: give either --scores or --reward-model")
    if options.batch_size and not options.reward_model:
        raise UserError("evaluate: --batch-size is not supported with ANSWERS without --reward-model; remove it")
    if not options.scores and not options.reward_model:
        return files
    from megatron_spo.evaluate.judge import read_scores, score_by_model

    if options.reward_model:
        rewards = score_by_model(options.reward_model, files, options.batch_size or BATCH_SIZE)
    elif len(options.scores) != len(files):
        raise UserError(f"evaluate: got {len(options.scores)} files for --scores; give one for each of the "
                        f"{len(files)} files of answers, in the same order")  # fmt: skip
    else:
        rewards = [read_scores(path, file) for path, file in zip(options.scores, files, strict=True)]
    return [replace(file, rewards=one) for file, one in zip(files, rewards, strict=True)]


def _pairs(options: argparse.Namespace) -> tuple[str, Any]:
    from megatron_spo.evaluate.pairs import evaluate_pairs

    scores = evaluate_pairs(
        options.model,
        options.pairs,
        reference=options.reference,
        batch_size=options.batch_size or BATCH_SIZE,
        max_length=options.max_length,
        truncation=options.truncation or "error",
        bad_rows=options.bad_rows or "error",
    )
    dropped = [vars(row) for row in scores.dropped]
    found = {"model": str(options.model), "reference": options.reference and str(options.reference),
             "pairs": options.pairs, "dropped": dropped, **scores.as_json()}  # fmt: skip
    return scores.table() + (f"\n{len(dropped)} rows dropped" if dropped else ""), found


def _tasks(options: argparse.Namespace) -> tuple[str, Any]:
    from megatron_spo.evaluate.harness import run_tasks, table

    found = run_tasks(options.model, options.tasks, options.batch_size or BATCH_SIZE)
    return table(found), found


def _write(path: Path, content: Any) -> None:
    write_output(path, json.dumps(content, indent=1, ensure_ascii=False, default=str) + "\n")
