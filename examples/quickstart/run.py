"""The quickstart: compares SPO with its base losses, from an untrained model on, using only `megatron-spo` commands.

Random small Llama -> SFT on worked additions -> pairs sampled from that model -> reference cache -> seven
runs -> export -> responses to new problems -> scores. Run it with `make quickstart`; see README.md.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))  # for `import examples`: a script has only its own folder on the path

from examples import common  # noqa: E402
from examples.common import Stages, read_jsonl, write_jsonl, write_text  # noqa: E402
from examples.quickstart import task  # noqa: E402
from examples.quickstart.page import write_page, write_picture  # noqa: E402
from examples.styles import Task  # noqa: E402

LOSSES = {
    "dpo": ("loss.beta=0.1",),
    "simpo": ("loss.beta=2.5", "loss.gamma_beta_ratio=0.3"),
    "alpha_dpo": ("loss.beta=2.5", "loss.gamma_beta_ratio=0.3", "loss.alpha=0.1"),
}
SPO_LAMBDA = 1.5  # one setting, in the unit `relative`, for all three losses
VARIANTS = common.variants(LOSSES, SPO_LAMBDA)
JUDGE_AGREEMENT = 0.75  # how often the judge prefers the short style
COLUMNS = (
    "accuracy",
    "accuracy_t1",
    "malformed",
    "preferred",
    "win",
    "chosen_shift",
    "rejected_shift",
    "seconds",
)


@dataclass(frozen=True)
class Scale:
    """Sizes of the data and lengths of the training; `samples` is the number of responses per problem."""

    sft_problems: int = 300
    sft_steps: int = 600
    sft_warmup: int = 50
    pair_problems: int = 900
    held_out_problems: int = 180
    samples: int = 6
    pairs: int = 600
    held_out_pairs: int = 100
    steps: int = 100
    warmup: int = 20
    eval_every: int = 10
    test_problems: int = 1000


def main(arguments: Sequence[str] | None = None, scale: Scale = Scale()) -> None:
    parser = common.parse_arguments("SPO against its base losses on three-digit addition.", "runs/quickstart")
    options = parser.parse_args(arguments)
    settings = {"seed": options.seed, "scale": asdict(scale), "variants": VARIANTS}
    stages = Stages.open(options.out, options.jobs, settings, fresh=options.fresh)
    write_data(stages, scale, options.seed)
    sft_model = stages.train_sft(HERE / "sft.yaml", scale, options.seed)
    make_pairs(stages, scale, options.seed, sft_model)
    train_and_answer(stages, scale, options.seed, sft_model)
    rows = [measure(stages, name) for name in ("sft", *VARIANTS)]
    write_text(options.out / "results.json", json.dumps({"rows": rows}, indent=1))
    print("\n" + results_table(rows) + "\n")
    write_picture(options.out, rows)
    sentences = write_page(options.out, rows)
    print("\n".join(sentences))
    stages.say(f"done: {options.out / 'index.html'}")


def write_data(stages: Stages, scale: Scale, seed: int, task: Task = task) -> None:
    """Writes the untrained model, and different problems for SFT, pairs and test."""
    counts = (scale.sft_problems, scale.pair_problems + scale.held_out_problems, scale.test_problems)
    for_sft, for_pairs, for_test = task.draw_problems(counts, seed)
    task.write_model(stages.out / "model")
    write_jsonl(stages.file("sft"), task.sft_rows(for_sft))
    write_jsonl(stages.file("pair_problems"), [{"prompt": problem.prompt} for problem in for_pairs])
    write_jsonl(stages.file("test_problems"), [{"prompt": problem.prompt} for problem in for_test])


def make_pairs(stages: Stages, scale: Scale, seed: int, model: Path, task: Task = task) -> None:
    """Samples from the SFT model and judges the samples into training and held-out pairs of different problems."""
    options = sampling(scale.samples, seed, max_new_tokens=task.MAX_NEW_TOKENS)
    sampled = read_jsonl(stages.generate("samples", model, stages.file("pair_problems"), *options))
    parts = {"pairs": sampled[: scale.pair_problems], "pairs_heldout": sampled[scale.pair_problems :]}
    wanted = {"pairs": scale.pairs, "pairs_heldout": scale.held_out_pairs}
    for name, rows in parts.items():
        pairs = task.preference_pairs(rows, wanted[name], JUDGE_AGREEMENT, seed)
        if len(pairs) < wanted[name]:
            raise common.StageFailed(
                f"{name}: the samples give {len(pairs)} pairs, but {wanted[name]} are needed, because the SFT model is "
                "too weak; try another --seed"
            )
        write_jsonl(stages.file(name), pairs)
    stages.say(f"pairs: {scale.pairs}, and {scale.held_out_pairs} held out")


def train_and_answer(stages: Stages, scale: Scale, seed: int, sft_model: Path) -> None:
    """Fills the reference cache, then trains every run and samples its responses, several runs at a time."""
    config = HERE / "preference.yaml"
    shared = stages.fill_reference(config, scale, seed, sft_model)

    def answer(name: str, model: Path) -> None:
        stages.generate(f"{name}-greedy", model, stages.file("test_problems"), *sampling(1, seed, temperature=0))
        stages.generate(f"{name}-t1", model, stages.file("test_problems"), *sampling(1, seed + 1))

    def run(name: str) -> None:
        stages.train(name, config, [*shared, *VARIANTS[name]])
        answer(name, stages.export(name))

    stages.side_by_side([*(partial(run, name) for name in VARIANTS), partial(answer, "sft", sft_model)])


def sampling(
    samples: int, seed: int, *, temperature: float = 1, max_new_tokens: int = task.MAX_NEW_TOKENS
) -> list[str]:
    """Returns options of `generate`."""
    options = {
        "temperature": temperature,
        "samples": samples,
        "seed": seed,
        "max-new-tokens": max_new_tokens,
        "batch-size": 1000,
    }
    return [text for name, value in options.items() for text in (f"--{name}", str(value))]


def measure(stages: Stages, name: str) -> dict[str, Any]:
    """Returns a row of results.json: shares of the test problems, and the last shifts on the held-out pairs in nats."""
    greedy = task.score(read_jsonl(stages.file(f"{name}-greedy")))
    sampled = task.score(read_jsonl(stages.file(f"{name}-t1")))
    evaluations = common.metrics_lines(stages.out / name, "eval")
    last = evaluations[-1] if evaluations else {}
    return {
        "name": name,
        "accuracy": greedy.accuracy,
        "accuracy_t1": sampled.accuracy,
        "malformed": sampled.malformed,
        "preferred": sampled.preferred,
        "win": sampled.win,
        "chosen_shift": last.get("spo/chosen_shift", 0.0),
        "rejected_shift": last.get("spo/rejected_shift", 0.0),
        "seconds": round(common.training_seconds(stages.out / name), 1),
    }


def results_table(rows: list[dict[str, Any]]) -> str:
    """Returns the rows as a table for the terminal."""
    digits = {"chosen_shift": "+.1f", "rejected_shift": "+.1f", "seconds": ".0f"}
    cells = [[row["name"], *(format(row[c], digits.get(c, ".3f")) for c in COLUMNS)] for row in rows]
    return common.text_table(["run", *COLUMNS], cells)


if __name__ == "__main__":
    common.run_main(main)
