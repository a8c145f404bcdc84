"""From a training checkpoint, written in any layout, to a Hugging Face model folder; no processes and no GPU needed."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
import yaml
from torch import Tensor

from megatron_spo.config.model_shape import ModelShape, read_model_shape
from megatron_spo.convert.stored import StoredTensors
from megatron_spo.errors import UserError
from megatron_spo.model.families import Mapping, mappings
from megatron_spo.model.hf_files import copy_side_files, locate_model, write_shards


def to_hf(source: Path, target: Path) -> None:
    """Write the model of a run directory (its latest checkpoint) or of one checkpoint as a Hugging Face folder.

    Config, tokenizer and generation config come from the model the run started from. The folder appears under its
    name when it is complete.

    Raises:
        UserError: no checkpoint there, it lacks a tensor, or `target` exists and is not empty.
    """
    checkpoint, run = _locate(source)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target} exists and is not an empty folder; choose another name or remove it")
    config = yaml.safe_load((run / "config.yaml").read_text())
    origin = locate_model(config["model"]["path"])
    shape = read_model_shape(origin)
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    copy_side_files(origin, partial)
    if config["model"].get("tokenizer"):
        copy_side_files(locate_model(config["model"]["tokenizer"]), partial)
    dtype = _write_weights(StoredTensors(checkpoint), shape, partial, checkpoint)
    written = {**shape.raw, "dtype": str(dtype).removeprefix("torch.")}
    written.pop("torch_dtype", None)
    (partial / "config.json").write_text(json.dumps(written, indent=2) + "\n")
    if target.exists():
        target.rmdir()
    partial.rename(target)


def _locate(source: Path) -> tuple[Path, Path]:
    """The checkpoint folder and its run directory."""
    if (source / "checkpoints" / "latest").exists():
        return source / "checkpoints" / (source / "checkpoints" / "latest").read_text().strip(), source
    run = source.parent.parent
    if (source / "metadata.json").exists() and (run / "config.yaml").exists():
        return source, run
    raise UserError(f"{source} is neither a run directory with a checkpoint nor a checkpoint inside one")


def _write_weights(stored: StoredTensors, shape: ModelShape, folder: Path, checkpoint: Path) -> torch.dtype:
    rows = mappings(shape)
    absent = sorted({row.key for row in rows} - stored.keys())
    if absent:
        raise UserError(f"{checkpoint} lacks {absent[0]}, which the run's model has; it is damaged or of another model")
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
