"""`python tools/bench/memory.py`: memory of a step besides weights, gradients and optimizer, with a vocabulary of 128k.

    ours      `megatron-spo train` on rows of 4096 tokens, 8 and 24 pairs per step, all of one length
    padded    transformers, batches of padded chosen and rejected sequences, logits of every position. Measured with one
              and two pairs in a micro-batch, and extrapolated linearly in the number of positions to the pairs of one
              of our rows, for which a machine may not have enough memory

Each runs in its own process. The result is the peak resident memory in a step minus that between two steps.
"""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import measure
from measure import MIXES, Result
from work import lognormal_lengths

VOCAB, MIX = 128 * 1024, "chat"


def main() -> None:
    parser = measure.parser(__doc__)
    parser.add_argument("--child", nargs="+", help="(internal) measure in this process")
    options = parser.parse_args()
    if options.child:
        kind, *arguments = options.child
        return print(json.dumps({"ours": _ours, "padded": _padded}[kind](*arguments)))
    with measure.workplace() as folder:
        measure.report(_compare(folder, 4096 if options.quick else VOCAB), options.json)


def _compare(folder: Path, vocab: int) -> list[Result]:
    measure.write_model(folder / "model", hidden=64, layers=2, vocab=vocab)
    results, ours = [], {}
    for count in (8, 24):
        measure.write_pairs(folder / "pairs.jsonl", count, prompt=MIXES[MIX][0], response=MIXES[MIX][1], deviation=0)
        training = {"global_batch_size": count, "steps": 2}
        # SimPO, which needs no reference
        config = measure.write_config(folder, training=training, loss={"name": "simpo"}, reference={"cache": None})
        ours[count] = _child("ours", config, folder / f"run-{count}")[0]
        results.append(Result(f"memory/ours, {count} pairs a step", ours[count] / 2**20, "MiB"))
    lengths = lognormal_lengths(2000, *MIXES[MIX])
    per_row = round(0.97 * 4096 / lengths.sum(1).mean())
    widest = [int((one[:, :1] + one[:, 1:]).max()) for one in lengths[: 100 * per_row].reshape(-1, per_row, 3)]
    positions = round(2 * per_row * sum(widest) / len(widest))
    small, large = (_child("padded", folder / "model", str(rows)) for rows in (2, 4))
    per_position = (large[0] - small[0]) / (large[1] - small[1])
    padded = large[0] + per_position * (positions - large[1])
    results += [
        Result("memory/padded, measured", large[0] / 2**20, "MiB", f"{large[1]} positions"),
        Result(
            "memory/padded, a row's pairs",
            padded / 2**20,
            "MiB",
            f"extrapolated: {per_row} pairs, {positions} positions, {per_position / vocab:.1f} bytes per logit",
        ),
        Result("memory/padded over ours", padded / ours[24], "x"),
        Result("memory/24 pairs over 8", ours[24] / ours[8], "x"),
    ]
    return results


def _child(kind: str, *arguments: Any) -> list[float]:
    """Runs a measurement in its own process and returns its result."""
    # larger blocks are mapped, so that freed memory is returned to the system at once
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, __file__, "--child", kind, *map(str, arguments)]
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def resident(field: str) -> int:
    """Returns VmRSS, RssAnon (without mapped files) or VmHWM (the peak since the last reset) in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return 1024 * int(line.split()[1])
    raise RuntimeError(field)


def _reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def _ours(config: str, output: str) -> list[float]:
    """Returns the bytes by which the last step exceeds the memory resident before it."""
    from megatron_spo.model import logprobs
    from megatron_spo.train.run_directory import RunDirectory

    above: list[float] = []
    before = 0
    log = RunDirectory.log

    def look(self: RunDirectory, kind: str, step: int, metrics: Mapping[str, Any]) -> None:
        nonlocal before
        log(self, kind, step, metrics)
        above.append(resident("VmHWM") - before)
        logprobs.KEPT.clear()
        before = resident("VmRSS")
        _reset_peak()

    with measure.replaced(RunDirectory, "log", look):
        measure.command("train", config, f"output={output}")
    return [above[-1]]


def _padded(folder: str, rows: str) -> list[float]:
    """Returns the bytes by which a step exceeds the memory resident before it, and its number of positions."""
    import torch
    from transformers import LlamaForCausalLM

    torch.set_num_threads(1)
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
    width = sum(MIXES[MIX])

    def step(width: int) -> None:
        tokens = torch.randint(0, model.config.vocab_size, (int(rows), width))
        logprobs = model(tokens).logits[:, :-1].log_softmax(-1).gather(-1, tokens[:, 1:, None])[..., 0]
        chosen, rejected = logprobs.sum(-1).chunk(2)
        (-torch.nn.functional.logsigmoid(0.1 * (chosen - rejected)).mean()).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)

    step(8)
    before = resident("VmRSS")
    _reset_peak()
    step(width)
    return [resident("VmHWM") - before, int(rows) * width]


if __name__ == "__main__":
    main()
