"""Builds Megatron models in this process, for tests that need no layout."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from megatron_spo.config.model_shape import ModelShape, read_model_shape
from megatron_spo.config.schema import ParallelConfig, PrecisionConfig
from megatron_spo.config.topology import make_topology
from megatron_spo.data.rows import Example, PackedRow, build_row
from megatron_spo.runtime import processes
from megatron_spo.runtime.processes import Runtime

if TYPE_CHECKING:  # Megatron must be imported after `one_process`
    from megatron_spo.model.build import PairModel


def one_process() -> Runtime:
    """Returns the runtime of a single process."""
    return processes.start(make_topology(ParallelConfig(), 1), seed=0, threads=1)


def load_model(folder: Path, *, recompute: str = "none") -> "PairModel":
    """Returns the fp32 Megatron model of a Hugging Face folder."""
    one_process()
    from megatron_spo.convert.weights import open_weights
    from megatron_spo.model.build import build_model
    from megatron_spo.model.settings import transformer_config
    from megatron_spo.model.weights import load_hf_weights

    shape = read_model_shape(folder)
    parallel = ParallelConfig.model_validate({"recompute": recompute})
    (model,) = build_model(shape, transformer_config(shape, parallel, PrecisionConfig(dtype="fp32")))
    load_hf_weights(model, shape, open_weights(folder, shape))
    return model


def sharded_keys(model: Any) -> set[str]:
    """Returns all keys of the model's sharded state dict, of tensors and `_extra_state`."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values

    return {entry.key for entry in nested_values(model.sharded_state_dict())}


def engine_keys(shape: ModelShape) -> set[str]:
    """Returns the expected `sharded_keys` with Transformer Engine's layers: the parameter names of its modules
    (transformer-engine 2.11, pytorch/module/linear.py and layernorm_linear.py) under Megatron's names of the modules.
    """
    norm_and_linear = {"layer_norm_weight", "weight", "_extra_state"}
    parts = {
        "self_attention.linear_qkv": norm_and_linear | ({"bias"} if shape.qkv_bias else set()),
        "self_attention.linear_proj": {"weight", "_extra_state"},
        "mlp.linear_fc1": norm_and_linear,
        "mlp.linear_fc2": {"weight", "_extra_state"},
    }
    if shape.qk_norm:  # this package's norms, not Transformer Engine's
        parts |= {"self_attention.q_layernorm": {"weight"}, "self_attention.k_layernorm": {"weight"}}
    layers = {f"decoder.layers.{module}.{name}" for module, names in parts.items() for name in names}
    outside = {"embedding.word_embeddings.weight", "decoder.final_layernorm.weight"}
    return layers | outside | (set() if shape.tied else {"output_layer.weight"})


def example(prompt: Sequence[int], chosen: Sequence[int], rejected: Sequence[int] = ()) -> Example:
    """Returns a tokenised pair (or SFT row) from plain lists."""
    left, right = [*prompt, *chosen], [*prompt, *rejected] if len(rejected) else []
    shared = len(left)
    if right:
        shared = next(
            (i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right))
        )
    return Example(np.array(left, dtype=np.int32), np.array(right, dtype=np.int32), len(prompt), shared)


def row_of(examples: Sequence[Example], *, multiple: int = 1) -> PackedRow:
    return build_row(list(enumerate(examples)), multiple=multiple)


def megatron_sums(model: Any, row: PackedRow) -> Tensor:
    """Returns the response sums [pairs, 2] of the Megatron model, with gradient."""
    from megatron_spo.model.attention import row_to_device
    from megatron_spo.model.forward import response_sums

    on_device = row_to_device(row, torch.device("cpu"))
    assert on_device.entries is not None
    return response_sums(row, on_device.entries, model(on_device))[..., 0]


def transformers_sums(model: torch.nn.Module, examples: Sequence[Example]) -> Tensor:
    """Returns the response sums [pairs, 2] of a transformers model, one sequence at a time."""
    sums = []
    for one in examples:
        for ids in (one.chosen_ids, one.rejected_ids):
            if len(ids) == 0:
                sums.append(torch.zeros(()))
                continue
            tokens = torch.from_numpy(ids.astype(np.int64))
            logprobs = model(tokens[None]).logits[0, :-1].float().log_softmax(-1)
            sums.append(logprobs.gather(1, tokens[1:, None])[one.prompt_length - 1 :].sum())
    return torch.stack(sums).view(-1, 2)
