"""`python tools/bench/speed.py`: pairs per second of training steps, compared within one run.

DPO in fp32 on one thread with a random Llama; V = 1024 gives the head about the same share of the cost as in a 70B
model. The programs take turns on the same pairs in the same order with the same AdamW, and must have the same losses:

    trl          TRL's DPOTrainer, micro-batch 8, head at response positions only, reference model in every step
    trl-given    the same with TRL's precomputed reference (that pass is not timed)
    ours         `megatron-spo train`: rows of 4096 tokens, reference cache (filling it is not timed)
    plain        plain PyTorch on our rows (plain.py), without the overhead of Megatron and this package
"""

import argparse
import statistics
from pathlib import Path

import measure
import plain
import trl_dpo
from measure import MIXES, Result, Turn
from work import rows_of

LR, BATCH = 1e-4, 16


def main() -> None:
    parser = measure.parser(__doc__)
    parser.add_argument("--rounds", type=int, default=2, help="number of rounds [%(default)s]")
    parser.add_argument(
        "--steps", type=int, default=3, help="steps per round, the first one being a warm-up [%(default)s]"
    )
    parser.add_argument("--hidden", type=int, default=256, help="width of the model [%(default)s]")
    parser.add_argument("--layers", type=int, default=3, help="layers of the model [%(default)s]")
    parser.add_argument("--mixes", nargs="+", default=list(MIXES), choices=MIXES)
    parser.add_argument("--ways", nargs="+", default=["trl", "trl-given", "ours", "plain"])
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.steps, options.hidden = 1, 2, 64
    with measure.workplace() as folder:
        results = [result for mix in options.mixes for result in _mix(folder / mix, mix, options)]
    measure.report(results, options.json)


def _mix(folder: Path, mix: str, options: argparse.Namespace) -> list[Result]:
    prompt, response = MIXES[mix]
    pairs = measure.write_pairs(folder / "pairs.jsonl", BATCH * options.steps, prompt=prompt, response=response)
    measure.write_model(folder / "model", hidden=options.hidden, layers=options.layers)
    config = measure.write_config(
        folder, training={"global_batch_size": BATCH, "steps": options.steps}, optimizer={"lr": LR}
    )
    measure.command("reference", str(config))
    runs = iter(range(10**6))
    batches = rows_of(config, options.steps, BATCH)
    model = folder / "model"
    ways = {
        "trl": lambda: trl_dpo.steps(model, pairs, batch=BATCH, lr=LR, precomputed=False),
        "trl-given": lambda: trl_dpo.steps(model, pairs, batch=BATCH, lr=LR, precomputed=True),
        "ours": lambda: measure.train(config, folder / f"run-{next(runs)}"),
        "plain": lambda: plain.steps(model, batches, lr=LR),
    }
    turns = measure.take_turns({name: ways[name] for name in options.ways}, options.rounds)
    return _results(mix, turns, BATCH * (options.steps - 1))


def _results(mix: str, turns: dict[str, list[Turn]], pairs: int) -> list[Result]:
    """Returns the speeds, the ratios of ours to the others, and the largest differences of the losses."""
    needed = {name: measure.seconds(ones) for name, ones in turns.items()}
    ours, lines = needed["ours"], turns["ours"][0].lines
    tokens = sum(line["tokens"] for line in lines[1:])
    results = [Result(f"{mix}/{name}", pairs / value, "pairs/s") for name, value in needed.items()]
    results.append(Result(f"{mix}/ours/tokens", tokens / ours, "tokens/s", "without padding, prompts counted once"))
    for name in turns.keys() - {"ours"}:
        results.append(Result(f"{mix}/ours over {name}", needed[name] / ours, "x"))
        apart = max(
            abs(a - b)
            for turn in turns[name]
            for a, b in zip(turn.losses, [line["loss"] for line in lines], strict=True)
        )
        results.append(Result(f"{mix}/loss apart from {name}", apart, "", f"last loss {lines[-1]['loss']:.4f}"))
        assert apart < 1e-4, f"the losses of {name} and ours differ: {turns[name][0].losses}, {turns['ours'][0].losses}"
    results.append(Result(f"{mix}/row fill", statistics.fmean(line["row_fill"] for line in lines), ""))
    return results


if __name__ == "__main__":
    main()
