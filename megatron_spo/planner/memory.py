"""Estimates the memory of a rank in bytes, by part. tests/planner compares the estimates with real models.

The activations that a layer keeps for the backward pass depend on its implementation: torch on a CPU ("cpu") or a GPU
("torch"), or the fused layers of Transformer Engine ("engine"). Only the first can be measured without a GPU; the
others are derived from the tensors that their kernels keep.
"""

from dataclasses import dataclass, fields
from typing import Literal

from megatron_spo.config.model_shape import ModelShape
from megatron_spo.config.schema import Config
from megatron_spo.config.topology import Topology, padded_vocabulary, stages_of
from megatron_spo.planner.gpus import GIB
from megatron_spo.planner.parameters import ROW_PARALLEL, stage_parameters
from megatron_spo.planner.rows import RowSize

Kernels = Literal["cpu", "torch", "engine"]

LOGITS_PER_CHUNK = {"cpu": 2**25, "torch": 2**26, "engine": 2**26}
"""Maximum number of logits that the log-prob head holds at a time (model/logprobs.py)."""
RESERVED = {"cpu": 0.28 * GIB, "torch": 3 * GIB, "engine": 3 * GIB}
"""Bytes of a process without tensors. CPU: Python, torch and Megatron, measured. GPU: CUDA context, NCCL buffers and
fragmentation, assumed."""


@dataclass(frozen=True)
class Setting:
    """A configuration, model, layout, and the implementation of its layers."""

    config: Config
    shape: ModelShape
    topology: Topology
    kernels: Kernels

    @property
    def item(self) -> int:
        """Bytes of a weight or an activation."""
        return 2 if self.config.precision.dtype == "bf16" else 4

    @property
    def split(self) -> int:
        """Number of ranks over which sequence parallelism splits the tokens outside of linear layers."""
        return self.topology.tensor if self.config.parallel.sequence else 1

    @property
    def masked(self) -> bool:
        """Whether the attention kernel uses a mask instead of variable-length segments (model/kernels.py)."""
        return self.kernels == "cpu" or self.item == 4 or self.topology.context > 1


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank, by part.

    Attributes:
        activations: activations of all rows in flight, kept for the backward pass.
        head: chunks of logits and gradients of the log-prob head.
        buffers: temporary memory of a layer's backward pass, or of the optimizer step beyond activations and head.
        schedule: gradients that lookahead and barrier keep during the last pass.
        reserved: memory of the process without tensors.
    """

    weights: float
    gradients: float
    optimizer: float
    activations: float
    head: float
    buffers: float
    schedule: float
    reserved: float

    @property
    def total(self) -> float:
        return sum(getattr(self, field.name) for field in fields(self))


def worst_memory(setting: Setting, row: RowSize, rows: int) -> tuple[int, Memory]:
    """Returns the pipeline stage that needs the most memory, and its memory, for `rows` rows per step like `row`."""
    every = [stage_memory(setting, stage, row, rows) for stage in range(setting.topology.pipeline)]
    stage = max(range(len(every)), key=lambda i: every[i].total)
    return stage, every[stage]


def stage_memory(setting: Setting, stage: int, row: RowSize, rows: int) -> Memory:
    """Returns the memory of a rank of this pipeline stage."""
    config, topology = setting.config, setting.topology
    held = stage_parameters(config, setting.shape, stage)
    # two fp32 moments, and for bf16 weights an fp32 main copy
    state = 12 if setting.item == 2 else 8
    shard = held.trained_dense / (topology.data * topology.context) + held.trained_experts / _expert_data(topology)
    activations = stage_activations(setting, stage, row, rows)
    head = _head_buffers(setting, row) if stage == topology.pipeline - 1 else 0
    copy, spec = 4 * shard, config.spo.spec
    schedule = copy * spec.gradients_kept
    update = copy * (spec.passes if spec.passes > 1 else 0) - schedule  # after the rows: a gradient of each pass
    return Memory(
        weights=setting.item * held.held + _quantized_weights(setting, stage),
        gradients=4 * held.trained,
        optimizer=state * shard,
        activations=activations,
        head=head,
        buffers=max(_layer_buffers(setting, row), update - activations - (0 if setting.kernels == "cpu" else head)),
        schedule=schedule,
        reserved=RESERVED[setting.kernels],
    )


def _quantized_weights(setting: Setting, stage: int) -> float:
    """Returns the bytes of the fp8 copies of the layers' weights: Transformer Engine keeps one for the forward pass and
    its transpose for the backward pass. (Blackwell needs no transpose for tensorwise scales.)"""
    if setting.config.precision.fp8 is None:
        return 0
    shape = setting.shape
    layers = sum(stages_of(shape, setting.config.parallel)[stage :: setting.topology.pipeline])
    return 2 * layers * (shape.attention_weights + 3 * shape.hidden * shape.ffn) / setting.topology.tensor


def _expert_data(topology: Topology) -> float:
    """Returns the number of ranks that hold the same experts."""
    return topology.tensor * topology.context * topology.data / (topology.expert * topology.expert_tensor)


def stage_activations(setting: Setting, stage: int, row: RowSize, rows: int) -> float:
    """Returns the maximum activations of the rows in flight on a pipeline stage (1F1B or interleaved), in bytes."""
    parallel, pipeline = setting.config.parallel, setting.topology.pipeline
    layers = stages_of(setting.shape, parallel)[stage::pipeline]
    last = _last_activations(setting, row) if stage == pipeline - 1 else 0
    if len(layers) == 1:
        whole = chunks = min(pipeline - stage, rows)
    else:
        warm_up = 2 * (pipeline - stage - 1) + (len(layers) - 1) * pipeline  # chunks of layers with one row each
        chunks = min(warm_up + 1, len(layers) * rows)
        whole = -(-chunks // len(layers))
    kept = chunks * max(layers) * layer_activations(setting, row) + whole * (_description(setting, row) + last)
    return kept + max(0, _recomputed(setting, row) - last)  # recomputation starts after the head is done


def _description(setting: Setting, row: RowSize) -> float:
    """Returns the bytes of a row's tokens, segment indices, mask, and rotary angles if the layers share them."""
    tokens = row.tokens / setting.topology.context
    shared = setting.config.parallel.recompute == "full" or setting.kernels == "engine"
    angles = 4 * tokens * setting.shape.head_dim if shared else 0
    mask = setting.item * row.mask(setting.topology.context) if setting.masked else 0
    return 8 * (2 * tokens + row.queries(setting.topology.context) + row.keys) + angles + mask


