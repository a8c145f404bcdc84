"""Estimates the time of a step from FLOP/s of matrix products (calibrated) and from bandwidths of everything else."""

from dataclasses import dataclass

from megatron_spo.config.topology import stages_of
from megatron_spo.planner.flops import Flops, forward_flops, step_flops
from megatron_spo.planner.gpus import ACHIEVED_BANDWIDTH, Gpu
from megatron_spo.planner.memory import Setting, whole_layer
from megatron_spo.planner.parameters import stage_parameters
from megatron_spo.planner.rows import Batch, RowSize

ELEMENTWISE_FORWARD, ELEMENTWISE_BACKWARD = 2, 3
"""Memory transfers of a layer's activations: a write and a read; a read, and a write and a read of gradients."""
OPTIMIZER_TRAFFIC = 30
"""Bytes that AdamW transfers per parameter of a shard: 4 fp32 reads, 3 fp32 writes, 1 bf16 write."""


@dataclass(frozen=True)
class StepTime:
    """Seconds of an optimizer step on the slowest rank, by part.

    Attributes:
        compute: matrix products and memory transfers of the slowest stage over all rows.
        tensor: communication of tensor, context and expert parallelism.
        bubble: waiting for other pipeline stages.
        data: communication of gradients and weights between data-parallel ranks that computation does not hide.
        optimizer: the optimizer update.
        reference: a forward pass without adapters, if there is no reference cache.
    """

    compute: float
    tensor: float
    bubble: float
    data: float
    optimizer: float
    reference: float

    @property
    def total(self) -> float:
        return sum(vars(self).values())


@dataclass(frozen=True)
class RowCost:
    """Seconds of one row: computation and communication of one layer, log-prob head, and transfer to the next pipeline
    stage."""

    layer: float
    exchange: float
    head: float
    neighbour: float


def link(gpu: Gpu, span: int) -> float:
    """Returns the bandwidth in bytes per second between GPUs of a group that spans this many consecutive GPUs."""
    return (gpu.nvlink if span <= gpu.per_node else gpu.network) * ACHIEVED_BANDWIDTH


def step_time(setting: Setting, gpu: Gpu, batch: Batch) -> StepTime:
    """Returns the time of a step with one global batch."""
    # with a separate SFT set, one pass is over the pairs and the other over the SFT rows
    passes = 1 if setting.config.spo.sft_data else setting.config.spo.spec.passes
    # every rank waits for the slowest rank
    compute, exchange, bubble = max((_pipeline(setting, gpu, rows, backward=True) for rows in batch), key=sum)
    reference = 0.0
    if setting.config.runs_reference:
        reference = max(sum(_pipeline(setting, gpu, rows, backward=False)) for rows in batch)
    data, optimizer = _update(setting, gpu, hidden=compute / max(len(batch[0]), 1))
    return StepTime(passes * compute, passes * exchange, passes * bubble, passes * data, optimizer, reference)


def reference_time(setting: Setting, gpu: Gpu, batch: Batch) -> float:
    """Returns the seconds of a forward pass over one global batch."""
    return max(sum(_pipeline(setting, gpu, rows, backward=False)) for rows in batch)


def _pipeline(setting: Setting, gpu: Gpu, rows: list[RowSize], *, backward: bool) -> tuple[float, float, float]:
    """Returns the seconds of computation, communication and waiting for the rows of one data-parallel rank."""
    pipeline = setting.topology.pipeline
    costs = [row_cost(setting, gpu, row, backward=backward) for row in rows]
    layer, exchange, head, neighbour = (
        sum(getattr(cost, name) for cost in costs) for name in ("layer", "exchange", "head", "neighbour")
    )
    held = stages_of(setting.shape, setting.config.parallel)
    layers = [sum(held[stage::pipeline]) for stage in range(pipeline)]
    compute = [count * layer + (head if stage == pipeline - 1 else 0.0) for stage, count in enumerate(layers)]
    sent = [count * exchange + neighbour for count in layers]
    totals = [one + other for one, other in zip(compute, sent, strict=True)]
    slowest = max(range(pipeline), key=totals.__getitem__)
    fill = (sum(totals) - totals[slowest]) / len(rows) / setting.topology.virtual
    return compute[slowest], sent[slowest], fill


