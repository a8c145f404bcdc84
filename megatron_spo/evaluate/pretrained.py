"""Loads Hugging Face folders into transformers: the tokenizer, and the model on one GPU, on several, or on the CPU."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from megatron_spo.config.model_folder import check_folder, count_numbers, is_needless, is_tied, read_config, shard_files
from megatron_spo.data import tokenize
from megatron_spo.errors import UserError
from megatron_spo.evaluate.limits import config_of, does_not_load

ROOM_FOR_WEIGHTS = 0.7
"""Largest share of a GPU's memory for weights; the rest is for the KV cache."""


def load_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """Loads the tokenizer of a Hugging Face folder; raises UserError if it has none."""
    read_config(folder)
    return tokenize.load_tokenizer(str(folder))


def load_model(folder: Path) -> Any:
    """Loads the transformers model of a Hugging Face folder: on one GPU, on all if one is too small, or on the CPU.

    Raises:
        UserError: If the folder is not a model, or its weights do not match its config.json.
    """
    check_folder(folder)
    _check_size(folder)
    model, info = load_pretrained(folder, AutoModelForCausalLM)
    if missing := sorted(info["missing_keys"]):
        raise UserError(f"{folder}: the tensor {missing[0]}, required by config.json, is missing ({len(missing)} such "
                        "tensors)")  # fmt: skip
    if stray := sorted(name for name in info["unexpected_keys"] if not is_needless(name, tied=False)):
        raise UserError(f"{folder}: unexpected tensor {stray[0]}, which a model of its config.json does not have "
                        f"({len(stray)} such tensors); use the model as published on the hub")  # fmt: skip
    if wrong := sorted(str(one) for one in info["mismatched_keys"]):
        raise UserError(f"{folder}: {wrong[0]} does not have the shape that config.json requires ({len(wrong)} such "
                        "tensors)")  # fmt: skip
    return model


def load_pretrained(folder: Path, kind: Any) -> tuple[Any, dict[str, Any]]:
    """Returns the model that the transformers class `kind` loads, on its device, and which tensors did not match.

    Raises:
        UserError: If transformers cannot load the folder.
    """
    transformers_logging.disable_progress_bar()
    gpus = [torch.cuda.get_device_properties(i).total_memory for i in range(torch.cuda.device_count())]
    place = placement(sum(file.stat().st_size for file in shard_files(folder)), gpus)
    try:
        model, info = kind.from_pretrained(folder, dtype="auto", output_loading_info=True, device_map=place)
    except Exception as error:  # transformers raises many types
        raise does_not_load(folder, error) from error
    return (model if place else model.to("cuda" if gpus else "cpu")).eval(), info


def _check_size(folder: Path) -> None:
    """Refuses a folder whose config.json requires far more parameters than are stored.

    transformers would initialise the missing ones, which may exceed the memory. Smaller differences are found later,
    tensor by tensor.
    """
    raw = read_config(folder)
    if raw.get("quantization_config"):
        return
    config = config_of(folder)
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except Exception as error:  # transformers raises many types
        raise does_not_load(folder, error) from error
    expected = sum(weights.numel() for weights in model.parameters())
    if expected > 2 * (stored := count_numbers(folder, tied=is_tied(raw))):
        raise UserError(f"{folder}: the weights have {stored} numbers, but config.json requires {expected}; use "
                        "weights and config.json of the same model")  # fmt: skip


def placement(weights: int, gpus: Sequence[int]) -> str | None:
    """Returns the `device_map` for transformers, None for a single device.

    Args:
        weights: Bytes of the weights.
        gpus: Bytes of memory of each GPU.

    Raises:
        UserError: If the weights must be split over several GPUs and accelerate is not installed.
    """
    if len(gpus) < 2 or weights < ROOM_FOR_WEIGHTS * gpus[0]:
        return None
    if importlib.util.find_spec("accelerate") is None:
        raise UserError(f"generate: {weights / 2**30:.0f} GiB of weights do not fit on one GPU of "
                        f"{gpus[0] / 2**30:.0f} GiB; to split them over the {len(gpus)} GPUs, pip install "
                        "accelerate")  # fmt: skip
    return "auto"
