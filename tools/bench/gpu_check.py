"""Parts of gpu_check.sh that are not tests: the benchmark of layers of the 8B model, and the quickstart on GPU and CPU.

python tools/bench/gpu_check.py --work FOLDER (--layers torch | --layers transformer_engine | --quickstart)

Each result is a line in the file SPO_GPU_RESULTS as soon as it is known. With SPO_GPU_DRY=1 everything runs on a CPU
with small sizes. Exit code: 0 if every result is ok, 1 if some are not.
"""

import argparse
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import gpu_parts  # noqa: E402
import gpu_run  # noqa: E402
import measure  # noqa: E402
import torch  # noqa: E402
from work import necessary_flops, needed, rows_of  # noqa: E402

from megatron_spo.config.fp8 import RECIPES, obstacle  # noqa: E402
from megatron_spo.config.load import load_config  # noqa: E402
from megatron_spo.config.model_shape import read_model_shape  # noqa: E402
from megatron_spo.config.topology import make_topology  # noqa: E402
from megatron_spo.planner.gpus import GIB  # noqa: E402
from megatron_spo.planner.memory import Setting, stage_memory  # noqa: E402
from megatron_spo.planner.presets import FOLDER  # noqa: E402
from megatron_spo.runtime.device import have_engine  # noqa: E402

DRY = bool(os.environ.get("SPO_GPU_DRY"))
BATCH, LAYERS = (8, 2) if DRY else (64, 4)
CACHE_BOUND = 5e-3
"""Largest difference of the loss of step 1 from ln 2: the cache was computed with other rows, which bf16 rounds
otherwise."""
MEMORY_BOUND = 0.10
"""Largest difference of the memory of tensors from the plan, as a fraction."""
QUICKSTART_BOUND = 1e-3
"""Largest difference of a metric in 20 steps in fp32 between GPU and CPU, relative to max(1, |value|). Two ways of
packing the pairs into rows differ by 1e-7 on a CPU."""
STEPS = 3 if DRY else 20
COMPARED = ("loss", "loss/sft", "logps/chosen", "logps/rejected", "grad_norm")


@dataclass
class Record:
    """Writes results to the file, and knows whether all were ok."""

    path: Path
    all_ok: bool = True

    def __call__(self, name: str, result: bool | str, measured: str) -> None:
        text = result if isinstance(result, str) else "ok" if result else "FAILED"
        self.all_ok &= text in ("ok", "reached")
        line = f"{name}\t{text}\t{' '.join(measured.split())[:400]}"
        print(line, flush=True)
        with self.path.open("a") as file:
            print(line, file=file)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--layers", choices=["torch", "transformer_engine"])
    parser.add_argument("--quickstart", action="store_true")
    options = parser.parse_args()
    record = Record(Path(os.environ["SPO_GPU_RESULTS"]))
    if options.quickstart:
        check_quickstart(record, options.work / "quickstart")
    else:
        check_layers(record, options.work / "benchmark", options.layers)
    return 0 if record.all_ok else 1


def check_layers(record: Record, folder: Path, layers: str) -> None:
    """Trains layers of the 8B model in bf16 and, with Transformer Engine, in every fp8 recipe of this GPU."""
    if layers == "transformer_engine" and not DRY and not have_engine():
        record("benchmark with Transformer Engine", "skipped", "Transformer Engine cannot be imported")
        return
    facts = gpu_parts.tiny() if DRY else gpu_parts.facts_of(None)
    config = write_benchmark(folder, facts.shape)
    for name, overrides in precisions(layers):
        try:
            check_precision(record, config, folder / name, overrides, facts)
        except Exception as error:  # the other precisions are still measured
            record(f"benchmark, {name}", "reached" if DRY and needs_gpu(str(error)) else "FAILED", str(error))


def needs_gpu(message: str) -> bool:
    return "NVIDIA GPU" in message or "CUDA" in message


