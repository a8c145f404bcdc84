"""Low-rank adapters (LoRA) on the projections of a frozen model.

An adapted projection computes W x + alpha / r * B A x (LoRA, arXiv 2106.09685). Every Hugging Face projection has its
own pair A [r, in], B [out, r], even if Megatron fuses several projections into one linear layer, so that the adapters
equal PEFT's tensor by tensor. With the adapters off, the policy is the reference.

Under tensor parallelism B is split by rows in a column-parallel layer, and A by columns in a row-parallel one; the
other matrix is whole on every rank. Only the product with A is communicated: r numbers per token.
"""

import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor
from torch.nn import Module, Parameter

from megatron_spo.config.model_shape import ModelShape
from megatron_spo.config.schema import LoraConfig
from megatron_spo.model.build import PairModel
from megatron_spo.model.families import mappings
from megatron_spo.model.transforms import GroupedQKV

ROW_PARALLEL = ("linear_proj", "linear_fc2")
_LAYERS = "decoder.layers."


@dataclass(frozen=True)
class Site:
    """A Megatron linear layer with adapters.

    Attributes:
        layer: index of the layer in the whole model, from 0.
        linear: path within the layer, such as self_attention.linear_qkv.
        modules: projection -> Hugging Face module, for the projections that the linear layer fuses, in order.
        by_group: whether their outputs alternate by query group instead of following one another.
    """

    layer: int
    linear: str
    modules: Mapping[str, str]
    by_group: bool

    def adapted(self, targets: Sequence[str]) -> list[str]:
        """Returns its projections that have adapters."""
        return [projection for projection in self.modules if projection in targets]

    def key(self, projection: str, side: str) -> str:
        """Returns the checkpoint key of A or B (`side`) of a projection, with all layers stacked."""
        return f"{_LAYERS}{self.linear}_lora.{projection}_{side}"


def sites(shape: ModelShape, targets: Sequence[str]) -> Iterator[Site]:
    """Yields the linear layers that contain a projection of `targets`."""
    for row in mappings(shape):
        modules = {source.split(".")[-2]: source.removesuffix(".weight") for source in row.sources}
        if len(row.at) == 1 and row.key.endswith(".weight") and set(modules) & set(targets):
            linear = row.key.removeprefix(_LAYERS).removesuffix(".weight")
            yield Site(row.at[0], linear, modules, by_group=isinstance(row.transform, GroupedQKV))


class LoraAdapter(Module):
    """The adapters of the projections of one linear layer.

    Its parameters are this rank's parts of `{projection}_A` [r, in] and `{projection}_B` [out, r]. A is initialised
    uniformly as in PEFT, from a generator seeded by the projection's name, so it is the same in every layout; B is
    zero.
    """

    def __init__(
        self,
        site: Site,
        lora: LoraConfig,
        shape: ModelShape,
        config: TransformerConfig,
        *,
        device: torch.device,
        seed: int,
    ) -> None:
        super().__init__()
        self.active = True
        self._rank, self._scale = lora.rank, lora.alpha / lora.rank
        self._adapted = site.adapted(lora.targets)
        self._row_parallel = site.linear.endswith(ROW_PARALLEL)
        self._sequence_parallel = config.sequence_parallel
        ranks = config.tensor_model_parallel_size
        sizes = {projection: shape.projections[projection] for projection in site.modules}
        self._widths = {name: out // (1 if self._row_parallel else ranks) for name, (_, out) in sizes.items()}
        self._groups = shape.kv_heads // ranks if site.by_group else 1
        for projection in self._adapted:
            columns = sizes[projection][0]
            generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {site.modules[projection]}".encode()))
            bound = columns**-0.5  # Kaiming uniform with slope sqrt(5), which PEFT takes from torch's linear layer
            a = torch.empty(lora.rank, columns).uniform_(-bound, bound, generator=generator)
            if self._row_parallel:
                a = a.chunk(ranks, dim=1)[parallel_state.get_tensor_model_parallel_rank()]
            b = torch.zeros(self._widths[projection], lora.rank)
            for side, value in (("A", a), ("B", b)):
                parameter = Parameter(value.to(device, config.params_dtype).contiguous())
                self._mark(parameter, side)
                self.register_parameter(f"{projection}_{side}", parameter)

    def _mark(self, parameter: Parameter, side: str) -> None:
        """Marks how the tensor-parallel ranks hold a parameter, for Megatron's gradient norm and reduction."""
        if side == self._cut_side:
            axis = 1 if self._row_parallel else 0
            set_tensor_model_parallel_attributes(parameter, is_parallel=True, dim=axis, stride=1)
        else:  # under sequence parallelism each rank sees only its own tokens
            parameter.sequence_parallel = self._sequence_parallel  # type: ignore[attr-defined]

    @property
    def _cut_side(self) -> str:
        return "A" if self._row_parallel else "B"

    def forward(self, hidden: Tensor) -> Tensor:
        """Returns what the adapters add to the linear layer's output on this rank, from its input on this rank."""
        down = F.linear(hidden, torch.cat([self.get_parameter(f"{name}_A") for name in self._adapted]))
        parts = (self._scale * self._exchange(down)).split(self._rank, dim=-1)
        ups = {n: F.linear(x, self.get_parameter(f"{n}_B")) for n, x in zip(self._adapted, parts, strict=True)}
        blocks = [
            ups[name] if name in ups else hidden.new_zeros(*parts[0].shape[:-1], width)
            for name, width in self._widths.items()
        ]
        return torch.cat([block.unflatten(-1, (self._groups, -1)) for block in blocks], dim=-1).flatten(-2)

    def _exchange(self, down: Tensor) -> Tensor:
        """Communicates the product with A, so that its tokens are those of the linear layer's output.

        In a row-parallel layer it is summed over all columns of A. In a column-parallel layer its gradient is summed
        over all rows of B.
        """
        if self._row_parallel and self._sequence_parallel:
            return reduce_scatter_to_sequence_parallel_region(down)
        if self._row_parallel:
            return reduce_from_tensor_model_parallel_region(down)
        if self._sequence_parallel:
            return gather_from_sequence_parallel_region(down)
        return copy_to_tensor_model_parallel_region(down)

    def sharded_state_dict(self, prefix: str, sharded_offsets: Any, metadata: Any) -> dict[str, Any]:
        """Returns the parameters for Megatron's checkpoints, as global tensors in Hugging Face's order."""
        axis = 1 if self._row_parallel else 0
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(keep_vars=True),
            prefix,
            {f"{name}_{self._cut_side}": axis for name in self._adapted},
            sharded_offsets,
            tp_group=parallel_state.get_tensor_model_parallel_group(),
            dp_cp_group=metadata["dp_cp_group"],
        )


