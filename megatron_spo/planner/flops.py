"""Counts the floating-point operations of a packed row on the whole model, as our kernels execute them."""

from dataclasses import dataclass

from megatron_spo.config.model_shape import ModelShape
from megatron_spo.config.schema import Config
from megatron_spo.planner.rows import RowSize

BACKWARD_OF_ATTENTION = 2.5
"""Matrix products of the attention backward pass per product of the forward pass, including recomputed scores."""


@dataclass(frozen=True)
class Flops:
    """Floating-point operations of one row: linear layers of one layer, attention of one layer, and log-prob head."""

    linear: float
    attention: float
    head: float

    def times(self, linear: float, attention: float, head: float) -> "Flops":
        return Flops(self.linear * linear, self.attention * attention, self.head * head)


def forward_flops(shape: ModelShape, row: RowSize, *, context: int = 1, necessary: bool = False) -> Flops:
    """Returns the operations of the forward pass.

    Args:
        shape: the model.
        row: the packed row.
        context: context-parallel size.
        necessary: count only real tokens and necessary attention, without padding and partly masked blocks.
    """
    products = shape.attention_weights + 3 * shape.hidden * shape.active_ffn
    seen = row.visible if necessary else row.computed(context) * context
    return Flops(
        linear=2 * (row.real if necessary else row.tokens) * products,
        attention=4 * seen * shape.heads * shape.head_dim,
        head=2 * row.entries * shape.hidden * shape.vocab,
    )


def step_flops(config: Config, forward: Flops, *, necessary: bool = False) -> Flops:
    """Returns the operations of forward and backward pass, including recomputation unless `necessary`.

    With adapters, the frozen weights need no weight gradients.
    """
    backward = 1.0 if config.lora.rank else 2.0
    if necessary:
        return forward.times(1 + backward, 3.0, 1 + backward)
    again = {"none": (0, 0), "selective": (0, 1), "full": (1, 1)}[config.parallel.recompute]
    return forward.times(1 + backward + again[0], 1 + BACKWARD_OF_ATTENTION + again[1], 2 + backward)
