"""Counts the parameters that a rank holds and trains."""

from collections.abc import Mapping
from dataclasses import dataclass

from megatron_spo.config.model_shape import ModelShape
from megatron_spo.config.schema import Config, LoraConfig, ParallelConfig
from megatron_spo.config.topology import expert_tensor, padded_vocabulary, stages_of

ROW_PARALLEL = ("o_proj", "down_proj")
"""Projections whose input features tensor parallelism splits."""


@dataclass(frozen=True)
class Parameters:
    """Number of parameters of one rank, of the dense part and of experts: held, and trained."""

    dense: int
    experts: int
    trained_dense: int
    trained_experts: int

    @property
    def held(self) -> int:
        return self.dense + self.experts

    @property
    def trained(self) -> int:
        return self.trained_dense + self.trained_experts


def stage_parameters(config: Config, shape: ModelShape, stage: int) -> Parameters:
    """Returns the number of parameters of a rank of this pipeline stage; it is the same for all ranks of a stage."""
    tensor, pipeline = config.parallel.tensor, config.parallel.pipeline
    layers = sum(stages_of(shape, config.parallel)[stage::pipeline])
    ends = 0
    table = padded_vocabulary(shape, tensor) // tensor * shape.hidden
    first, last = stage == 0, stage == pipeline - 1
    if first:
        ends += table
    if last:
        ends += shape.hidden + (0 if shape.tied and first else table)
    parts = _layer(config.parallel, shape)
    dense, experts = layers * (parts["attention"] + parts["mlp"] + parts["router"]) + ends, layers * parts["experts"]
    if config.lora.rank:
        adapters = layers * _adapters(config.lora, tensor, shape)
        return Parameters(dense + adapters, experts, adapters, 0)
    frozen = layers * parts["router"] if config.model.router_aux_loss is None else 0
    return Parameters(dense, experts, dense - frozen, experts)


def _layer(parallel: ParallelConfig, shape: ModelShape) -> Mapping[str, int]:
    """Returns the parameters of a layer on one rank by part. Norms belong to the part that follows them."""
    tensor, experts = parallel.tensor, shape.experts
    norms = shape.norm_weights - shape.hidden  # one norm belongs to the feed-forward network
    attention = shape.attention_weights // tensor + shape.qkv_biases // tensor + norms
    if experts is None:
        mlp = 3 * shape.hidden * shape.ffn // tensor + shape.hidden
        return {"attention": attention, "mlp": mlp, "router": 0, "experts": 0}
    expert = 3 * shape.hidden * experts.ffn // expert_tensor(parallel)
    return {
        "attention": attention,
        "mlp": shape.hidden,
        "router": experts.count * shape.hidden,
        "experts": experts.count // parallel.expert * expert,
    }


def _adapters(lora: LoraConfig, tensor: int, shape: ModelShape) -> int:
    """Returns the adapter parameters of a layer on one tensor-parallel rank. One of A [rank, in] and B [out, rank] is
    split."""
    total = 0
    for projection in lora.targets:
        columns, rows = shape.projections[projection]
        cut, whole = (columns, rows) if projection in ROW_PARALLEL else (rows, columns)
        total += lora.rank * (cut // tensor + whole)
    return total
