"""Data of the studies: `prepare.py DATA SEED [TASK]` writes DATA like the quickstart, for a task of tasks.py [sums].

DATA then holds the SFT model (sft-hf), pairs.jsonl, its first 150, 300 and 600 pairs (pairs_150.jsonl, ...),
pairs_heldout.jsonl, test_problems.jsonl, and sft_scores.json, the scores before any training on pairs. A second call
resumes where the first stopped.
"""

import sys
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # for `import examples`

from examples import common  # noqa: E402
from examples.common import Stages, read_jsonl, write_jsonl  # noqa: E402
from examples.quickstart import run as quickstart  # noqa: E402
from examples.studies.score import write_scores  # noqa: E402
from examples.studies.tasks import TASKS  # noqa: E402

COUNTS = (150, 300, 600)


def main() -> None:
    folder, seed = Path(sys.argv[1]), int(sys.argv[2])
    task, scale = TASKS[sys.argv[3] if len(sys.argv) > 3 else "sums"]
    stages = Stages.open(folder, 1, {"seed": seed, "scale": asdict(scale)}, fresh=False)
    quickstart.write_data(stages, scale, seed, task)
    model = stages.train_sft(quickstart.HERE / "sft.yaml", scale, seed)
    quickstart.make_pairs(stages, scale, seed, model, task)
    pairs = read_jsonl(stages.file("pairs"))
    for count in COUNTS:
        write_jsonl(stages.file(f"pairs_{count}"), pairs[:count])
    if not (folder / "sft_scores.json").exists():
        write_scores(model, model, stages.file("test_problems"), folder / "sft_scores.json", seed, task)


if __name__ == "__main__":
    common.run_main(main)
