"""Adapters from a checkpoint: merged into the model they were trained on, or as PEFT keeps them."""

import json
from collections.abc import Iterator
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from megatron_spo.config.model_shape import ModelShape
from megatron_spo.config.schema import LoraConfig
from megatron_spo.convert.stored import StoredTensors
from megatron_spo.model.checkpoint_files import Checkpoint
from megatron_spo.model.families import mappings
from megatron_spo.model.hf_files import HFWeights, file_digest, shard_files, weights_digest
from megatron_spo.model.lora import check_base, sites


def merged_tensors(
    checkpoint: Checkpoint, origin: Path, shape: ModelShape, lora: LoraConfig
) -> Iterator[tuple[str, Tensor]]:
    """Every Hugging Face tensor of the model: W + alpha / r * B A in fp32, then in the format of W; one at a time.

    Raises:
        UserError: the adapters are of another model than the one in `origin`, or some are not there.
    """
    check_base(checkpoint, weights_digest(shape.raw, {file.name: file_digest(file) for file in shard_files(origin)}))
    names = dict.fromkeys(name for row in mappings(shape) for name in row.sources)
    with HFWeights(origin) as weights:
        for module, a, b in _pairs(checkpoint.path, shape, lora):
            name = f"{module}.weight"
            del names[name]
            weight = weights.slice(name)[:,]
            yield name, (weight.float() + lora.alpha / lora.rank * (b.float() @ a.float())).to(weight.dtype)
        for name in names:
            yield name, weights.slice(name)[:,]


def write_peft(folder: Path, checkpoint: Path, shape: ModelShape, lora: LoraConfig, base: str) -> None:
    """adapter_model.safetensors and adapter_config.json; `base` is the path or hub id of the model they belong to.

    Raises:
        UserError: an adapter is not in the checkpoint.
    """
    tensors = {}
    for module, a, b in _pairs(checkpoint, shape, lora):
        for side, tensor in (("A", a), ("B", b)):
            tensors[f"base_model.model.{module}.lora_{side}.weight"] = tensor.clone()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "target_modules": sorted(set(lora.targets)),
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")


def _pairs(checkpoint: Path, shape: ModelShape, lora: LoraConfig) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(Hugging Face module, A [r, in], B [out, r]), one after another."""
    stored = StoredTensors(checkpoint)
    for site in sites(shape, lora.targets):
        for projection in site.adapted(lora.targets):
            a, b = (stored.read(site.key(projection, side), site.layer) for side in "AB")
            yield site.modules[projection], a, b
