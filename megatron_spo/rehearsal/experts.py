"""Dispatches tokens to experts evenly, because the routers of a model without data choose none."""

from typing import Any

import numpy as np
import torch
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher
from torch import Tensor

from megatron_spo.rehearsal.watch import Watch, real


class EvenDispatch(MoEAlltoAllTokenDispatcher):
    """Megatron's dispatcher; each expert gets the same number of tokens."""

    watch: Watch

    def _maybe_dtoh_and_synchronize(self, point: str, tokens_per_expert: Any = None) -> Any:
        """Megatron copies the counts to the host here, and waits for them at a later point."""
        if point == self.cuda_sync_point:
            self.watch.wait("synchronize")
        if point != self.cuda_dtoh_point:
            return tokens_per_expert
        routed = self.routing_map.shape[0] * self.config.moe_router_topk
        counts = np.full(self.num_experts, routed // self.num_experts)
        counts[: routed % self.num_experts] += 1
        mine = counts[self.local_expert_indices]
        ranks = self.tp_size * self.ep_size
        if ranks > 1:
            self.input_splits = counts.reshape(self.ep_size, self.num_local_experts).sum(axis=1)
            self.output_splits = np.full(self.ep_size, mine.sum())
            self.output_splits_tp = np.full(self.tp_size, mine.sum() * self.ep_size)
        return real(mine * ranks)


def dispatch_evenly(model: torch.nn.Module, watch: Watch) -> None:
    """Replaces the token dispatchers of a built model."""
    for module in model.modules():
        if isinstance(module, MoELayer):
            module.token_dispatcher.__class__ = EvenDispatch
            module.token_dispatcher.watch = watch


def sort_chunks(
    tokens: Tensor, sizes: Tensor, order: Tensor, probs: Tensor | None = None, fused: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Replaces `sort_chunks_by_idxs`, which splits the tokens by the counts of experts; here they become two chunks."""
    half = len(tokens) // 2
    parts = [torch.cat(one.split([half, len(one) - half])) if one is not None else None for one in (tokens, probs)]
    assert parts[0] is not None
    return parts[0], parts[1]
