"""`python tools/bench/gpu.py`: a training step on one GPU, end to end and in parts. Not yet run on a GPU.

As many layers of a Llama-3.1-8B as fit, random weights, bf16, rows of 4096 tokens of the mix `chat`:

    MFU          necessary floating-point operations of the step (no padding, nothing computed twice) relative to the
                 GPU's peak over the wall-clock time of the step, optimizer and data included
    fp8          the same step with precision.fp8, and only the layers' matrix products in fp8, relative to bf16
    TRL          pairs/s relative to TRL's DPOTrainer with micro-batch 8 and the reference model next to the policy
    attention    our attention and torch's kernels on the same row, forward and backward
    syncs        number of times that a step after the first waits for the GPU
    kernels      share of the GPU's time by kind of kernel, in one profiled step

`--tiny` runs everything on a CPU with a small model. This tests the code; the numbers are meaningless.
"""

import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import gpu_parts
import measure
import torch
import trl_dpo
from gpu_parts import GpuFacts
from gpu_run import PROFILED, STEPS, free, observe
from measure import Result
from work import Model, necessary_flops, rows_of

from megatron_spo.config.fp8 import RECIPES, obstacle
from megatron_spo.config.load import load_config
from megatron_spo.config.model_shape import read_model_shape
from megatron_spo.config.rules import installed
from megatron_spo.planner.gpus import GIB
from megatron_spo.planner.presets import FOLDER
from megatron_spo.runtime.device import to_device

BATCH, ROW = 64, 4096


def main() -> int:
    parser = measure.parser(__doc__)
    parser.add_argument("--tiny", action="store_true", help="use a small model on a CPU")
    parser.add_argument("--layers", type=int, help="number of layers [as many as fit]")
    parser.add_argument("--gpu", help="GPU whose peak MFU is relative to: h100, h200, ... [the driver's answer]")
    options = parser.parse_args()
    if not options.tiny and not torch.cuda.is_available():
        print("error: this PyTorch finds no NVIDIA GPU; use --tiny to test the code on a CPU", file=sys.stderr)
        return 2
    facts = gpu_parts.tiny() if options.tiny else gpu_parts.facts_of(options.gpu)
    with measure.workplace() as folder:
        results = _measure(folder, facts, options.layers)
    measure.report(results, options.json, gpu=facts.name, torch=torch.__version__)
    return 0


