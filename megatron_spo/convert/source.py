"""Opens a model of any format as lazy tensors with Hugging Face names."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_spo.checkpoint.folder import SEAL, Checkpoint, Damaged, checksum, locate, open_checkpoint, unchecked
from megatron_spo.checkpoint.lazy import Lazy, Picked, as_bytes
from megatron_spo.checkpoint.stored import StoredTensors
from megatron_spo.config.model_folder import (
    CONFIG,
    INDEX,
    check_tied,
    read_generation_config,
    shard_files,
    stored_tensors,
)
from megatron_spo.config.model_shape import ModelShape, read_model_shape
from megatron_spo.config.schema import LoraConfig
from megatron_spo.convert import nemo_names
from megatron_spo.convert.card import model_card
from megatron_spo.convert.safetensors_files import lazy
from megatron_spo.convert.sides import SideFiles
from megatron_spo.errors import UserError
from megatron_spo.model.families import full_shape, mappings
from megatron_spo.model.hf_files import locate_model, model_tensors


@dataclass(frozen=True)
class Model:
    """A model to convert.

    Attributes:
        kind: Its format: "hf", "megatron", "nemo", or "run" for a training checkpoint.
        shape: Its shape.
        tensors: All of its tensors by Hugging Face name, in model order.
        config: Text of its config.json.
        sides: Its tokenizer, chat templates, generation config and other side files.
        files: The files that the tensors are read from.
        notes: Messages for the user about what a conversion drops or reverts.
    """

    kind: str
    shape: ModelShape
    tensors: Mapping[str, Lazy]
    config: str
    sides: SideFiles
    files: tuple[Path, ...]
    notes: tuple[str, ...] = ()


def open_model(source: Path, *, check: bool = True) -> Model:
    """Opens a Hugging Face folder, a Megatron model folder, a NeMo 2 checkpoint, a run, or one checkpoint of it.

    Args:
        source: Its path.
        check: Whether to compare checksums; not needed if another process has done so.

    Raises:
        UserError: If it is none of these, damaged, or not supported.
    """
    nemo_names.refuse_legacy(source)
    if nemo_names.is_checkpoint(source):
        return _open_nemo(source)
    if (source / CONFIG).is_file() and not (source / SEAL).exists():
        return _open_hf(source)
    checkpoint = _open_sealed(locate(source), check)
    return _open_run(checkpoint, check) if "config" in checkpoint.record else _open_megatron(checkpoint)


def _open_sealed(folder: Path, check: bool) -> Checkpoint:
    try:
        if not check:
            return unchecked(folder)
        return open_checkpoint(folder, scales=True)  # accepted here, but never loaded
    except Damaged as error:
        raise UserError(f"{error}; name another checkpoint") from error


def _open_hf(folder: Path) -> Model:
    shape = read_model_shape(folder)
    tensors, needless = model_tensors(folder, shape)
    check_tied(folder, shape.raw, stored_tensors(folder))
    read_generation_config(folder)
    notes = tuple(f"dropped {name}, which the model computes from other tensors" for name in needless)
    text, files = (folder / CONFIG).read_text(encoding="utf-8"), tuple(shard_files(folder))
    return Model("hf", shape, lazy(tensors), text, SideFiles((folder,)), files, notes)


def check_sums(folder: Path) -> None:
    """Checks the checksums that `convert` writes into the index of a Hugging Face folder.

    Raises:
        UserError: If a file does not match.
    """
    index = folder / INDEX
    sums = json.loads(index.read_text())["metadata"].get("xxh3_128", {}) if index.exists() else {}
    for name, expected in sums.items():
        if checksum(folder / name) != expected:
            raise UserError(f"{folder / name} does not match its checksum in {INDEX}; copy the file again, or remove "
                            "the checksums from the index if you changed it")  # fmt: skip


def same(one: Lazy, other: Lazy) -> bool:
    """Returns whether two tensors are equal bit for bit, NaNs included."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return all(as_bytes(a) == as_bytes(b) for a, b in zip(one.blocks(), other.blocks(), strict=True))