def _last_activations(setting: Setting, row: RowSize) -> float:
    """Returns the activations of the last norm and the log-prob head."""
    context = setting.topology.context
    return _norm(setting, row.tokens / context) + row.entries / context * (setting.shape.hidden * setting.item + 20)


def layer_activations(setting: Setting, row: RowSize) -> float:
    """Returns the bytes of activations that one layer keeps of a row for the backward pass, on one rank."""
    recompute = setting.config.parallel.recompute
    tokens = row.tokens / setting.topology.context
    entering = tokens * setting.shape.hidden * setting.item / setting.split
    return entering if recompute == "full" else whole_layer(setting, row, recompute == "selective")


def _recomputed(setting: Setting, row: RowSize) -> float:
    """Returns the extra activations of the one layer that is being recomputed."""
    if setting.config.parallel.recompute != "full":  # core attention needs less than what was freed before
        return 0
    return whole_layer(setting, row, selective=False) - layer_activations(setting, row)


def whole_layer(setting: Setting, row: RowSize, selective: bool) -> float:
    """Returns the activations of a layer without full recomputation; `selective`: without core attention."""
    shape, tensor, item = setting.shape, setting.topology.tensor, setting.item
    tokens = row.tokens / setting.topology.context
    queries, keys = shape.heads * shape.head_dim / tensor, shape.kv_heads * shape.head_dim / tensor
    core = _rotated(setting, tokens, queries, keys) if selective else _core(setting, row)
    rotary = 0 if setting.kernels == "engine" else 4 * tokens * shape.head_dim * item  # sine and cosine, two copies
    heads = _head_norms(setting, tokens, queries, keys, selective) if shape.qk_norm else 0
    into_qkv = _input(setting, tokens * shape.hidden / setting.split, ("q_proj", "k_proj", "v_proj"))
    into_out = _input(setting, tokens * queries, ("o_proj",))
    attention = into_qkv + rotary + heads + core + into_out + _adapter_products(setting, tokens)
    norms = 2 if shape.gemma is None else 4
    return norms * _norm(setting, tokens) + attention + _feed_forward(setting, tokens)


def _input(setting: Setting, numbers: float, projections: tuple[str, ...]) -> float:
    """Returns the bytes of the input of a matrix product if the gradients of its weight or adapters need it."""
    lora = setting.config.lora
    if lora.rank and not set(projections) & set(lora.targets):
        return 0
    return numbers * (1 if setting.config.precision.fp8 else setting.item)


def _adapter_products(setting: Setting, tokens: float) -> float:
    """Returns the bytes that adapters keep: the product with A, and A itself, which is concatenated with others."""
    lora = setting.config.lora
    if not lora.rank:
        return 0
    columns = {name: size[0] for name, size in setting.shape.projections.items() if name in lora.targets}
    cut = {name: setting.topology.tensor if name in ROW_PARALLEL else 1 for name in columns}
    return lora.rank * setting.item * sum(tokens + columns[name] / cut[name] for name in columns)


