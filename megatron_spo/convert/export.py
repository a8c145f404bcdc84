"""Converts a model, or a training checkpoint of any parallel layout, to another format on one machine without GPUs."""

import shutil
from pathlib import Path

from megatron_spo.checkpoint.folder import Damaged, locate, open_checkpoint
from megatron_spo.config.model_shape import read_model_shape
from megatron_spo.config.schema import LoraConfig
from megatron_spo.convert.formats.table import FORMATS
from megatron_spo.convert.source import Model, check_sums, open_model, same, sides_of
from megatron_spo.convert.work import Conversion, plan_of, write_shards
from megatron_spo.errors import UserError
from megatron_spo.files import new_folder
from megatron_spo.meter import BYTES, Meter
from megatron_spo.model import hf_files
from megatron_spo.model.hf_files import locate_model

DONE = ".converted"
"""File in a converted folder with the digest of source and format, so that a repeated command finds it complete."""


def convert(source: str | Path, target: str | Path, to: str, *, verify: bool = False, workers: int = 1) -> list[str]:
    """Writes a model in another format, holding only a few blocks of rows in memory at a time.

    `target` appears when it is complete. Until then, finished files are kept in `target`.partial, and running the same
    command again resumes from them.

    Args:
        source: Hugging Face folder, Megatron model folder, NeMo 2 checkpoint, run directory, or one checkpoint of it.
        target: Folder to write.
        to: "hf", "megatron", "nemo", or "peft" for the adapters of a run.
        verify: Whether to read back the result and compare every tensor with the source bit for bit, and to check the
            checksums in the index of a Hugging Face source.
        workers: Number of processes that write.

    Returns:
        Messages for the user, one sentence each.

    Raises:
        UserError: If the source is damaged or not a model, is already in the format `to`, or `target` is not empty.
    """
    source, target = Path(source), Path(target)
    if workers < 1:
        raise UserError(f"--workers {workers} must be at least 1")
    if to == "peft":
        return to_peft(source, target)
    job = Conversion(source, to, target.with_name(target.name + ".partial"), hf_files.SHARD_BYTES)
    if (target / DONE).is_file():
        return _again(job, target, verify=verify)
    _check_free(target)
    model = open_model(source)
    if verify and model.kind == "hf":
        check_sums(source)
    if model.kind == to:
        raise UserError(f"{source} is already in the format {to!r}; choose another --to, or copy the folder")
    records = write_shards(job, model, workers)
    notes = FORMATS[to].finish(job.model, model, records)
    if verify:
        _verify(model, job.model)
        notes.append("verified: every tensor equals the source bit for bit")
    total = sum(tensor.nbytes for tensor in model.tensors.values())
    (job.model / DONE).write_text(plan_of(job, model) + "\n")
    if target.exists():
        target.rmdir()
    job.model.rename(target)
    shutil.rmtree(job.folder)
    return [f"{target}: {len(model.tensors)} tensors, {total / 2**30:.2f} GiB in {len(records)} files", *notes]


def to_hf(source: Path, target: Path) -> None:
    """Writes the model of a run directory (its latest checkpoint) or of one checkpoint as a Hugging Face folder.

    Raises:
        UserError: As for `convert`.
    """
    convert(source, target, "hf")


def to_peft(source: Path, target: Path) -> list[str]:
    """Writes the adapters of a run directory or of one checkpoint in PEFT's format, with tokenizer and model card.

    Returns:
        Messages for the user.

    Raises:
        UserError: If the checkpoint is missing, damaged or has no adapters, or `target` exists and is not empty.
    """
    from megatron_spo.convert.adapters import write_peft  # imports Megatron, which takes seconds

    _check_free(target)
    try:
        checkpoint = open_checkpoint(locate(source))
    except Damaged as error:
        raise UserError(f"{error}; name another checkpoint") from error
    config = checkpoint.record.get("config")
    lora = LoraConfig.model_validate(config["lora"]) if config else LoraConfig()
    if config is None or not lora.rank:
        raise UserError(f"{source} has no adapters, because all weights were trained (lora.rank: 0); use --to hf")
    origin = locate_model(config["model"]["path"])
    with new_folder(target) as folder:
        notes = sides_of(checkpoint, origin, adapters=True).write(folder)
        write_peft(folder, checkpoint.path, read_model_shape(origin), lora, config["model"]["path"])
    return [f"{target}: adapters of rank {lora.rank}", *notes]


def _again(job: Conversion, target: Path, *, verify: bool) -> list[str]:
    """Returns the messages for a target that an earlier call has written from the same source.

    Raises:
        UserError: If the target was converted from another source, or to another format.
    """
    model = open_model(job.source, check=verify)
    if model.kind == job.to or (target / DONE).read_text().strip() != plan_of(job, model):
        raise UserError(f"{target} holds another conversion than that of {job.source} to {job.to}; choose another "
                        "name or remove it")  # fmt: skip
    notes = [f"{target}: complete, converted by an earlier call"]
    if verify:
        _verify(model, target)
        notes.append("verified: every tensor equals the source bit for bit")
    return notes


def _check_free(target: Path) -> None:
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target} exists and is not an empty folder; choose another name or remove it")


def _verify(model: Model, written: Path) -> None:
    again = open_model(written)
    if again.kind == "hf":
        check_sums(written)
    if again.tensors.keys() != model.tensors.keys():
        raise UserError(f"{written}: the set of tensors differs from the source; remove the folder and convert again")
    with Meter("verifying", sum(tensor.nbytes for tensor in model.tensors.values()), BYTES) as meter:
        for name, tensor in model.tensors.items():
            if not same(tensor, again.tensors[name]):
                raise UserError(f"{written}: {name} differs from the source, possibly because of a faulty disk; remove "
                                "the folder and convert again")  # fmt: skip
            meter.advance(tensor.nbytes)
