"""Counts the memory of a real model during training: parameters, buffers and tensors kept by autograd."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from megatron_spo.config.model_shape import ModelShape
from megatron_spo.config.schema import Config
from megatron_spo.config.topology import make_topology
from megatron_spo.data.rows import PackedRow
from megatron_spo.planner.memory import Setting
from megatron_spo.planner.rows import RowSize, segments_of
from megatron_spo.runtime import env, processes
from tests.support.megatron import example, row_of

CONFIG = {"output": "run", "model": {"path": "model"}, "data": {"train": "pairs.jsonl"}}
SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "num_hidden_layers": 4,
    "head_dim": 16,
}


def packed_row() -> PackedRow:
    """Returns a row with two pairs of different lengths, 290 tokens."""
    first = example(range(3, 43), range(50, 100), range(101, 141))
    return row_of([first, example(range(3, 63), range(50, 80), range(101, 171))], multiple=2)


def as_planned(row: PackedRow) -> RowSize:
    """Returns the planner's sizes of the same row."""
    _, shared, chosen, rejected = row.segments.T
    segments = segments_of(shared, chosen, rejected, len(row.tokens) - row.real_tokens)
    return RowSize(len(row.tokens), row.real_tokens, len(row.targets), 0, segments)


@dataclass
class Kept:
    """Counts the bytes of the storages that autograd keeps, and their maximum; storages in `apart` are not counted."""

    apart: set[int]
    now: int = 0
    most: int = 0
    _uses: dict[int, int] = field(default_factory=dict)

    @contextmanager
    def counting(self) -> Iterator[None]:
        with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor: _Handle(self, tensor), lambda handle: handle.tensor
        ):
            yield

    def change(self, storage: Any, by: int) -> None:
        pointer = storage.data_ptr()
        before = self._uses.get(pointer, 0)
        self._uses[pointer] = before + by
        if pointer not in self.apart and (before == 0 or before + by == 0):
            self.now += storage.nbytes() * by
            self.most = max(self.most, self.now)


class _Handle:
    """Stands for a tensor that autograd keeps, until autograd frees it."""

    def __init__(self, kept: Kept, tensor: Tensor) -> None:
        self._kept, self.tensor = kept, tensor
        kept.change(tensor.untyped_storage(), 1)

    def __del__(self) -> None:
        self._kept.change(self.tensor.untyped_storage(), -1)


def counted(config: Config, shape: ModelShape, rows: int) -> dict[str, float]:
    """Trains one step on `rows` rows in the configured layout and returns the bytes of this rank by part."""
    topology = make_topology(config.parallel, env.world_size())
    runtime = processes.start(topology, seed=0, threads=1)
    from megatron.core import parallel_state

    from megatron_spo.model.build import build_model
    from megatron_spo.model.experts import freeze_routers
    from megatron_spo.model.forward import run_rows
    from megatron_spo.model.lora import add_adapters
    from megatron_spo.model.optimizer import make_trainable
    from megatron_spo.model.settings import transformer_config
    from megatron_spo.model.weights import fill_randomly
    from megatron_spo.train import gradients

    chunks = build_model(shape, transformer_config(shape, config.parallel, config.precision))
    for chunk in chunks:
        fill_randomly(chunk, shape, 0)
    if config.model.router_aux_loss is None:
        freeze_routers(chunks)
    add_adapters(chunks, shape, config.lora, 0)
    trainable = make_trainable(chunks, chunks[0].config, config.optimizer, overlap=False)
    parameters = [p for chunk in chunks for p in chunk.parameters()]
    kept = Kept({p.untyped_storage().data_ptr() for p in parameters})
    gradients.clear(trainable)
    with kept.counting():
        packed = [packed_row() for _ in range(rows)]
        run_rows(trainable.wrapped, packed, lambda _, sums: (sums.sum(), sums.detach()), runtime=runtime, backward=True)
    trainable.optimizer.prepare_grads()
    trainable.optimizer.step_with_ready_grads()
    buffers = [b for chunk in trainable.wrapped for b in (*chunk.buffers, *chunk.expert_parallel_buffers)]
    state = [value for inner in trainable.optimizer.chained_optimizers for value in _tensors(inner)]
    return {
        "stage": parallel_state.get_pipeline_model_parallel_rank(),
        "weights": sum(p.numel() * p.element_size() for p in parameters),
        "gradients": sum(buffer.grad_data.nbytes for buffer in buffers),
        "optimizer": sum(tensor.numel() * tensor.element_size() for tensor in state),
        "activations": kept.most,
    }


def _tensors(inner: Any) -> list[Tensor]:
    """Returns the bytes of the optimizer: moments, and main parameters if the weights are not fp32."""
    moments = [state[name] for state in inner.optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    return moments + [p for group in inner.shard_fp32_from_float16_groups for p in group if p is not None]


def setting(config: Config, shape: ModelShape, world_size: int) -> Setting:
    return Setting(config, shape, make_topology(config.parallel, world_size), "cpu")
