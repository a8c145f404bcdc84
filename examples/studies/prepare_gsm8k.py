"""Data of gsm8k.yaml: `prepare_gsm8k.py DATA SEED PAIRS.jsonl SFT.jsonl`.

DATA then holds a small Llama with a byte-level BPE tokenizer, trained on the solved problems (sft-hf), pairs.jsonl,
pairs_heldout.jsonl, test_problems.jsonl with 100 problems that no pair is trained on, and sft_scores.json, the scores
before any training on pairs. A second call resumes where the first stopped.
"""

import random
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # for `import examples`

from examples import common  # noqa: E402
from examples.common import Stages, read_jsonl, write_jsonl  # noqa: E402
from examples.studies import gsm8k_answers  # noqa: E402
from examples.studies.score import write_scores  # noqa: E402
from examples.styles import write_llama  # noqa: E402

CONFIG = Path(__file__).parent / "gsm8k" / "sft.yaml"


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
    test_problems: int = 100
    pairs: int = 850  # for `steps` steps of 8 pairs; about 1% are longer than data.max_length and dropped


def main() -> None:
    folder, seed = Path(sys.argv[1]), int(sys.argv[2])
    pairs, solved = map(Path, sys.argv[3:5])
    scale = Scale()
    inputs = read_input(pairs, "rejected"), read_input(solved, "completion")
    stages = Stages.open(folder, 1, {"seed": seed, "scale": asdict(scale)}, fresh=False)
    write_data(stages, *inputs, scale, seed)
    chosen = random.Random(f"pairs {seed}").sample(read_jsonl(stages.file("pairs")), scale.pairs)
    write_jsonl(stages.file("pairs"), chosen)
    write_problems(stages, pairs, scale.test_problems, seed)
    model = stages.train_sft(CONFIG, scale, seed)
    if not (scores := folder / "sft_scores.json").exists():
        write_scores(model, model, stages.file("test_problems"), scores, seed, gsm8k_answers)


def read_input(path: Path, field: str) -> list[dict[str, Any]]:
    """Reads a file whose rows must have `prompt` and `field`."""
    if not path.is_file():
        raise common.StageFailed(f"{path} does not exist; see examples/studies/README.md")
    rows = read_jsonl(path)
    for number, row in enumerate(rows, 1):
        if "prompt" not in row or field not in row:
            raise common.StageFailed(f"{path} line {number}: the fields `prompt` and `{field}` are required")
    return rows


def write_data(
    stages: Stages, pairs: Sequence[dict[str, Any]], solved: Sequence[dict[str, Any]], scale: Scale, seed: int
) -> None:
    """Writes the untrained model with its tokenizer, and training and held-out pairs of different problems."""
    problems = sorted({row["prompt"] for row in pairs})
    held_out = set(random.Random(f"held out {seed}").sample(problems, scale.held_out_problems))
    solved = [row for row in solved if row["prompt"] not in held_out]
    write_jsonl(stages.file("sft"), solved)
    write_jsonl(stages.file("pairs"), [row for row in pairs if row["prompt"] not in held_out])
    write_jsonl(stages.file("pairs_heldout"), [row for row in pairs if row["prompt"] in held_out])
    write_model(stages.out / "model", [row["prompt"] + row["completion"] for row in solved], scale.vocabulary)


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


def write_problems(stages: Stages, pairs: Path, count: int, seed: int) -> None:
    """Writes test problems without a training pair, each with one right solution."""
    trained = {row["prompt"] for row in read_jsonl(stages.file("pairs"))}
    free = {row["prompt"]: row["chosen"] for row in read_jsonl(pairs) if row["prompt"] not in trained}
    drawn = random.Random(f"problems {seed}").sample(sorted(free.items()), count)
    write_jsonl(stages.file("test_problems"), [{"prompt": prompt, "chosen": chosen} for prompt, chosen in drawn])


if __name__ == "__main__":
    common.run_main(main)
