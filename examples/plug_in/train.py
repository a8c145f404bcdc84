"""SPO in a plain Megatron-Core training loop: Megatron's model, data parallelism, optimizer and pipeline schedule, and
of megatron_spo only the objective.

    python examples/plug_in/train.py
    torchrun --nproc-per-node 2 examples/plug_in/train.py --tensor 2

It prints one JSON object per optimizer step.
"""

import argparse
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from megatron_spo import PairLogprobs, SpoObjective, install_cpu_bridge

VOCABULARY, LENGTH, MICRO_BATCH = 512, 32, 2  # tokens, tokens, pairs
LEARNING_RATE = 1e-3
SPO = SpoObjective(loss="dpo", parameters={"beta": 0.1}, schedule="penalty", lambda_=1.0)


@dataclass
class MicroBatch:
    """Some pairs as 2 * pairs sequences, right-padded to LENGTH: all chosen responses, then all rejected ones."""

    tokens: Tensor
    labels: Tensor
    """The next token at each position."""
    mask: Tensor
    """1.0 where the next token is part of the response, so that its log-prob counts."""
    reference: Tensor | None = None
    """[2 * pairs] log-probs of the responses under the reference, nats."""

    @classmethod
    def of(cls, pairs: Sequence[dict[str, list[int]]], device: torch.device) -> "MicroBatch":
        sequences = [(pair["prompt"], pair[side]) for side in ("chosen", "rejected") for pair in pairs]
        tokens = torch.zeros(len(sequences), LENGTH + 1, dtype=torch.long)
        mask = torch.zeros(len(sequences), LENGTH)
        for i, (prompt, response) in enumerate(sequences):
            tokens[i, : len(prompt) + len(response)] = torch.tensor(prompt + response)
            mask[i, len(prompt) - 1 : len(prompt) + len(response) - 1] = 1
        return cls(tokens[:, :-1].to(device), tokens[:, 1:].to(device), mask.to(device))

    def logprobs(self, token_losses: Tensor) -> Tensor:
        """[2 * pairs] log-probs summed over each response, from the model's -log p of every next token."""
        return -(token_losses * self.mask).sum(1)


def toy_pairs(count: int = 8) -> list[dict[str, list[int]]]:
    """Random token ids; a real trainer has its own data loader."""
    draw = torch.Generator().manual_seed(0)

    def ids(least: int, most: int) -> list[int]:
        length = int(torch.randint(least, most + 1, (), generator=draw))
        return torch.randint(VOCABULARY, (length,), generator=draw).tolist()

    return [{"prompt": ids(4, 12), "chosen": ids(3, 8), "rejected": ids(3, 8)} for _ in range(count)]


def build_model(weights: Path | None) -> tuple[GPTModel, TransformerConfig]:
    """A small Llama-like GPTModel of Megatron's own layers: random, or with the weights of a Megatron checkpoint."""
    config = TransformerConfig(
        num_layers=2, hidden_size=32, ffn_hidden_size=64, num_attention_heads=4, num_query_groups=2,
        normalization="RMSNorm", layernorm_epsilon=1e-6, gated_linear_unit=True, activation_func=F.silu,
        add_bias_linear=False, hidden_dropout=0.0, attention_dropout=0.0, init_method_std=0.1,
        tensor_model_parallel_size=parallel_state.get_tensor_model_parallel_world_size(),
        use_cpu_initialization=not torch.cuda.is_available(), bias_dropout_fusion=False, masked_softmax_fusion=False,
        gradient_accumulation_fusion=False, finalize_model_grads_func=finalize_model_grads,
    )  # fmt: skip
    spec = get_gpt_layer_local_spec(normalization="RMSNorm")
    model = GPTModel(
        config, spec, vocab_size=VOCABULARY, max_sequence_length=LENGTH, position_embedding_type="rope",
        share_embeddings_and_output_weights=False,
    )  # fmt: skip
    if weights is not None:
        model.load_state_dict(dist_checkpointing.load(model.sharded_state_dict(), str(weights)))
    return model if config.use_cpu_initialization else model.cuda(), config


def run(
    model: torch.nn.Module, batches: Sequence[MicroBatch], loss_func: Callable[..., Any], *, forward_only: bool = False
) -> list[dict[str, Tensor]]:
    """Micro-batches through Megatron's own pipeline schedule; what `loss_func` reports of each."""

    def forward_step(remaining: Iterator[MicroBatch], model: torch.nn.Module) -> tuple[Tensor, Callable[..., Any]]:
        batch = next(remaining)
        positions = torch.arange(LENGTH, device=batch.tokens.device).expand_as(batch.tokens)
        token_losses = model(batch.tokens, positions, None, labels=batch.labels)
        return token_losses, partial(loss_func, batch)

    reports: list[dict[str, Tensor]] = get_forward_backward_func()(
        forward_step_func=forward_step, data_iterator=iter(batches), model=[model], num_microbatches=len(batches),
        seq_length=LENGTH, micro_batch_size=2 * MICRO_BATCH, forward_only=forward_only,
    )  # fmt: skip
    return reports


