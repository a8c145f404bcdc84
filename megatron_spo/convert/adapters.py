"""LoRA adapters of a checkpoint: merged into their base model, or exported in PEFT's format."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

import megatron_spo.runtime.megatron_import  # noqa: F401  (before the modules that import Megatron)
from megatron_spo.checkpoint.compatibility import check_base
from megatron_spo.checkpoint.folder import Checkpoint
from megatron_spo.checkpoint.lazy import Lazy, empty
from megatron_spo.checkpoint.stored import StoredTensors
from megatron_spo.config.model_folder import weight_files
from megatron_spo.config.model_shape import ModelShape
from megatron_spo.config.schema import LoraConfig
from megatron_spo.errors import UserError
from megatron_spo.model.hf_files import file_digest, weights_digest
from megatron_spo.model.lora import sites
from megatron_spo.model.transforms import Shape


@dataclass(frozen=True)
class _Merged(Lazy):
    """W + scale * B A, computed in fp32 and cast to the dtype of W."""

    weight: Lazy
    a: Lazy
    b: Lazy
    scale: float

    @property
    def shape(self) -> Shape:  # type: ignore[override]
        return self.weight.shape

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        return self.weight.dtype

    def fill(self, start: int, out: Tensor) -> None:
        self.weight.fill(start, out)
        a, b = self.a.rows(0, self.a.shape[0]), self.b.rows(start, start + len(out))
        total = torch.matmul(b.float(), a.float(), out=empty(tuple(out.shape), torch.float32))
        out.copy_(total.mul_(self.scale).add_(out))


def merged_tensors(
    model: Mapping[str, Lazy], stored: StoredTensors, shape: ModelShape, lora: LoraConfig
) -> dict[str, Lazy]:
    """Returns the tensors of `model` by Hugging Face name, with the adapters in `stored` merged into them.

    Raises:
        UserError: If an adapter is missing.
    """
    tensors = dict(model)
    for module, a, b in _pairs(stored, shape, lora):
        name = f"{module}.weight"
        tensors[name] = _Merged(model[name], a, b, lora.alpha / lora.rank)
    return tensors


def check_origin(checkpoint: Checkpoint, origin: Path, shape: ModelShape) -> None:
    """Checks that the model in `origin` is the one that the adapters were trained on.

    Raises:
        UserError: If its weights differ.
    """
    check_base(checkpoint, weights_digest(shape.raw, {file.name: file_digest(file) for file in weight_files(origin)}))


def write_peft(folder: Path, checkpoint: Path, shape: ModelShape, lora: LoraConfig, base: str) -> None:
    """Writes adapter_model.safetensors and adapter_config.json; `base` is the path or hub id of the base model.

    Raises:
        UserError: If the checkpoint lacks an adapter.
    """
    tensors = {}
    for module, a, b in _pairs(StoredTensors(checkpoint), shape, lora):
        for side, lazy in (("A", a), ("B", b)):
            tensors[f"base_model.model.{module}.lora_{side}.weight"] = lazy.rows(0, lazy.shape[0])
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


def _pairs(stored: StoredTensors, shape: ModelShape, lora: LoraConfig) -> Iterator[tuple[str, Lazy, Lazy]]:
    """Yields (Hugging Face module, A [r, in], B [out, r]) for each adapted module."""
    for site in sites(shape, lora.targets):
        for projection in site.adapted(lora.targets):
            keys = [site.key(projection, side) for side in "AB"]
            if absent := [key for key in keys if key not in stored]:
                raise UserError(f"{stored.folder}: the adapter {absent[0]}, required by its configuration, is missing")
            a, b = (stored.part(key, (site.layer,)) for key in keys)
            yield site.modules[projection], a, b
