"""Real pairs: does the held-out chosen log-prob collapse on GSM8K answers, and does SPO prevent it?

A small Llama with its own tokenizer is trained on solved problems. Then the control, and DPO and SimPO without and
with SPO, are trained on pairs of model answers. Some problems are held out with all their pairs.
"""

import json
import random
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))  # for `import examples`: a script has only its own folder on the path

from examples import common  # noqa: E402
from examples.common import Stages, read_jsonl, write_jsonl, write_text  # noqa: E402
from examples.styles import write_llama  # noqa: E402

LOSSES = {"dpo": ("loss.beta=0.1",), "simpo": ("loss.beta=2.5", "loss.gamma_beta_ratio=0.3")}
SPO_LAMBDA = 1.0
VARIANTS = common.variants(LOSSES, SPO_LAMBDA)
COLUMNS = {
    "chosen_ce": ("CE chosen", ".2f"),
    "chosen_shift": ("d log p chosen", "+.1f"),
    "rejected_shift": ("d log p rejected", "+.1f"),
    "both_down": ("both fell", ".2f"),
    "accuracy": ("pairwise accuracy", ".2f"),
    "seconds": ("training, s", ".0f"),
}


@dataclass(frozen=True)
class Scale:
    """Sizes of the data and lengths of the training."""

    vocabulary: int = 1024
    sft_steps: int = 400
    sft_warmup: int = 20
    steps: int = 100
    warmup: int = 20
    eval_every: int = 20
    held_out_problems: int = 32


def main(arguments: Sequence[str] | None = None, scale: Scale = Scale()) -> None:
    parser = common.parse_arguments("SPO on pairs of real answers.", "runs/gsm8k", "pairs", "sft")
    options = parser.parse_args(arguments)
    settings = {
        "pairs": str(options.pairs),
        "sft": str(options.sft),
        "seed": options.seed,
        "scale": asdict(scale),
        "variants": VARIANTS,
    }
    stages = Stages.open(options.out, options.jobs, settings, fresh=options.fresh)
    write_data(stages, options.pairs, options.sft, scale, options.seed)
    train(stages, scale, options.seed)
    rows = [before(stages), *(measure(stages, name) for name in VARIANTS)]
    write_text(options.out / "results.json", json.dumps({"rows": rows}, indent=1))
    page = options.out / "index.html"
    stages.command("report", "report", *(stages.out / name for name in VARIANTS), "--out", page, done=False)
    print(f"\n{rows[0]['pairs']} held-out pairs\n{results_table(rows)}\n")
    stages.say(f"done: {page}")


def write_data(stages: Stages, pairs_file: Path, sft_file: Path, scale: Scale, seed: int) -> None:
    """Writes the untrained model with its tokenizer, and training and held-out pairs of different problems."""
    pairs, solved = read_input(pairs_file, "rejected"), read_input(sft_file, "completion")
    problems = sorted({row["prompt"] for row in pairs})
    held_out = set(random.Random(f"held out {seed}").sample(problems, scale.held_out_problems))
    solved = [row for row in solved if row["prompt"] not in held_out]
    write_jsonl(stages.file("sft"), solved)
    write_jsonl(stages.file("pairs"), [row for row in pairs if row["prompt"] not in held_out])
    write_jsonl(stages.file("pairs_heldout"), [row for row in pairs if row["prompt"] in held_out])
    write_model(stages.out / "model", [row["prompt"] + row["completion"] for row in solved], scale.vocabulary)


def read_input(path: Path, field: str) -> list[dict[str, Any]]:
    """Reads a file whose rows must have `prompt` and `field`."""
    if not path.is_file():
        raise common.StageFailed(f"{path} does not exist; see examples/gsm8k/README.md")
    rows = read_jsonl(path)
    for number, row in enumerate(rows, 1):
        if "prompt" not in row or field not in row:
            raise common.StageFailed(f"{path} line {number}: the fields `prompt` and `{field}` are required")
    return rows


def write_model(folder: Path, texts: Sequence[str], vocabulary: int) -> None:
    """Writes the config.json of a Llama of 0.9M parameters, and a byte-level BPE tokenizer trained on `texts`."""
    raw = Tokenizer(BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<pad>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token="<eos>")
    write_llama(tokenizer, folder, hidden_size=128, intermediate_size=384, max_position_embeddings=512)


def train(stages: Stages, scale: Scale, seed: int) -> None:
    """Runs SFT, fills the reference cache, and trains on the pairs with several runs at a time."""
    config = HERE / "preference.yaml"
    shared = stages.fill_reference(config, scale, seed, stages.train_sft(HERE / "sft.yaml", scale, seed))

    def run(name: str) -> None:
        stages.train(name, config, [*shared, *VARIANTS[name]])

    stages.side_by_side([partial(run, name) for name in VARIANTS])


def measure(stages: Stages, name: str) -> dict[str, Any]:
    """Returns a row of results.json: the last evaluation on the held-out pairs.

    Log-probs are in nats per response, the cross-entropy (CE) in nats per token.
    """
    last = common.metrics_lines(stages.out / name, "eval")[-1]
    return {
        "name": name,
        "chosen_ce": last["loss/sft"],
        "chosen_shift": last["spo/chosen_shift"],
        "rejected_shift": last["spo/rejected_shift"],
        "both_down": last["spo/both_down"],
        "accuracy": last["rewards/accuracies"],
        "pairs": last["pairs"],
        "seconds": round(common.training_seconds(stages.out / name), 1),
    }


def before(stages: Stages) -> dict[str, Any]:
    """Returns the row of the SFT model that all runs start from, computed from the control's evaluation."""
    control = common.metrics_lines(stages.out / "sft_on_chosen", "eval")[-1]
    return {
        "name": "sft",
        "chosen_ce": control["loss/sft"] - control["spo/gap"],
        "chosen_shift": 0.0,
        "rejected_shift": 0.0,
        "both_down": 0.0,
        "accuracy": None,
        "pairs": control["pairs"],
        "seconds": round(common.training_seconds(stages.out / "sft"), 1),
    }


def results_table(rows: Sequence[dict[str, Any]]) -> str:
    """Returns the rows as a table for the terminal."""

    def cell(value: float | None, digits: str) -> str:
        return "-" if value is None else format(value, digits)

    cells = [[row["name"], *(cell(row[key], digits) for key, (_, digits) in COLUMNS.items())] for row in rows]
    return common.text_table(["run", *(title for title, _ in COLUMNS.values())], cells)


if __name__ == "__main__":
    common.run_main(main)