def _stored_tensors(stored: StoredTensors, shape: ModelShape) -> tuple[dict[str, Lazy], tuple[str, ...]]:
    """Returns the tensors of a Megatron folder by Hugging Face name, and notes about removed padding."""
    rows = mappings(shape)
    tensors: dict[str, Lazy] = {}
    notes: tuple[str, ...] = ()
    known = {row.key for row in rows}
    parts = ("embedding", "decoder", "output_layer")  # all other keys belong to the optimizer
    if stray := sorted(key for key in stored.keys() - known if key.split(".")[0] in parts):
        raise UserError(f"{stored.folder}: unexpected tensor {stray[0]}, which a {shape.family} model of its "
                        f"configuration does not have ({len(stray)} such tensors)")  # fmt: skip
    for row in rows:
        if row.key not in stored:
            raise UserError(f"{stored.folder}: {row.key}, which its model has, is missing; check that model.path is "
                            "still the model that the run was started from")  # fmt: skip
        whole = stored.part(row.key, row.at)
        expected = full_shape(row, shape, shape.vocab)
        fits = whole.shape[0] >= expected[0] if not row.at and len(expected) > 1 else whole.shape[0] == expected[0]
        if not fits or whole.shape[1:] != expected[1:]:
            raise UserError(f"{stored.folder}: {row.key} has shape {whole.shape}, but its model expects {expected}")
        if whole.shape[0] > expected[0]:
            notes = (f"removed the vocabulary padding: {whole.shape[0]} rows became {expected[0]}",)
        for i, name in enumerate(row.sources):
            tensors[name] = Picked(whole, row.transform.runs(i, whole.shape))
    return tensors, notes


def _open_megatron(checkpoint: Checkpoint) -> Model:
    folder = checkpoint.path
    shape = read_model_shape(folder)
    tensors, notes = _stored_tensors(StoredTensors(folder), shape)
    text = (folder / CONFIG).read_text(encoding="utf-8")
    return Model("megatron", shape, tensors, text, SideFiles((folder,)), tuple(sorted(folder.glob("*.distcp"))), notes)


def _open_nemo(folder: Path) -> Model:
    stored = StoredTensors(folder / "weights", nemo_names.PREFIX)
    embedding = "embedding.word_embeddings.weight"
    if embedding not in stored:
        raise UserError(f"{folder / 'weights'}: {nemo_names.PREFIX}{embedding} is missing; only language models are "
                        "supported")  # fmt: skip
    raw = nemo_names.hf_config(folder, stored.size(embedding)[0], stored.dtype(embedding))
    text = json.dumps(raw, indent=2) + "\n"
    shape = nemo_names.shape_of(text)
    tensors, notes = _stored_tensors(stored, shape)
    files = tuple(sorted((folder / "weights").glob("*.distcp")))
    return Model("nemo", shape, tensors, text, SideFiles(nemo_names.side_folders(folder)), files, notes)


def sides_of(checkpoint: Checkpoint, origin: Path, *, adapters: bool = False) -> SideFiles:
    """Returns the side files of a trained model.

    These are the files of the model that the run started from, the chat template and end tokens of its data, and a
    model card.

    Args:
        checkpoint: Checkpoint of the run.
        origin: Folder of the model that the run started from.
        adapters: Whether the model card describes adapters only.

    Raises:
        UserError: If a file no longer exists.
    """
    config, record = checkpoint.record["config"], checkpoint.record
    tokenizer = config["model"]["tokenizer"]
    template = record.get("chat_template")
    if template is None and (file := config["data"].get("chat_template")):  # a checkpoint of version 0.1
        try:
            template = Path(file).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{checkpoint.path} was trained with data.chat_template = {file}, which cannot be read "
                            f"({error}); restore the file") from None  # fmt: skip
    return SideFiles(
        (origin,),
        tokenizer=locate_model(tokenizer) if tokenizer else None,
        chat_template=template,
        ends=tuple(record.get("ends", ())),
        card=model_card(checkpoint, origin, adapters=adapters),
    )


def _open_run(checkpoint: Checkpoint, check: bool) -> Model:
    config = checkpoint.record["config"]
    origin = locate_model(config["model"]["path"])
    shape, lora = read_model_shape(origin), LoraConfig.model_validate(config["lora"])
    stored = StoredTensors(checkpoint.path)
    sides = sides_of(checkpoint, origin)
    files = tuple(sorted(checkpoint.path.glob("*.distcp")))
    raw: dict[str, Any] = dict(shape.raw)
    if lora.rank:
        from megatron_spo.convert import adapters  # imports Megatron, which takes seconds

        if check:
            adapters.check_origin(checkpoint, origin, shape)
        base = open_model(origin, check=False)
        tensors = adapters.merged_tensors(base.tensors, stored, shape, lora)
        files, notes = files + base.files, base.notes
    else:
        tensors, notes = _stored_tensors(stored, shape)
        raw.pop("torch_dtype", None)
        raw["dtype"] = str(stored.dtype("decoder.final_layernorm.weight")).removeprefix("torch.")
    return Model("run", shape, tensors, json.dumps(raw, indent=2) + "\n", sides, files, notes)
