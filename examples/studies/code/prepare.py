"""Data of code.yaml: `prepare.py DATA SEED` makes DATA as the quickstart does, with the task of this folder.

DATA then holds the SFT model (sft-hf), pairs.jsonl, pairs_heldout.jsonl, test_problems.jsonl, and sft_scores.json, the
scores before any training on pairs. A second call goes on where the first stopped.
"""

import sys
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))  # a script's own path is its folder

from examples import common  # noqa: E402
from examples.common import Stages  # noqa: E402
from examples.quickstart import run as quickstart  # noqa: E402
from examples.studies.code import task  # noqa: E402
from examples.studies.score import write_scores  # noqa: E402


def main() -> None:
    folder, seed = Path(sys.argv[1]), int(sys.argv[2])
    scale = quickstart.Scale(pair_problems=1200, held_out_problems=240)  # two of three give a pair
    stages = Stages.open(folder, 1, {"seed": seed, "scale": asdict(scale)}, fresh=False)
    quickstart.write_data(stages, scale, seed, task)
    model = stages.train_sft(quickstart.HERE / "sft.yaml", scale, seed)
    quickstart.make_pairs(stages, scale, seed, model, task)
    if not (scores := folder / "sft_scores.json").exists():
        write_scores(model, model, stages.file("test_problems"), scores, seed, task)


if __name__ == "__main__":
    common.run_main(main)
