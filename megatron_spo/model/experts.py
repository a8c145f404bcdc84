"""The mixture of experts: routers that can be balanced over the global batch, and dispatch without a GPU.

Load balancing: the loss of a layer is E * sum_i f_i * P_i over its E experts, where f_i is the share of assignments of
expert i and P_i the mean of its router probability; it is 1 for an even load (Switch Transformer, arXiv 2101.03961). f
is a count and has no gradient. Megatron and transformers take f and P from one micro-batch, so their loss depends on
which pairs share a row. Here P is the mean over the tokens of the global batch, whose number is known beforehand, and f
is that of the previous global batch. The gradient is then a sum over tokens, which is the same in every layout,
micro-batch and packing, and no router waits for another. Padding tokens are excluded.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler, topk_routing_with_score_function
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher
from torch import Tensor

from megatron_spo.runtime.device import to_device

Load = list[list[float]]
"""[layers][E] share of each layer's assignments that each expert gets."""


class BalancedRouter(TopKRouter):
    """Megatron's router; within `balancing` it adds the gradient of the load-balancing loss."""

    pull: Tensor | None = None
    """[E] derivative of the loss with respect to a token's probability of each expert."""
    seen: Tensor
    """fp64 [2, E]: number of tokens routed to each expert, and the sum of all tokens' probabilities of it."""

    def gating(self, input: Tensor) -> Tensor:
        """Returns logits [T, 1, E] in fp32.

        Megatron's own method needs Transformer Engine (megatron-core 0.16.1, moe_utils.py: te_general_gemm is undefined
        without it).
        """
        return F.linear(input.float(), self.weight.float())

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Returns the weights and the bool map [T, E] of the experts that each token is routed to."""
        logits = logits.view(-1, self.num_experts)
        weights, chosen = topk_routing_with_score_function(
            logits, self.topk, use_pre_softmax=self.config.moe_router_pre_softmax
        )
        if self.pull is None or not torch.is_grad_enabled():  # recomputed layers run once without gradients
            return weights, chosen
        assert padding_mask is not None
        real = ~padding_mask.reshape(-1, 1)
        probabilities = logits.softmax(-1) * real
        self.seen += torch.stack([(chosen & real).sum(0), probabilities.detach().sum(0, dtype=torch.float64)])
        return MoEAuxLossAutoScaler.apply(weights, (probabilities @ self.pull).sum()), chosen


def _routers(chunks: Sequence[torch.nn.Module]) -> Iterator[tuple[int, BalancedRouter]]:
    """Yields this rank's routers with the index of their layer in the model."""
    for chunk in chunks:
        for module in chunk.modules():
            if isinstance(module, BalancedRouter):
                assert module.layer_number is not None
                yield module.layer_number - 1, module


def freeze_routers(chunks: Sequence[torch.nn.Module]) -> None:
    """Freezes the routers' weights; call it before the optimizer is created."""
    for _, router in _routers(chunks):
        router.weight.requires_grad_(False)


@contextmanager
def balancing(chunks: Sequence[torch.nn.Module], load: Load | None, scale: float) -> Iterator[None]:
    """Adds the gradient of each layer's load-balancing loss, times `scale`, within the context.

    Args:
        chunks: this rank's chunks of the model.
        load: f of each layer; None before the first batch, which gets no gradient, as for an even load.
        scale: factor of the loss per token.
    """
    for layer, router in _routers(chunks):
        count, device = router.num_experts, router.weight.device
        shares = [0.0] * count if load is None else load[layer]
        router.pull = to_device(np.array(shares, dtype=np.float32), device) * (scale * count)
        router.seen = torch.zeros(2, count, dtype=torch.float64, device=device)
    try:
        yield
    finally:
        for _, router in _routers(chunks):
            router.pull = None


def balance(chunks: Sequence[torch.nn.Module], layers: int) -> tuple[Load, float]:
    """Returns the load of the rows of all ranks in the last `balancing` context, and their load-balancing loss,
    averaged over the layers. All ranks must call it together."""
    routers = dict(_routers(chunks))
    sample = next(iter(routers.values())).seen
    totals = sample.new_zeros(2, layers, sample.shape[1])
    for layer, router in routers.items():
        totals[:, layer] = router.seen
    dist.all_reduce(totals)  # no two ranks count the same token in the same layer
    shares, means = (total / total.sum(-1, keepdim=True) for total in totals.cpu())
    loss = (shares * means).sum(-1).mean() * shares.shape[-1]
    return [[float(share) for share in row] for row in shares], float(loss)


class _DispatchWithoutGpu(MoEAlltoAllTokenDispatcher):
    """Converts the split sizes of the all-to-all to numbers on the CPU, too; Megatron does it only for CUDA tensors
    (megatron-core 0.16.1, moe_utils.py, maybe_move_tensor_to_cpu)."""

    def _maybe_dtoh_and_synchronize(self, point: str, tokens_per_expert: Any = None) -> Any:
        if point == self.cuda_dtoh_point:
            for name in ("input_splits", "output_splits", "output_splits_tp"):
                sizes = getattr(self, name)
                if isinstance(sizes, Tensor):
                    setattr(self, name, sizes.numpy())
        return tokens_per_expert


def dispatch_without_gpu(model: torch.nn.Module) -> None:
    """Makes the token dispatchers of a built model work with CPU tensors."""
    for module in model.modules():
        if isinstance(module, MoELayer):
            module.token_dispatcher.__class__ = _DispatchWithoutGpu
