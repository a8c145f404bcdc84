"""Data of gsm8k.yaml: `prepare_gsm8k.py DATA SEED PAIRS SFT` writes DATA like examples/gsm8k, from its two files.

DATA then holds the SFT model (sft-hf), pairs.jsonl, pairs_heldout.jsonl, test_problems.jsonl (problems without a
training pair) and sft_scores.json, the scores before any training on pairs. SEED chooses the held-out problems and the
training pairs: as many as the runs need, each used once. A second call resumes where the first stopped.
"""

import random
import sys
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # for `import examples`

from examples import common  # noqa: E402
from examples.common import Stages, read_jsonl, write_jsonl  # noqa: E402
from examples.gsm8k import run as gsm8k  # noqa: E402
from examples.studies import gsm8k_answers  # noqa: E402
from examples.studies.score import write_scores  # noqa: E402

PROBLEMS = 100
PAIRS = 850  # for 100 steps of 8 pairs; about 1% are longer than data.max_length and dropped


def main() -> None:
    folder, seed = Path(sys.argv[1]), int(sys.argv[2])
    pairs, solved = map(Path, sys.argv[3:5])
    for path in (pairs, solved):
        if not path.is_file():
            raise common.StageFailed(f"{path} is not there: examples/studies/README.md says what to put or link there")
    scale = gsm8k.Scale()
    stages = Stages.open(folder, 1, {"seed": seed, "scale": asdict(scale)}, fresh=False)
    gsm8k.write_data(stages, pairs, solved, scale, seed)
    chosen = random.Random(f"pairs {seed}").sample(read_jsonl(stages.file("pairs")), PAIRS)
    write_jsonl(stages.file("pairs"), chosen)
    write_problems(stages, pairs, seed)
    model = stages.train_sft(gsm8k.HERE / "sft.yaml", scale, seed)
    if not (scores := folder / "sft_scores.json").exists():
        write_scores(model, model, stages.file("test_problems"), scores, seed, gsm8k_answers)


def write_problems(stages: Stages, pairs: Path, seed: int) -> None:
    """Writes test problems without a training pair, each with one right solution."""
    trained = {row["prompt"] for row in read_jsonl(stages.file("pairs"))}
    free = {row["prompt"]: row["chosen"] for row in read_jsonl(pairs) if row["prompt"] not in trained}
    drawn = random.Random(f"problems {seed}").sample(sorted(free.items()), PROBLEMS)
    write_jsonl(stages.file("test_problems"), [{"prompt": prompt, "chosen": chosen} for prompt, chosen in drawn])


if __name__ == "__main__":
    common.run_main(main)