def _measure(folder: Path, facts: GpuFacts, layers: int | None) -> list[Result]:
    model, batch = folder / "model", 8 if facts.is_tiny else BATCH
    measure.write_model(model, hidden=64)  # for its tokenizer
    raw = json.loads((FOLDER / "Llama-3.1-8B" / "config.json").read_text()) | facts.shape
    raw["num_hidden_layers"] = layers or gpu_parts.layers_that_fit(raw, facts.memory, ROW)
    raw |= {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
    (model / "config.json").write_text(json.dumps(raw))
    prompt, response = measure.MIXES["chat"]
    pairs = measure.write_pairs(folder / "pairs.jsonl", batch * STEPS, prompt=prompt, response=response)
    config = measure.write_config(
        folder,
        model={"init": "random"},
        precision={"dtype": "fp32" if facts.is_tiny else "bf16"},
        training={"global_batch_size": batch, "steps": STEPS},
    )
    theirs = _trl(model, raw, pairs, batch, facts)  # first, before our code initialises process groups and holds memory
    measure.command("reference", str(config))
    ours = observe(config, folder / "ours")
    loaded, shape = load_config(config, [], world_size=1), read_model_shape(model)
    batches = rows_of(config, STEPS, batch)
    flops = statistics.mean(necessary_flops(loaded, shape, rows) for rows in batches[PROFILED:])
    tokens = statistics.mean(sum(row.real_tokens for row in rows) for rows in batches[PROFILED:])
    results = [
        Result("gpu/layers", raw["num_hidden_layers"], "", f"of Llama-3.1-8B, on {facts.name}"),
        Result("gpu/step", ours.step, "s", f"{batch} pairs"),
        Result("gpu/pairs", batch / ours.step, "pairs/s"),
        Result("gpu/tokens", tokens / ours.step, "tokens/s", "without padding, prompts counted once"),
        Result("gpu/MFU", flops / ours.step / facts.peak, "", f"{flops:.3g} necessary operations per step"),
        Result("gpu/host syncs", ours.syncs, "per step"),
        Result("gpu/peak memory", ours.peak / GIB, "GiB"),
    ]
    whole = sum(ours.kernels.values())
    for kind, microseconds in sorted(ours.kernels.items(), key=lambda one: -one[1]):
        results.append(Result(f"gpu/kernels/{kind}", microseconds / whole, "", f"{microseconds / 1e3:.2f} ms"))
    results += _fp8(folder, config, ours.step, raw)
    results += _attention(folder, config, batches[0][0])
    return [
        *results,
        Result("gpu/TRL", theirs, "pairs/s", "moments of AdamW in the model's precision, ours in fp32"),
        Result("gpu/ours over TRL", batch / ours.step / theirs, "x"),
    ]


def _fp8(folder: Path, config: Path, bf16_step: float, raw: dict[str, Any]) -> list[Result]:
    """Measures the step with each fp8 recipe that this GPU supports, and only the layers' matrix products."""
    results = []
    if torch.cuda.is_available() and installed("transformer_engine"):
        capability, cuda = torch.cuda.get_device_capability(), str(torch.version.cuda)
        able = [one for one in RECIPES if one != "delayed" and obstacle(one, capability, cuda) is None]
        for recipe in able:
            overrides = [f"precision.fp8={recipe}", f"reference.cache={folder}/cache-{recipe}"]
            measure.command("reference", str(config), *overrides)
            step = observe(config, folder / recipe, *overrides).step
            results.append(Result(f"gpu/step, bf16 over {recipe}", bf16_step / step, "x"))
    for name, ratio in gpu_parts.fp8_products(raw, ROW).items():
        results.append(Result(f"gpu/product, fp8 over bf16, {name}", ratio, "x"))
    return results


def _attention(folder: Path, config: Path, row: Any) -> list[Result]:
    """Measures forward and backward of the attention on one row in milliseconds, in a model of one layer."""
    from megatron_spo.model.attention import row_to_device

    free()
    raw = json.loads((folder / "model" / "config.json").read_text())
    (folder / "one-layer").mkdir()
    (folder / "one-layer" / "config.json").write_text(json.dumps({**raw, "num_hidden_layers": 1}))
    model = Model(config, f"model.path={folder}/one-layer")
    core = model.trainable.chunks[0].decoder.layers[0].self_attention.core_attention
    on_device = row_to_device(row, model.runtime.device)
    dtype = torch.bfloat16 if model.runtime.device.type == "cuda" else torch.float32

    def ours(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return core(q[:, None], k[:, None], v[:, None], None, packed_seq_params=on_device)

    segments = to_device(row.segments, torch.device("cpu"))
    ways = {"ours": ours, **gpu_parts.attention_ways(segments, model.runtime.device)}
    taken = gpu_parts.time_attention(ways, model.shape, len(row.tokens), model.runtime.device, dtype)
    return [Result(f"gpu/attention/{name}", 1e3 * seconds, "ms") for name, seconds in taken.items()]


def _trl(model: Path, raw: dict[str, Any], pairs: list[dict[str, str]], batch: int, facts: GpuFacts) -> float:
    """Writes random weights to the folder; returns TRL's pairs per second (wall-clock time) on the same pairs."""
    from transformers import LlamaConfig, LlamaForCausalLM

    dtype = torch.float32 if facts.is_tiny else torch.bfloat16
    with torch.device("cpu" if facts.is_tiny else "cuda"):
        made = LlamaForCausalLM(LlamaConfig(**raw)).to(dtype)  # type: ignore[arg-type]  # hidden by a decorator
        made.save_pretrained(model)
    machine = trl_dpo.Machine(time.perf_counter, dtype, on_gpu=not facts.is_tiny)
    turn = trl_dpo.steps(model, pairs[: 6 * batch], batch=batch, lr=1e-6, precomputed=False, machine=machine)
    free()
    return batch / statistics.median(turn.seconds[1:])


if __name__ == "__main__":
    sys.exit(main())
