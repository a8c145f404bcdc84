"""`python tools/bench/real.py --model FOLDER`: a real model on real pairs, compared with TRL within one run.

DPO with the SFT term (our `penalty` in the unit `token`, TRL's loss_type ["sigmoid", "sft"]) on one thread, with the
same pairs, order, batch and AdamW. Both keep fp32 weights for the optimizer and compute in bf16 (or both in fp32). Each
turn is a process of its own, so that its peak memory is its own:

    ours         `megatron-spo train`: rows of 4096 tokens, reference cache (filling it is not timed)
    trl          TRL's DPOTrainer, head at response positions only, reference model in every step
    trl-given    the same with TRL's precomputed reference (that pass is not timed)

`lora`: both train adapters of rank 16 on weights in that format. Their random numbers differ, so that only the losses
of the first step agree. Without --pairs, the pairs of examples/gsm8k/results/qwen05 are used.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import measure
from measure import Result, Turn

ROOT = Path(__file__).parents[2]
LR = 1e-6
WAYS = ("ours", "trl", "trl-given")
COMPARED = ("loss", "logps/chosen", "logps/rejected")
APART = {"fp32": 1e-3, "bf16": 0.05}
"""Largest difference of the losses of a step, relative to the loss, that counts as agreement."""
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
RANK = 16
PEAK_SHAPES = ((1024, 1024, 4096), (2048, 896, 4864), (2048, 4864, 896), (4096, 4096, 4096))


def main() -> None:
    parser = measure.parser(__doc__)
    parser.add_argument("--model", type=Path, help="model folder in Hugging Face format")
    parser.add_argument("--pairs", type=Path, help="preference pairs, JSONL")
    parser.add_argument("--steps", type=int, default=5, help="steps, the first one being a warm-up [%(default)s]")
    parser.add_argument("--batch", type=int, default=4, help="pairs per step [%(default)s]")
    parser.add_argument("--rounds", type=int, default=2, help="number of rounds [%(default)s]")
    parser.add_argument("--dtype", choices=list(APART), default="bf16", help="precision [%(default)s]")
    parser.add_argument("--kinds", nargs="+", choices=("full", "lora"), default=["full", "lora"], help="what to train")
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS)
    parser.add_argument("--child", nargs=3, metavar=("WAY", "KIND", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        way, kind, place = options.child
        return print(json.dumps(_turn(way, kind, Path(place), options)))
    with measure.workplace() as folder:
        if options.quick:
            options.steps, options.rounds, options.batch = 2, 1, 2
            measure.write_model(folder / "model", hidden=64, layers=2)
            measure.write_pairs(folder / "given.jsonl", 4, prompt=20, response=20)
            options.model, options.pairs = folder / "model", folder / "given.jsonl"
        if options.model is None:
            parser.error("--model is required")
        found = [result for kind in options.kinds for result in _compare(folder / kind, kind, options)]
        measure.report(found, options.json)


def _compare(folder: Path, kind: str, options: argparse.Namespace) -> list[Result]:
    folder.mkdir()
    prepare(folder, kind, options)
    turns: dict[str, list[Turn]] = {way: [] for way in options.ways}
    memory: dict[str, list[float]] = {way: [] for way in options.ways}
    for i in range(options.rounds):
        for way in reversed(options.ways) if i % 2 else options.ways:
            found = _child(way, kind, folder, options)
            turns[way].append(Turn(found["seconds"], found["lines"]))
            memory[way].append(found["mib"])
            print(f"{kind} {way}: {sum(found['seconds']):.1f} s, {found['mib']:.0f} MiB", file=sys.stderr, flush=True)
    return results(kind, turns, memory, needed(folder, options), options)


def prepare(folder: Path, kind: str, options: argparse.Namespace) -> None:
    """Writes pairs of texts and the configuration, and fills the reference cache.

    The chat template is applied here, since TRL also scores what the template writes after the end of a turn.
    """
    from transformers import PreTrainedTokenizerFast

    source = options.pairs or ROOT / "examples/gsm8k/results/qwen05/pairs.jsonl"
    rows = [json.loads(line) for line in source.read_text().splitlines()][: options.batch * options.steps]
    if len(rows) < options.batch * options.steps:
        sys.exit(f"error: {source} has {len(rows)} pairs, but {options.batch * options.steps} are needed")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(options.model)
    pairs = [_as_text(row, tokenizer) for row in rows]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    lora: dict[str, Any] = {"lora": {"rank": RANK, "alpha": 2.0 * RANK}} if kind == "lora" else {}
    measure.write_config(
        folder,
        model={"path": str(options.model)},
        data={"max_length": 2048},
        spo={"schedule": "penalty", "lambda": 1.0, "lambda_unit": "token"},
        training={"global_batch_size": options.batch, "steps": options.steps},
        optimizer={"lr": LR},
        precision={"dtype": options.dtype},
        **lora,
    )
    measure.command("reference", str(folder / "config.yaml"))


def _as_text(row: Mapping[str, Any], tokenizer: Any) -> dict[str, str]:
    if isinstance(row["prompt"], str):
        return {key: row[key] for key in ("prompt", "chosen", "rejected")}
    prompt = tokenizer.apply_chat_template(row["prompt"], tokenize=False, add_generation_prompt=True)
    return {"prompt": prompt, **{side: row[side][-1]["content"] for side in ("chosen", "rejected")}}


def _child(way: str, kind: str, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Runs a turn in its own process."""
    given = {"model": options.model, "steps": options.steps, "batch": options.batch, "dtype": options.dtype}
    command = [sys.executable, __file__, "--child", way, kind, str(folder)]
    command += [text for name, value in given.items() for text in (f"--{name}", str(value))]
    environment = {**os.environ, "TMPDIR": str(folder), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"error: {way} failed:\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def _turn(way: str, kind: str, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Runs the steps in this process; returns seconds and metrics by step, and the peak resident memory."""
    from memory import resident

    if way == "ours":
        turn = measure.train(folder / "config.yaml", folder / f"run-{time.time_ns()}")
    else:
        turn = _trl(kind, folder, options, precomputed=way == "trl-given")
    lines = [{name: line[name] for name in (*COMPARED, "tokens") if name in line} for line in turn.lines]
    return {"seconds": turn.seconds, "lines": lines, "mib": resident("VmHWM") / 2**20}


def _trl(kind: str, folder: Path, options: argparse.Namespace, *, precomputed: bool) -> Turn:
    import torch
    import trl_dpo

    more: dict[str, Any] = {}
    if kind == "lora":
        from peft import LoraConfig

        more["peft_config"] = LoraConfig(
            r=RANK, lora_alpha=2 * RANK, target_modules=list(TARGETS), task_type="CAUSAL_LM"
        )
    mixed = options.dtype == "bf16"
    stored = torch.bfloat16 if mixed and kind == "lora" else torch.float32
    pairs = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    return trl_dpo.steps(
        options.model,
        pairs,
        batch=options.batch,
        lr=LR,
        precomputed=precomputed,
        machine=trl_dpo.Machine(dtype=stored, autocast=mixed),
        loss_type=["sigmoid", "sft"],
        **more,
    )


def needed(folder: Path, options: argparse.Namespace) -> dict[str, float]:
    """Returns the necessary operations and the tokens of the timed steps, and the peak of one thread."""
    from speed import rows_of
    from work import necessary_flops

    from megatron_spo.config.load import load_config
    from megatron_spo.config.model_shape import read_model_shape

    rows = [row for batch in rows_of(folder / "config.yaml", options.steps, options.batch)[1:] for row in batch]
    config = load_config(folder / "config.yaml", [], world_size=1)
    return {
        "operations": necessary_flops(config, read_model_shape(options.model), rows),
        "tokens": sum(row.real_tokens for row in rows),
        "peak": peak(options.dtype),
    }


def peak(dtype: str) -> float:
    """Returns the operations per second of matrix products on one thread: the highest over several shapes."""
    import torch

    torch.set_num_threads(1)
    kind = {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype]
    found = []
    for m, k, n in PEAK_SHAPES:
        product = partial(torch.mm, torch.randn(m, k).to(kind), torch.randn(k, n).to(kind))
        found.append(2 * m * k * n / measure.cpu_seconds(product, repeats=5))
    return max(found)


def results(
    kind: str,
    turns: Mapping[str, Sequence[Turn]],
    memory: Mapping[str, Sequence[float]],
    counts: Mapping[str, float],
    options: argparse.Namespace,
) -> list[Result]:
    """Returns speeds, peak memory, the share of the peak, and how far the metrics of each step are apart."""
    prefix = f"real/{kind} {options.dtype}"
    seconds = {way: measure.seconds(ones) for way, ones in turns.items()}
    found = [Result(f"{prefix}/{way}", counts["tokens"] / value, "tokens/s") for way, value in seconds.items()]
    found += [Result(f"{prefix}/{way}/memory", min(memory[way]), "MiB") for way in turns]
    if "ours" not in turns:
        return found
    share = counts["operations"] / seconds["ours"] / counts["peak"]
    found.append(Result(f"{prefix}/share of the peak", share, "", f"peak {counts['peak'] / 1e9:.0f} GFLOP/s"))
    for way in turns.keys() - {"ours"}:
        found.append(Result(f"{prefix}/ours over {way}", seconds[way] / seconds["ours"], "x"))
        found.append(Result(f"{prefix}/memory/ours over {way}", min(memory["ours"]) / min(memory[way]), "x"))
        pairs = list(zip(turns["ours"][0].lines, turns[way][0].lines, strict=True))
        for name in COMPARED:
            apart = [abs(mine[name] - theirs[name]) for mine, theirs in pairs[: 1 if kind == "lora" else None]]
            size = statistics.fmean(abs(mine[name]) for mine, _ in pairs)
            found.append(Result(f"{prefix}/{name} apart from {way}", max(apart), "", f"mean {size:.4g}"))
            if name == "loss" and max(apart) > APART[options.dtype] * size and not options.quick:
                sys.exit(f"error: the losses of {way} and ours differ: {[(a[name], b[name]) for a, b in pairs]}")
    return found


if __name__ == "__main__":
    main()
