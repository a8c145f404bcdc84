"""`python tools/bench/layouts.py`: speed of two processes relative to one, and how evenly the work is distributed.

Speed is measured in wall-clock time with the `train` command, one thread per process, and needs two idle cores: tensor,
pipeline and data parallelism on two processes relative to one process on the same batches. The distribution is computed
over an epoch's batches of 512 pairs: cost of the most loaded data-parallel rank relative to the mean (floating-point
operations of a Llama-3.1-8B), and fill of rows of 4096 tokens.
"""

import itertools
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import measure
import numpy as np
from measure import MIXES, Result

LAYOUTS = {
    "one": [],
    "tensor": ["parallel.tensor=2"],
    "pipeline": ["parallel.pipeline=2"],
    "data": [],
}
BATCH, STEPS = 32, 3
"""Pairs per step, and number of steps; rows have 1024 tokens, so that a pipeline of two stages has enough of them."""


def main() -> None:
    parser = measure.parser(__doc__)
    parser.add_argument("--rounds", type=int, default=2, help="number of rounds [%(default)s]")
    parser.add_argument("--data", type=Path, help="preference pairs for which to compute fill and balance, too")
    parser.add_argument("--no-clock", action="store_true", help="compute only fill and balance")
    options = parser.parse_args()
    with measure.workplace() as folder:
        results = [] if options.no_clock else _speeds(folder, options.rounds, hidden=256 if options.quick else 512)
        for mix, (prompt, response) in MIXES.items():
            measure.write_model(folder / mix / "model", hidden=64)
            measure.write_pairs(folder / mix / "pairs.jsonl", 1024, prompt=prompt, response=response)
            results += _shares(folder / mix, mix)
        if options.data and options.data.exists():
            _train_tokenizer(folder / "real", options.data)
            results += _shares(folder / "real", options.data.stem)
    measure.report(results, options.json)


def _speeds(folder: Path, rounds: int, *, hidden: int) -> list[Result]:
    measure.write_model(folder / "model", hidden=hidden)
    measure.write_pairs(folder / "pairs.jsonl", STEPS * BATCH, prompt=60, response=60)
    config = measure.write_config(
        folder, training={"global_batch_size": BATCH, "steps": STEPS}, data={"max_length": 512, "row_length": 1024}
    )
    measure.command("reference", str(config))
    seconds: dict[str, list[list[float]]] = {name: [] for name in LAYOUTS}
    for turn in range(rounds):
        for name in LAYOUTS:
            seconds[name].append(_clock(config, folder / f"{name}-{turn}", 1 if name == "one" else 2, LAYOUTS[name]))
    needed = {name: sum(min(step) for step in zip(*turns, strict=True)) for name, turns in seconds.items()}
    return [
        Result(f"layout/{name} on 2 over 1", needed["one"] / value, "x", f"{value / (STEPS - 1):.2f} s per step")
        for name, value in needed.items()
        if name != "one"
    ]


def _clock(config: Path, output: Path, processes: int, overrides: list[str]) -> list[float]:
    """Returns the seconds of each step except the first."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0"]
    command += ["-m", "megatron_spo", "train", str(config), f"output={output}", *overrides]
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [json.loads(line)["seconds"] for line in (output / "metrics.jsonl").read_text().splitlines()][1:]


def _shares(folder: Path, name: str) -> list[Result]:
    """Computes the fill of rows for 1, 4 and 8 data-parallel ranks, and the balance between ranks."""
    from data import tokenise
    from work import necessary_flops

    from megatron_spo.config.load import load_config
    from megatron_spo.data.loader import Loader
    from megatron_spo.planner.presets import shape_of

    config = load_config(measure.write_config(folder, data={"bad_rows": "drop"}), [], world_size=1)
    dataset, shape, results = tokenise(folder), shape_of("Llama-3.1-8B"), []
    for ranks in (1, 4, 8):
        loaders = [
            Loader(dataset, config.data, global_batch_size=512, seed=0, rank=rank, ranks=ranks) for rank in range(ranks)
        ]
        fills, costs = [], []
        for step in range(len(dataset) // 512):
            batches = [loader.batch(step) for loader in loaders]
            fills.append(batches[0].row_fill)
            costs.append([necessary_flops(config, shape, batch.rows) for batch in batches])
        results.append(Result(f"fill/{name}, DP{ranks}", float(np.mean(fills)), "", f"worst {min(fills):.3f}"))
        if ranks > 1:
            over = [max(one) / statistics.fmean(one) for one in costs]
            results.append(
                Result(f"balance/{name}, DP{ranks}", max(over), "x", "most loaded rank over the mean, worst batch")
            )
    return results


def _train_tokenizer(folder: Path, pairs: Path) -> None:
    """Writes a model, a byte-pair tokenizer of 4096 tokens trained on the pairs, and a link to the pairs."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    measure.write_model(folder / "model", hidden=64, vocab=4096)
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=4096, special_tokens=["<pad>", "<eos>"], initial_alphabet=alphabet, show_progress=False
    )
    with pairs.open() as lines:
        raw.train_from_iterator((text for line in itertools.islice(lines, 5000) for text in _texts(line)), trainer)
    PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token="<eos>").save_pretrained(
        folder / "model"
    )
    (folder / "pairs.jsonl").symlink_to(pairs.resolve())


def _texts(line: str) -> list[str]:
    return [value for value in json.loads(line).values() if isinstance(value, str)]


if __name__ == "__main__":
    main()
