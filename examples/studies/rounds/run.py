"""Four rounds of sampling and training against one round with as many prompts, samples and steps.

    python examples/studies/rounds/run.py --out runs/studies/rounds --seeds 0 1 2

Five methods, from the SFT model of the quickstart: the control (SFT on the chosen answers), dpo and simpo, each without
and with SPO. Run it again to resume. It writes results.json and table.md to OUT.
"""

import json
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
sys.path.insert(0, str(ROOT))  # for `import examples`: a script has only its own folder on the path

from examples import common  # noqa: E402
from examples.common import Stages, read_jsonl, write_jsonl, write_text  # noqa: E402
from examples.quickstart import run as quickstart  # noqa: E402
from examples.quickstart import task  # noqa: E402
from megatron_spo.config.yaml_text import format_yaml  # noqa: E402

PROMPTS, STEPS, TEST = 1200, 100, 500
"""Prompts and optimizer steps over all rounds, and test problems."""
ROUNDS = (1, 4)
SCALE = quickstart.Scale(pair_problems=PROMPTS, test_problems=TEST)
LOSSES = {name: quickstart.LOSSES[name] for name in ("dpo", "simpo")}
VARIANTS = common.variants(LOSSES, quickstart.SPO_LAMBDA)
COLUMNS = ("accuracy", "win", "accuracy_t1", "win_t1", "chosen_shift", "rejected_shift", "entropy", "share")
TITLES = ("right, T=0", "win, T=0", "right, T=1", "win, T=1", "d log p chosen", "d log p rejected", "entropy",
          "prompts with a pair")  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    parser = common.parse_arguments("Four rounds against one, on three-digit addition.", "runs/studies/rounds")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds, instead of --seed")
    parser.add_argument("--launch", help="words that start the commands of a round [python -m megatron_spo]")
    options = parser.parse_args(arguments)
    launch = [f"--launch={options.launch}", f"--launch-one={options.launch}"] if options.launch else []
    results = []
    for seed in options.seeds:
        settings = {"seed": seed, "prompts": PROMPTS, "steps": STEPS, "test": TEST, "variants": VARIANTS}
        stages = Stages.open(options.out / f"seed-{seed}", options.jobs, settings, fresh=options.fresh)
        prepare(stages, seed)
        names = [(name, rounds) for rounds in ROUNDS for name in VARIANTS]
        stages.side_by_side([partial(run, stages, seed, name, rounds, launch) for name, rounds in names])
        results += [{"seed": seed, **row} for name, rounds in names for row in measure(stages, name, rounds)]
        write_text(options.out / "results.json", json.dumps(results, indent=1))
        write_text(options.out / "table.md", table(results))
    print(table(results))


def prepare(stages: Stages, seed: int) -> None:
    """Trains the SFT model and makes the held-out pairs from its samples, as the quickstart does."""
    quickstart.write_data(stages, SCALE, seed)
    model = stages.train_sft(HERE.parents[1] / "quickstart" / "sft.yaml", SCALE, seed)
    for name in ("pair_problems", "test_problems"):
        rows = [
            {**row, "answer": task.Problem.from_prompt(row["prompt"]).answer} for row in read_jsonl(stages.file(name))
        ]
        write_jsonl(stages.file(name), rows)
    write_jsonl(stages.file("prompts"), read_jsonl(stages.file("pair_problems"))[:PROMPTS])
    write_jsonl(stages.file("held_out_problems"), read_jsonl(stages.file("pair_problems"))[PROMPTS:])
    options = quickstart.sampling(SCALE.samples, seed)
    sampled = read_jsonl(stages.generate("held_out_samples", model, stages.file("held_out_problems"), *options))
    pairs = task.preference_pairs(sampled, SCALE.held_out_pairs, quickstart.JUDGE_AGREEMENT, seed)
    write_jsonl(stages.file("held_out"), pairs)


def run(stages: Stages, seed: int, name: str, rounds: int, launch: Sequence[str]) -> None:
    """Runs all rounds of one method."""
    file, out = stages.out / f"{name}-{rounds}.yaml", stages.out / f"{name}-{rounds}"
    spec = {
        "base": str(HERE.parents[1] / "quickstart" / "preference.yaml"),
        "out": str(out),
        "rounds": rounds,
        "model": str(stages.out / "sft-hf"),
        "prompts": str(stages.file("prompts")),
        "prompts_per_round": PROMPTS // rounds,
        "sampling": {"samples": SCALE.samples, "max_new_tokens": task.MAX_NEW_TOKENS, "batch_size": 1000},
        "pairs": {"scorer": "function=examples.studies.rounds.judge:score"},
        "test": {"prompts": str(stages.file("test_problems")), "temperatures": [0.0, 1.0],
                 "pairs": str(stages.file("held_out"))},
        "seed": seed,
    }  # fmt: skip
    write_text(file, format_yaml(spec))
    steps = STEPS // rounds
    overrides = [
        *(f"data.eval={stages.file('held_out')}", "training.threads=1", f"training.seed={seed}"),
        *(f"training.steps={steps}", f"optimizer.warmup_steps={steps // 5}", f"training.eval_every={steps}"),
        *VARIANTS[name],
    ]
    stages.command(f"rounds-{name}-{rounds}", "rounds", file, *overrides, *launch, done=(out / "report.html").is_file())


def measure(stages: Stages, name: str, rounds: int) -> list[dict[str, Any]]:
    """Returns the scores of the model of each round; round 0 is the SFT model."""
    out, rows = stages.out / f"{name}-{rounds}", []
    for number in range(rounds + 1):
        at = out / f"round-{number}"
        greedy, sampled = (task.score(read_jsonl(at / f"test-t{t}.jsonl")) for t in (0, 1))
        row: dict[str, Any] = {"name": name, "rounds": rounds, "round": number}
        row |= {"accuracy": greedy.accuracy, "win": greedy.win, "accuracy_t1": sampled.accuracy, "win_t1": sampled.win}
        if number:
            scores = json.loads((at / "scores-pairs.json").read_text())["scores"]
            row |= {f"{side}_shift": scores[f"spo/{side}_shift"]["value"] for side in ("chosen", "rejected")}
            row["entropy"] = common.metrics_lines(at / "run", "eval")[-1]["policy/entropy"]
            summary = json.loads((at / "pairs.json").read_text())
            row |= {"share": summary["prompts_with_pairs"] / summary["prompts"], "pairs": summary["pairs"]}
        rows.append(row)
    return rows


def table(results: Sequence[dict[str, Any]]) -> str:
    """Returns a table in Markdown: means over the seeds, with the range in brackets, after each round."""
    lines = [f"| method | rounds | after round | {' | '.join(TITLES)} |", "|---" * (3 + len(TITLES)) + "|"]
    keys = dict.fromkeys((row["name"], row["rounds"], row["round"]) for row in results)
    for name, rounds, number in keys:
        if number == 0 and (name, rounds) != next(iter(keys))[:2]:
            continue  # the SFT model, once
        rows = [row for row in results if (row["name"], row["rounds"], row["round"]) == (name, rounds, number)]
        cells = [_cell([row[column] for row in rows if column in row]) for column in COLUMNS]
        start = ["sft", "", ""] if number == 0 else [name, str(rounds), str(number)]
        lines.append(f"| {' | '.join([*start, *cells])} |")
    return "\n".join(lines) + "\n"


def _cell(values: Sequence[float]) -> str:
    if not values:
        return ""
    spread = f" [{min(values):.2f}, {max(values):.2f}]" if len(values) > 1 else ""
    return f"{fmean(values):.2f}{spread}"


if __name__ == "__main__":
    common.run_main(main)