def _feed_forward(setting: Setting, tokens: float) -> float:
    """Returns the bytes that SwiGLU keeps: gate and up, their activations unless fused, routed tokens of experts."""
    shape, item, experts = setting.shape, setting.item, setting.shape.experts
    if experts is None:
        columns = shape.ffn / setting.topology.tensor
        into = _input(setting, tokens * shape.hidden / setting.split, ("gate_proj", "up_proj"))
        fused = setting.kernels != "cpu" and shape.gemma is None
        gated = (2 if fused else 4) * tokens * columns * item
        return into + gated + _input(setting, tokens * columns, ("down_proj",))
    # with whole experts, a rank routes its own tokens; with split experts, all tokens of its tensor-parallel group
    tokens /= setting.split / setting.topology.expert_tensor
    local = tokens / setting.topology.expert_tensor
    routed = tokens * experts.per_token
    softmax = 0 if experts.renormalised and setting.shape.family == "mixtral" else 4
    routing = local * (experts.per_token * 12 + experts.count * (5 + softmax)) + routed * 12
    if setting.config.model.router_aux_loss is not None:
        routing += local * shape.hidden * 4
    trained = 0 if setting.config.lora.rank else 1
    columns = experts.ffn / setting.topology.expert_tensor
    return routing + routed * item * (trained * shape.hidden + (5 + trained) * columns)


def _norm(setting: Setting, tokens: float) -> float:
    """Returns the bytes that a norm keeps: its input and one number per token. On a CPU, torch also keeps the
    normalised input in fp32 for the weight gradient."""
    kept: float = setting.item
    if setting.kernels == "cpu":
        kept = 4 if setting.config.lora.rank else 8
    return tokens * (setting.shape.hidden * kept + 4) / setting.split


def _rotated(setting: Setting, tokens: float, queries: float, keys: float) -> float:
    """Returns the bytes of the inputs of recomputed attention: rotated queries and keys, and the QKV product."""
    return tokens * setting.item * (queries + keys + (queries + 2 * keys))


def _core(setting: Setting, row: RowSize) -> float:
    """Returns the bytes that attention keeps: queries, keys, values, outputs, and one number per query and head."""
    context, shape, tensor = setting.topology.context, setting.shape, setting.topology.tensor
    queries, keys = shape.heads * shape.head_dim / tensor, shape.kv_heads * shape.head_dim / tensor
    if shape.gemma is not None and shape.gemma.attention_softcap is not None:  # recomputed from its inputs
        return (row.queries(context) + row.keys * 2) * queries * setting.item
    if setting.kernels != "cpu" and setting.masked:  # kernels without grouped queries: keys are repeated
        keys = queries
    values = row.queries(context) * 2 * queries + row.keys * 2 * keys
    return values * setting.item + 4 * row.queries(context) * shape.heads / tensor


def _head_norms(setting: Setting, tokens: float, queries: float, keys: float, selective: bool) -> float:
    """Returns the bytes that the norms of queries and keys keep.

    The input of the key norm is a view that keeps the QKV product alive; so is that of the query norm if there is only
    one group of queries on the rank.
    """
    numbers = 4 * tokens * (queries + keys) / setting.shape.head_dim
    normalised = 4 if setting.kernels == "cpu" and not setting.config.lora.rank else 0
    if setting.kernels == "cpu" and setting.item == 2:  # computed in fp32 from a copy
        return tokens * (4 + normalised) * (queries + keys) + numbers
    whole = 0 if selective else tokens * (queries + 2 * keys) * setting.item
    copied = queries if keys > setting.shape.head_dim else 0
    return whole + tokens * (setting.item * copied + normalised * (queries + keys)) + numbers


def _layer_buffers(setting: Setting, row: RowSize) -> float:
    """Returns the bytes of the gradients of the widest tensors of a layer during its backward pass, and of its largest
    weight unless the product adds it to the buffer."""
    tokens, shape, tensor = row.tokens / setting.topology.context, setting.shape, setting.topology.tensor
    columns = 3 * shape.active_ffn / tensor + 2 * shape.hidden
    weight = 0.0
    if setting.kernels == "torch" and not setting.config.lora.rank:
        weight = 2 * shape.hidden * (shape.ffn / tensor if shape.experts is None else shape.experts.ffn)
    return setting.item * (tokens * columns + weight)


def _head_buffers(setting: Setting, row: RowSize) -> float:
    """Returns the bytes of the log-prob head: two chunks of logits and their copy in bf16, gradients of hidden states,
    and the fp32 weight gradient with that of one chunk. A CPU adds the latter in place, a bf16 model that of the whole
    vocabulary, and has an fp32 copy of a bf16 weight."""
    hidden, tensor = setting.shape.hidden, setting.topology.tensor
    rows = padded_vocabulary(setting.shape, tensor) // tensor
    entries = row.entries / setting.topology.context
    chunk = min(entries, max(16, LOGITS_PER_CHUNK[setting.kernels] // rows))
    each = 8 + (2 if setting.item == 2 else 0)
    gradient, copy = (8, 0) if setting.kernels != "cpu" else (4, 0) if setting.item == 4 else (0, 4)
    if copy and rows * tensor > setting.shape.vocab:  # padded, so that a slice has the gradient
        gradient = 6
    weight = rows * hidden * (copy + (0 if setting.config.lora.rank else gradient))
    return chunk * rows * each + entries * hidden * setting.item + weight