def write_benchmark(folder: Path, shape: Mapping[str, Any]) -> Path:
    """Writes a model with random weights, pairs of the mix `chat` and a configuration, unless they exist."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder.mkdir(parents=True, exist_ok=True)
    raw = json.loads((FOLDER / "Llama-3.1-8B" / "config.json").read_text()) | dict(shape)
    raw |= {"num_hidden_layers": LAYERS, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
    if not (folder / "pairs.jsonl").exists():
        measure.write_model(folder / "model", hidden=64)  # for its tokenizer
        with torch.device("cpu" if DRY else "cuda"):
            model = LlamaForCausalLM(LlamaConfig(**raw)).bfloat16()
        model.save_pretrained(folder / "model")
        prompt, response = measure.MIXES["chat"]
        measure.write_pairs(folder / "pairs.jsonl", BATCH * gpu_run.STEPS, prompt=prompt, response=response)
    training = {"global_batch_size": BATCH, "steps": gpu_run.STEPS}
    return measure.write_config(folder, precision={"dtype": "bf16"}, training=training)


def precisions(layers: str) -> Iterator[tuple[str, list[str]]]:
    yield f"bf16-{layers}", [f"precision.layers={layers}"]
    if layers == "transformer_engine":
        capability = (9, 0) if DRY else torch.cuda.get_device_capability()
        cuda = "12.9" if DRY else str(torch.version.cuda)
        for recipe in RECIPES:
            if recipe != "delayed" and obstacle(recipe, capability, cuda) is None:
                yield f"fp8-{recipe}", [f"precision.fp8={recipe}"]


def check_precision(
    record: Record, config: Path, folder: Path, overrides: list[str], facts: gpu_parts.GpuFacts
) -> None:
    """Fills the reference cache, trains, and records speed, cache and memory."""
    overrides = [*overrides, f"reference.cache={folder}-cache"]
    for old in (folder, Path(f"{folder}-cache")):
        shutil.rmtree(old, ignore_errors=True)
    gpu_run.free()
    measure.command("reference", str(config), *overrides)
    gpu_run.free()
    seen = gpu_run.observe(config, folder, *overrides)
    loaded = load_config(config, overrides, world_size=1, elsewhere=DRY)
    shape = read_model_shape(Path(loaded.model.path))
    batches = rows_of(config, gpu_run.STEPS, BATCH)
    flops = statistics.mean(necessary_flops(loaded, shape, rows) for rows in batches[gpu_run.PROFILED :])
    name, mfu = f"benchmark, {folder.name}", flops / seen.step / facts.peak
    record(f"{name}: speed", True, f"MFU {mfu:.1%} of bf16, {seen.step:.3f} s, {BATCH / seen.step:.1f} pairs/s, "
           f"{LAYERS} layers of Llama-3.1-8B, {seen.syncs} waits in a step")  # fmt: skip
    first = next(line for line in train_lines(folder))
    off = first["loss/preference"] - math.log(2)
    exact = first["spo/chosen_shift"] == first["spo/rejected_shift"] == 0
    record(f"{name}: cache = policy", abs(off) <= CACHE_BOUND, f"{'bit for bit' if exact else 'not bit for bit'}; loss "
           f"- ln 2 = {off:.1e}, mean shifts {first['spo/chosen_shift']:.1e} and {first['spo/rejected_shift']:.1e}, "
           f"bound {CACHE_BOUND:g}")  # fmt: skip
    kernels: Any = "engine" if "torch" not in folder.name else "torch"
    sizes = [needed(row) for rows in batches for row in rows]
    setting = Setting(loaded, shape, make_topology(loaded.parallel, 1), "cpu" if DRY else kernels)
    longest = max(sizes, key=lambda row: row.tokens)
    planned = stage_memory(setting, 0, longest, max(len(rows) for rows in batches))
    tensors = planned.total - planned.reserved
    ratio = seen.peak / tensors
    record(f"{name}: memory", DRY or abs(ratio - 1) <= MEMORY_BOUND, f"{seen.peak / GIB:.2f} GiB, planned "
           f"{tensors / GIB:.2f} GiB, {ratio - 1:+.1%}, bound {MEMORY_BOUND:.0%}")  # fmt: skip


def check_quickstart(record: Record, folder: Path) -> None:
    """Trains DPO + SPO as in the quickstart, on pairs of its two styles, on the GPU and on the CPU."""
    from examples.quickstart import run, task
    from examples.styles import LONG, SHORT

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (problems,) = task.draw_problems([320], 0)
    task.write_model(folder / "model")
    pairs = [{"prompt": p.prompt, "chosen": task.solution(p, SHORT), "rejected": task.solution(p, LONG)}
             for p in problems]  # fmt: skip
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    given = [
        str(run.HERE / "preference.yaml"), f"model.path={folder}/model", "model.init=random",
        "data.eval=[]", "training.eval_every=0", "training.threads=1",
        f"data.train={folder}/pairs.jsonl", f"training.steps={STEPS}", "optimizer.warmup_steps=1",
        *run.VARIANTS["dpo+spo"],
    ]  # fmt: skip
    for device, visible in (("cpu", {"CUDA_VISIBLE_DEVICES": ""}), ("gpu", {})):
        for command in ("reference", "train"):
            where = [f"output={folder}/{device}", f"reference.cache={folder}/{device}-cache"]
            done = subprocess.run(
                [sys.executable, "-m", "megatron_spo", command, *given, *where],
                env={**os.environ, **visible}, capture_output=True, text=True, check=False,
            )  # fmt: skip
            if done.returncode != 0:
                record(f"quickstart, {command} on the {device}", False, done.stderr[-300:])
                return
    found, expected = train_lines(folder / "gpu"), train_lines(folder / "cpu")
    for name in COMPARED:
        worst = max(abs(a[name] - b[name]) / max(1.0, abs(b[name])) for a, b in zip(found, expected, strict=True))
        record(f"quickstart, {STEPS} steps of dpo+spo in fp32: {name}", worst <= QUICKSTART_BOUND,
               f"largest difference from the CPU {worst:.1e}, bound {QUICKSTART_BOUND:g}")  # fmt: skip


def train_lines(run: Path) -> list[dict[str, float]]:
    """Returns the training lines of a run's metrics."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == "train"]


if __name__ == "__main__":
    sys.exit(main())
