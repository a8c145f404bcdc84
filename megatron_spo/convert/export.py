"""From a training checkpoint, written in any layout, to a Hugging Face model folder; no processes and no GPU needed."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_spo.config.model_shape import ModelShape, read_model_shape
from megatron_spo.config.schema import LoraConfig
from megatron_spo.convert.adapters import merged_tensors, write_peft
from megatron_spo.convert.stored import StoredTensors
from megatron_spo.errors import UserError
from megatron_spo.model.checkpoint_files import Checkpoint, Damaged, locate, open_checkpoint
from megatron_spo.model.families import Mapping, mappings
from megatron_spo.model.hf_files import copy_side_files, locate_model, write_shards


@dataclass(frozen=True)
class _Trained:
    """A checkpoint, the section `model` of its configuration, and the model folder that the run started from."""

    checkpoint: Checkpoint
    model: dict[str, Any]
    origin: Path
    shape: ModelShape
    lora: LoraConfig


def to_hf(source: Path, target: Path) -> None:
    """Write the model of a run directory (its latest checkpoint) or of one checkpoint as a Hugging Face folder.

    Config, tokenizer and generation config come from the model the run started from; adapters are merged into its
    weights. The folder appears under its name when it is complete.

    Raises:
        UserError: no checkpoint there, it lacks a tensor, or `target` exists and is not empty.
    """
    trained = _open(locate(source))
    with _new_folder(target, trained) as folder:
        raw = dict(trained.shape.raw)
        if trained.lora.rank:
            write_shards(folder, merged_tensors(trained.checkpoint, trained.origin, trained.shape, trained.lora))
        else:
            raw.pop("torch_dtype", None)
            raw["dtype"] = str(_write_weights(trained, folder)).removeprefix("torch.")
        (folder / "config.json").write_text(json.dumps(raw, indent=2) + "\n")


def to_peft(source: Path, target: Path) -> None:
    """Write the adapters of a run directory or of one checkpoint as PEFT keeps them, with the tokenizer.

    Raises:
        UserError: as `to_hf`, and where the run has no adapters.
    """
    trained = _open(locate(source))
    if not trained.lora.rank:
        raise UserError(f"{source} was trained with all weights and has no adapters (lora.rank: 0); use --to hf")
    with _new_folder(target, trained) as folder:
        write_peft(folder, trained.checkpoint.path, trained.shape, trained.lora, trained.model["path"])


def _open(folder: Path) -> _Trained:
    try:
        checkpoint = open_checkpoint(folder, scales=True)  # and never loads them
    except Damaged as error:
        raise UserError(f"{error}; name another checkpoint") from error
    config = checkpoint.record["config"]
    origin = locate_model(config["model"]["path"])
    lora = LoraConfig.model_validate(config["lora"])
    return _Trained(checkpoint, config["model"], origin, read_model_shape(origin), lora)


@contextmanager
def _new_folder(target: Path, trained: _Trained) -> Iterator[Path]:
    """A folder with the run's tokenizer, which takes the name `target` when the context ends well."""
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target} exists and is not an empty folder; choose another name or remove it")
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    copy_side_files(trained.origin, partial)
    if trained.model["tokenizer"]:
        copy_side_files(locate_model(trained.model["tokenizer"]), partial)
    yield partial
    if target.exists():
        target.rmdir()
    partial.rename(target)


def _write_weights(trained: _Trained, folder: Path) -> torch.dtype:
    rows, stored = mappings(trained.shape), StoredTensors(trained.checkpoint.path)
    if absent := sorted({row.key for row in rows} - stored.keys()):
        raise UserError(f"{trained.checkpoint.path} lacks {absent[0]}, which the run's model has; is model.path still "
                        "the model that the run was started with?")  # fmt: skip
    write_shards(folder, _tensors(stored, rows))
    return stored.dtype(rows[0].key)


def _tensors(stored: StoredTensors, rows: list[Mapping]) -> Iterator[tuple[str, Tensor]]:
    """Every Hugging Face tensor; one layer of one Megatron tensor, all its experts stacked, is in memory at a time."""
    together: dict[tuple[str, tuple[int, ...]], list[Mapping]] = {}
    for row in rows:
        together.setdefault((row.key, row.at[:1]), []).append(row)
    for (key, layer), parts in together.items():
        whole = stored.read(key, *(layer or (None,)))
        for row in parts:
            for name, tensor in zip(row.sources, row.transform.split(whole[row.at[1:]]), strict=True):
                yield name, tensor.clone()
