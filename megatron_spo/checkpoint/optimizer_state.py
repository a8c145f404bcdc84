"""The distributed optimizer's state in a checkpoint: tensors with the parameters' shapes, in any layout.

Each tensor is written by the data-parallel rank that holds most of it; the other ranks send it their parts. Megatron's
own code for these files (megatron-core 0.16.1, sharded_param_state_fully_reshardable) gathers the whole state on every
data-parallel rank, and the first of them writes all of it.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from torch import Tensor

STATES = ("param", "exp_avg", "exp_avg_sq")
Described: TypeAlias = ShardedTensor | ShardedTensorFactory


@dataclass(frozen=True)
class _Piece:
    """The part of a flattened parameter that a data-parallel rank holds: elements from `begin` to `end` (exclusive)."""

    rank: int
    begin: int
    end: int


class OptimizerState:
    """The state of one of Megatron's distributed optimizers, for saving or loading."""

    def __init__(self, optimizer: Any, model: dict[str, Any], *, loading: bool) -> None:
        """Sets `sharded` to this rank's part of a sharded state dict; all ranks must call it together.

        `model`: sharded state dict of the model's chunks; its tensors, too, are divided among the data-parallel ranks.
        """
        self._optimizer = optimizer
        self._group = optimizer.data_parallel_group
        self._rank = self._group.rank()
        described = {
            entry.data: entry
            for entry in nested_values(model)
            if isinstance(entry, ShardedTensor | ShardedTensorFactory)
        }
        self._to_fill: dict[str, tuple[Tensor, _Piece]] = {}
        self.sharded: dict[str, Described] = {}
        for number, (parameter, pieces) in enumerate(self._parameters()):
            entry = described[parameter]
            writer = max(pieces, key=lambda piece: piece.end - piece.begin).rank
            entry.replica_id = (*entry.replica_id[:-1], (self._rank - writer) % self._group.size())
            mine = next((piece for piece in pieces if piece.rank == self._rank), None)
            if mine is None:
                continue
            held = self._held(parameter)
            if len(pieces) == 1:
                whole = held
            elif loading:
                whole = {name: torch.empty(parameter.shape, dtype=torch.float32) for name in STATES}
            else:
                whole = self._gathered(parameter, held, pieces, writer)
            for name, tensor in whole.items():
                place, key = f"{number}.{name}", f"optimizer.state.{name}.{entry.key}"  # layers may share a key
                if loading:
                    self._to_fill[place] = held[name], mine
                kind = {} if isinstance(entry, ShardedTensorFactory) else {"dtype": tensor.dtype}
                self.sharded[place] = replace(entry, key=key, data=tensor.view(parameter.shape), **kind)

    @torch.no_grad()
    def fill(self, stored: dict[str, Tensor], step: int) -> None:
        """Copies the state that was loaded for `sharded`, and the step count, into the optimizer."""
        for place, (held, piece) in self._to_fill.items():
            found = stored[place].flatten()
            if found.data_ptr() != held.data_ptr():  # otherwise it was loaded in place
                held.copy_(found[piece.begin : piece.end])
        for group in self._optimizer.optimizer.param_groups:
            group["step"] = step

    def _parameters(self) -> Iterator[tuple[Tensor, list[_Piece]]]:
        """Yields every parameter with its pieces, in the same order on all data-parallel ranks."""
        for buffer in self._optimizer.buffers:
            for parameter, (begin, end, index) in buffer.param_index_map.items():
                bucket = buffer.buckets[index]
                share = bucket.grad_data.numel() // self._group.size()
                first, last = begin - bucket.offset, end - bucket.offset
                yield (
                    parameter,
                    [
                        _Piece(rank, max(first, rank * share) - first, min(last, (rank + 1) * share) - first)
                        for rank in range(first // share, (last - 1) // share + 1)
                    ],
                )

    def _held(self, parameter: Tensor) -> dict[str, Tensor]:
        """Returns this rank's piece of a parameter and of its moments, fp32."""
        held = self._optimizer._get_main_param_and_optimizer_states(parameter)
        return {name: held[name].detach() for name in STATES}

    def _gathered(
        self, parameter: Tensor, held: dict[str, Tensor], pieces: list[_Piece], writer: int
    ) -> dict[str, Tensor]:
        """Returns the whole parameter and moments on rank `writer`, and {} on the other ranks, which send their piece
        `held`."""
        ranks, own = dist.get_process_group_ranks(self._group), torch.stack([held[name] for name in STATES])
        if self._rank != writer:
            dist.send(own, ranks[writer], group=self._group)
            return {}
        whole = torch.empty(len(STATES), parameter.numel(), dtype=torch.float32, device=parameter.device)
        for piece in pieces:
            part = own
            if piece.rank != self._rank:
                part = torch.empty(len(STATES), piece.end - piece.begin, dtype=torch.float32, device=own.device)
                dist.recv(part, ranks[piece.rank], group=self._group)
            whole[:, piece.begin : piece.end] = part
        return dict(zip(STATES, whole.cpu(), strict=True))
