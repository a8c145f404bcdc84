"""Loads the model's weights from a model folder, or initialises them randomly.

Weights are addressed by the global key, shape and offset that Megatron's sharded state dict gives for each local
tensor, so the same code works for every tensor and pipeline layout, and each rank reads only its slices.
"""

import zlib
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Protocol

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories

from megatron_spo.config.model_shape import ModelShape
from megatron_spo.meter import BYTES, Meter
from megatron_spo.model.build import PairModel
from megatron_spo.model.families import Mapping, mappings
from megatron_spo.model.transforms import LazyTensor, PaddedVocabulary


class Weights(Protocol):
    """Tensors by Hugging Face name, of which only slices are read."""

    def slice(self, name: str) -> LazyTensor:
        """Returns one tensor without reading it."""


def local_tensors(model: PairModel, shape: ModelShape) -> Iterator[tuple[Mapping, ShardedTensor, tuple[slice, ...]]]:
    """Yields each local tensor with its row of the family table and its index in the global tensor."""
    table = {(row.key, row.at): row for row in mappings(shape)}
    sharded = model.sharded_state_dict()
    apply_factories(sharded)
    for tensor in nested_values(sharded):
        if not isinstance(tensor, ShardedTensor):
            continue
        stacked = tensor.prepend_axis_num
        at = tuple(int(offset) for offset in tensor.global_offset[:stacked])
        index = tuple(
            slice(int(offset), int(offset) + int(size))
            for offset, size in zip(tensor.global_offset[stacked:], tensor.local_shape, strict=True)
        )
        yield table[tensor.key, at], tensor, index


@torch.no_grad()
def load_hf_weights(
    model: PairModel, shape: ModelShape, source: AbstractContextManager[Weights], *, shown: bool = False
) -> None:
    """Loads weights by their Hugging Face names; reads only this rank's slices. `shown` logs the progress."""
    tensors = list(local_tensors(model, shape))
    total = sum(tensor.data.nbytes for _, tensor, _ in tensors)
    with source as weights, Meter("loading the model", total, BYTES, shown=shown) as meter:
        for row, tensor, index in tensors:
            sources = [weights.slice(name) for name in row.sources]
            tensor.data.copy_(row.transform.read(sources, index).view(tensor.data.shape))
            meter.advance(tensor.data.nbytes)


@torch.no_grad()
def fill_randomly(model: PairModel, shape: ModelShape, seed: int) -> None:
    """Initialises the weights as transformers does for a new model: normal matrices, neutral norms, zero biases.

    Each global tensor has its own generator, seeded by its name, so the model is the same in every layout.
    """
    for row, tensor, index in local_tensors(model, shape):
        if row.is_norm:
            tensor.data.fill_(1.0 if shape.gemma is None else 0.0)
        elif row.key.endswith("bias"):
            tensor.data.zero_()
        else:
            where = " ".join(map(str, row.at)) or None
            generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {row.key} {where}".encode()))
            rows, columns = (int(size) for size in tensor.global_shape[tensor.prepend_axis_num :])
            full = torch.randn(rows, columns, generator=generator) * shape.initializer_range
            if isinstance(row.transform, PaddedVocabulary):
                full[shape.vocab :] = 0
            tensor.data.copy_(full[index].view(tensor.data.shape))