def reference_loss_func(batch: MicroBatch, token_losses: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """For the pass before training: nothing to minimize, the log-probs to keep."""
    return token_losses.new_zeros(()), {"logprobs": batch.logprobs(token_losses)}


def spo_loss_func(
    batch: MicroBatch, token_losses: Tensor, *, objective: Callable[..., Any], divisor: int
) -> tuple[Tensor, dict[str, Tensor]]:
    """The objective of this micro-batch, times what Megatron will divide it by."""
    chosen, rejected = batch.logprobs(token_losses).chunk(2)
    chosen_tokens, rejected_tokens = batch.mask.sum(1).chunk(2)
    assert batch.reference is not None
    pairs = PairLogprobs(chosen, rejected, chosen_tokens, rejected_tokens, *batch.reference.chunk(2))
    loss, metrics = objective(pairs)
    return loss * divisor, metrics


def train(steps: int, pairs: Sequence[dict[str, list[int]]], weights: Path | None, device: torch.device) -> None:
    model, config = build_model(weights)
    model = DistributedDataParallel(config, DistributedDataParallelConfig(), model)
    settings = OptimizerConfig(optimizer="adam", lr=LEARNING_RATE, weight_decay=0.0, adam_beta2=0.999, clip_grad=1.0)
    optimizer = get_megatron_optimizer(settings, [model])

    batch_chosen_tokens = sum(len(pair["chosen"]) for pair in pairs)  # every step takes all pairs
    ranks = parallel_state.get_data_parallel_world_size()
    mine = pairs[parallel_state.get_data_parallel_rank() :: ranks]
    batches = [MicroBatch.of(mine[i : i + MICRO_BATCH], device) for i in range(0, len(mine), MICRO_BATCH)]
    divisor = len(batches) * ranks  # Megatron averages over the micro-batches, its DDP over the data-parallel ranks

    with torch.no_grad():  # the reference is the model before training
        for batch, report in zip(batches, run(model, batches, reference_loss_func, forward_only=True), strict=True):
            batch.reference = report["logprobs"]

    state = SPO.initial_state()
    for step in range(steps):
        (pass_,) = SPO.plan(step, state).passes
        objective = partial(
            SPO.micro_batch_loss, pass_=pass_, state=state,
            batch_pairs=len(pairs), batch_chosen_tokens=batch_chosen_tokens,
        )  # fmt: skip
        model.zero_grad_buffer()
        optimizer.zero_grad()
        reports = run(model, batches, partial(spo_loss_func, objective=objective, divisor=divisor))
        _, grad_norm, _ = optimizer.step()

        names = list(reports[0])
        sums = torch.stack([torch.stack([report[name] for name in names]) for report in reports]).sum(0)
        dist.all_reduce(sums, group=parallel_state.get_data_parallel_group())
        totals = dict(zip(names, sums.tolist(), strict=True))
        state = SPO.next_state(state, totals)
        if dist.get_rank() == 0:
            line = {"step": step + 1, **totals, "spo/gap": state.schedule.gap, "grad_norm": float(grad_norm)}
            print(json.dumps(line), flush=True)


def join(tensor_parallel: int) -> torch.device:
    """Join the processes that torchrun started, or run alone, in Megatron's layout."""
    on_cpu = install_cpu_bridge()
    if "RANK" not in os.environ:
        os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    dist.init_process_group("gloo" if on_cpu else "nccl")
    device = torch.device("cpu") if on_cpu else torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    if not on_cpu:
        torch.cuda.set_device(device)
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=tensor_parallel)
    torch.manual_seed(0)
    model_parallel_cuda_manual_seed(0)
    return device


def main() -> None:
    parser = argparse.ArgumentParser(description="Two steps of DPO + SPO in a plain Megatron-Core training loop.")
    parser.add_argument("--steps", type=int, default=2, help="optimizer steps [%(default)s]")
    parser.add_argument("--tensor", type=int, default=1, help="tensor-parallel processes [%(default)s]")
    parser.add_argument("--pairs", type=Path, help="JSONL of token ids: prompt, chosen, rejected [random ones]")
    parser.add_argument("--weights", type=Path, help="Megatron folder that `megatron-spo convert` wrote [random]")
    options = parser.parse_args()
    lines = options.pairs.read_text().splitlines() if options.pairs else []
    pairs = [json.loads(line) for line in lines] or toy_pairs()
    train(options.steps, pairs, options.weights, device=join(options.tensor))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