def add_adapters(chunks: Sequence[PairModel], shape: ModelShape, lora: LoraConfig, seed: int) -> None:
    """Freezes the model and adds adapters to the projections of `lora.targets`; does nothing if `lora.rank` is 0.

    Call it before the model is wrapped, so that Megatron keeps gradients, main parameters and moments of the adapters
    only.
    """
    if not lora.rank:
        return
    where = list(sites(shape, lora.targets))
    for chunk in chunks:
        for parameter in chunk.requires_grad_(False).parameters():
            parameter.of_base = True
        if chunk.pre_process:
            chunk.embedding.register_forward_hook(_require_gradient)
        for layer in chunk.decoder.layers:
            for site in where:
                if site.layer == layer.layer_number - 1:
                    _adapt(layer, site, lora, shape, chunk.config, seed)


def _adapt(
    layer: Module, site: Site, lora: LoraConfig, shape: ModelShape, config: TransformerConfig, seed: int
) -> None:
    parent, _, name = site.linear.rpartition(".")
    linear: Any = layer.get_submodule(site.linear)
    adapter = LoraAdapter(site, lora, shape, config, device=linear.weight.device, seed=seed)
    layer.get_submodule(parent).add_module(f"{name}_lora", adapter)
    linear.register_forward_hook(_adding(adapter, config))


def _adding(adapter: LoraAdapter, config: TransformerConfig) -> Callable[..., Any]:
    """Returns the forward hook of a linear layer, whose outputs are (product, bias).

    Transformer Engine's layer may include the norm before it; then the norm is computed again for the adapters.
    """

    def hook(linear: Module, inputs: tuple[Tensor, ...], outputs: tuple[Tensor, Tensor | None]) -> Any:
        if not adapter.active:
            return outputs
        hidden, norm = inputs[0], getattr(linear, "layer_norm_weight", None)
        if norm is not None:
            norm = norm + 1 if config.layernorm_zero_centered_gamma else norm
            hidden = F.rms_norm(hidden, norm.shape, norm, config.layernorm_epsilon)
        return outputs[0] + adapter(hidden), outputs[1]

    return hook


def _require_gradient(module: Module, inputs: Any, hidden: Tensor) -> Tensor:
    """Forward hook that makes the output of a frozen embedding require gradients.

    Otherwise a recomputed layer would pass no gradients on (megatron-core 0.16.1, tensor_parallel/random.py,
    CheckpointFunction).
    """
    return hidden.requires_grad_(torch.is_grad_enabled())


@contextmanager
def adapters_off(chunks: Sequence[PairModel]) -> Iterator[None]:
    """Switches the adapters off within the context, so that the model is the base model."""
    adapters = [module for chunk in chunks for module in chunk.modules() if isinstance(module, LoraAdapter)]
    for adapter in adapters:
        adapter.active = False
    try:
        yield
    finally:
        for adapter in adapters:
            adapter.active = True


def without_base(state: dict[str, Any]) -> dict[str, Any]:
    """Returns a chunk's sharded state dict without the frozen base model, as a checkpoint stores it.

    Without adapters, it returns the whole state dict.
    """
    return {name: entry for name, entry in state.items() if not _is_of_base(getattr(entry, "data", None))}


def load_beside_base(chunk: PairModel, state: dict[str, Any]) -> None:
    """Loads into a chunk a state dict that `without_base` returned; the base model is not changed."""
    base = {name for name, parameter in chunk.named_parameters() if _is_of_base(parameter)}
    absent, stray = chunk.load_state_dict(state, strict=False)
    assert set(absent) == base and not stray, f"absent {sorted(set(absent) ^ base)}, stray {stray}"


def _is_of_base(data: Any) -> bool:
    return getattr(data, "of_base", False)