def row_cost(setting: Setting, gpu: Gpu, row: RowSize, *, backward: bool) -> RowCost:
    """Returns the time of the forward pass, and with `backward` also of the backward pass."""
    config = setting.config
    forward = forward_flops(setting.shape, row, context=setting.topology.context)
    flops = step_flops(config, forward) if backward else forward
    traffic = ELEMENTWISE_FORWARD + (ELEMENTWISE_BACKWARD if backward else 0)
    if backward and config.parallel.recompute == "full":
        traffic += ELEMENTWISE_FORWARD
    moved = traffic * whole_layer(setting, row, selective=False) / (gpu.hbm * ACHIEVED_BANDWIDTH)
    return RowCost(
        layer=_products(setting, gpu, Flops(flops.linear, flops.attention, 0.0)) + moved,
        exchange=_layer_exchange(setting, gpu, row, backward=backward),
        head=_products(setting, gpu, Flops(0.0, 0.0, flops.head)),
        neighbour=_to_neighbour(setting, gpu, row, backward=backward),
    )


def _products(setting: Setting, gpu: Gpu, flops: Flops) -> float:
    """Returns the seconds of matrix products. With fp8, attention and head use bf16. fp32 has half the rate of bf16
    (TF32)."""
    config, ranks = setting.config, setting.topology.tensor * setting.topology.context
    plain = gpu.bf16 * gpu.efficiency * (0.5 if config.precision.dtype == "fp32" else 1.0)
    linear = plain if config.precision.fp8 is None or gpu.fp8 is None else gpu.fp8 * gpu.efficiency
    return (flops.linear / linear + (flops.attention + flops.head) / plain) / ranks


def _layer_exchange(setting: Setting, gpu: Gpu, row: RowSize, *, backward: bool) -> float:
    """Returns the seconds of the collectives of a layer. The backward pass has as many as the forward pass."""
    topology, shape = setting.topology, setting.shape
    tensor, context = topology.tensor, topology.context
    tokens = row.tokens / context
    # two gathers and two scatters, or two all-reduces, of the hidden states
    seconds = 4 * tokens * shape.hidden * setting.item * (tensor - 1) / tensor / link(gpu, tensor)
    both = 2 * shape.kv_heads * shape.head_dim / tensor * setting.item  # keys and values of a token
    seconds += row.tokens * both * (context - 1) / context / link(gpu, tensor * context)
    if topology.expert > 1 and shape.experts is not None:  # dispatch of tokens to experts and back
        routed = tokens / setting.split * shape.experts.per_token * shape.hidden * setting.item
        span = topology.expert * topology.expert_tensor
        seconds += 2 * routed * (topology.expert - 1) / topology.expert / link(gpu, span)
    if not backward:
        return seconds
    return seconds * (3 if setting.config.parallel.recompute == "full" else 2)


def _to_neighbour(setting: Setting, gpu: Gpu, row: RowSize, *, backward: bool) -> float:
    """Returns the seconds to send a row to the next stage, and its gradient back, for all chunks of layers."""
    topology = setting.topology
    if topology.pipeline == 1:
        return 0.0
    size = row.tokens / topology.context * setting.shape.hidden * setting.item / setting.split
    return (2 if backward else 1) * topology.virtual * size / link(gpu, topology.world)


def _update(setting: Setting, gpu: Gpu, *, hidden: float) -> tuple[float, float]:
    """Returns the seconds to reduce gradients and gather weights, minus `hidden` seconds, and those of AdamW."""
    topology = setting.topology
    ranks = topology.data * topology.context
    trained = max(stage_parameters(setting.config, setting.shape, s).trained for s in range(topology.pipeline))
    speed = link(gpu, topology.tensor * ranks)
    exchange = (4 + setting.item) * trained * (ranks - 1) / ranks / speed
    return max(0.0, exchange - hidden), OPTIMIZER_TRAFFIC * trained / ranks / (gpu.hbm * ACHIEVED_BANDWIDTH)
