"""Floating-point operations of a packed row on the whole model, as our kernels carry them out."""

from dataclasses import dataclass

from megatron_spo.config.model_shape import ModelShape
from megatron_spo.config.schema import Config
from megatron_spo.planner.rows import RowSize

BACKWARD_OF_ATTENTION = 2.5
"""Products of attention's backward pass per product of the forward pass: it computes the scores again."""


@dataclass(frozen=True)
class Flops:
    """Of one row: in the products of one layer's weights, in one layer's attention, in the log-prob head."""

    linear: float
    attention: float
    head: float

    def times(self, linear: float, attention: float, head: float) -> "Flops":
        return Flops(self.linear * linear, self.attention * attention, self.head * head)


def forward_flops(shape: ModelShape, row: RowSize, *, context: int = 1, necessary: bool = False) -> Flops:
    """Of the forward pass.

    necessary: count the real tokens and what attention must look at, instead of padding and whole blocks.
    """
    products = shape.attention_weights + 3 * shape.hidden * shape.active_ffn
    seen = row.visible if necessary else row.computed(context) * context
    return Flops(
        linear=2 * (row.real if necessary else row.tokens) * products,
        attention=4 * seen * shape.heads * shape.head_dim,
        head=2 * row.entries * shape.hidden * shape.vocab,
    )


def step_flops(config: Config, forward: Flops, *, necessary: bool = False) -> Flops:
    """Of the forward and the backward pass together, with what is computed twice; `necessary`: without that.

    Frozen weights below adapters need no gradient of their own.
    """
    backward = 1.0 if config.lora.rank else 2.0
    if necessary:
        return forward.times(1 + backward, 3.0, 1 + backward)
    again = {"none": (0, 0), "selective": (0, 1), "full": (1, 1)}[config.parallel.recompute]
    return forward.times(1 + backward + again[0], 1 + BACKWARD_OF_ATTENTION + again[1], 2 + backward)
