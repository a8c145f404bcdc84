"""Open a model of any format, as Hugging Face tensors that are read when they are asked for."""

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
from megatron_spo.convert.sides import Sides
from megatron_spo.errors import UserError
from megatron_spo.model.families import full_shape, mappings
from megatron_spo.model.hf_files import locate_model, model_tensors


@dataclass(frozen=True)
class Model:
    """A model to convert.

    Attributes:
        kind: format that it is in: "hf", "megatron", "nemo", or "run" for a checkpoint of a training.
        shape: its numbers.
        tensors: all of its tensors, by their Hugging Face names, in the order of the model.
        config: text of its config.json.
        sides: its tokenizer, chat templates, generation config, and whatever else goes with the weights.
        files: all that the tensors are read from.
        notes: what a conversion leaves out or undoes, for the user.
    """

    kind: str
    shape: ModelShape
    tensors: Mapping[str, Lazy]
    config: str
    sides: Sides
    files: tuple[Path, ...]
    notes: tuple[str, ...] = ()


def open_model(source: Path, *, check: bool = True) -> Model:
    """The model in a Hugging Face folder, a Megatron model folder, a NeMo 2 checkpoint, a run or one checkpoint of it.

    Args:
        source: its path.
        check: compare checksums where there are some; not needed where another process has done so.

    Raises:
        UserError: it is none of these, damaged, or not built.
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
        return open_checkpoint(folder, scales=True)  # and never loads them
    except Damaged as error:
        raise UserError(f"{error}; name another checkpoint") from error


def _open_hf(folder: Path) -> Model:
    shape = read_model_shape(folder)
    tensors, needless = model_tensors(folder, shape)
    check_tied(folder, shape.raw, stored_tensors(folder))
    read_generation_config(folder)
    notes = tuple(f"left out {name}, which the model computes from others" for name in needless)
    text, files = (folder / CONFIG).read_text(encoding="utf-8"), tuple(shard_files(folder))
    return Model("hf", shape, lazy(tensors), text, Sides((folder,)), files, notes)


def check_sums(folder: Path) -> None:
    """Compare the checksums that `convert` leaves in the index of a Hugging Face folder.

    Raises:
        UserError
    """
    index = folder / INDEX
    sums = json.loads(index.read_text())["metadata"].get("xxh3_128", {}) if index.exists() else {}
    for name, expected in sums.items():
        if checksum(folder / name) != expected:
            raise UserError(f"{folder / name} does not match its checksum in {INDEX}; copy it again, or remove the "
                            "checksums there if you have changed it")  # fmt: skip


def same(one: Lazy, other: Lazy) -> bool:
    """Whether two tensors are equal bit for bit, so also where they hold no numbers."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return all(as_bytes(a) == as_bytes(b) for a, b in zip(one.blocks(), other.blocks(), strict=True))


def _stored_tensors(stored: StoredTensors, shape: ModelShape) -> tuple[dict[str, Lazy], tuple[str, ...]]:
    """The Hugging Face tensors in a folder of Megatron's, and a note about the padding."""
    rows = mappings(shape)
    tensors: dict[str, Lazy] = {}
    notes: tuple[str, ...] = ()
    known = {row.key for row in rows}
    parts = ("embedding", "decoder", "output_layer")  # the others are the optimizer's
    if stray := sorted(key for key in stored.keys() - known if key.split(".")[0] in parts):
        raise UserError(f"{stored.folder} holds {stray[0]}, which a {shape.family} model of its configuration does not "
                        f"have ({len(stray)} such tensors)")  # fmt: skip
    for row in rows:
        if row.key not in stored:
            raise UserError(f"{stored.folder} lacks {row.key}, which its model has; is model.path still the model that "
                            "the run was started with?")  # fmt: skip
        whole = stored.part(row.key, row.at)
        expected = full_shape(row, shape, shape.vocab)
        fits = whole.shape[0] >= expected[0] if not row.at and len(expected) > 1 else whole.shape[0] == expected[0]
        if not fits or whole.shape[1:] != expected[1:]:
            raise UserError(f"{stored.folder}: {row.key} has shape {whole.shape}, but its model calls for {expected}")
        if whole.shape[0] > expected[0]:
            notes = (f"left out the padding of the vocabulary: {whole.shape[0]} rows are {expected[0]} again",)
        for i, name in enumerate(row.sources):
            tensors[name] = Picked(whole, row.transform.runs(i, whole.shape))
    return tensors, notes


def _open_megatron(checkpoint: Checkpoint) -> Model:
    folder = checkpoint.path
    shape = read_model_shape(folder)
    tensors, notes = _stored_tensors(StoredTensors(folder), shape)
    text = (folder / CONFIG).read_text(encoding="utf-8")
    return Model("megatron", shape, tensors, text, Sides((folder,)), tuple(sorted(folder.glob("*.distcp"))), notes)


def _open_nemo(folder: Path) -> Model:
    stored = StoredTensors(folder / "weights", nemo_names.PREFIX)
    embedding = "embedding.word_embeddings.weight"
    if embedding not in stored:
        raise UserError(f"{folder / 'weights'} lacks {nemo_names.PREFIX}{embedding}; only language models are built")
    raw = nemo_names.hf_config(folder, stored.size(embedding)[0], stored.dtype(embedding))
    text = json.dumps(raw, indent=2) + "\n"
    shape = nemo_names.shape_of(text)
    tensors, notes = _stored_tensors(stored, shape)
    files = tuple(sorted((folder / "weights").glob("*.distcp")))
    return Model("nemo", shape, tensors, text, Sides(nemo_names.side_folders(folder)), files, notes)


def sides_of(checkpoint: Checkpoint, origin: Path, *, adapters: bool = False) -> Sides:
    """The side files of what a run has trained: those of the model that it began with, in the folder `origin`, with the
    template and the end tokens of its data, and a model card; `adapters`: the card is one for adapters alone.

    Raises:
        UserError: a file is not there any more.
    """
    config, record = checkpoint.record["config"], checkpoint.record
    tokenizer = config["model"]["tokenizer"]
    template = record.get("chat_template")
    if template is None and (file := config["data"].get("chat_template")):  # a checkpoint of version 0.1
        try:
            template = Path(file).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{checkpoint.path} was trained with data.chat_template {file}, which cannot be read "
                            f"({error}); restore the file") from None  # fmt: skip
    return Sides(
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
        from megatron_spo.convert import adapters  # brings Megatron along, which takes seconds to load

        if check:
            adapters.check_origin(checkpoint, origin, shape)
        base = _open_hf(origin)
        tensors = adapters.merged_tensors(base.tensors, stored, shape, lora)
        files, notes = files + base.files, base.notes
    else:
        tensors, notes = _stored_tensors(stored, shape)
        raw.pop("torch_dtype", None)
        raw["dtype"] = str(stored.dtype("decoder.final_layernorm.weight")).removeprefix("torch.")
    return Model("run", shape, tensors, json.dumps(raw, indent=2) + "\n", sides, files, notes)
