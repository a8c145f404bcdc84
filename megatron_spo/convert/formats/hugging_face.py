"""Writes Hugging Face folders."""

import json
from pathlib import Path

from megatron_spo.checkpoint.lazy import Lazy
from megatron_spo.config.model_folder import CONFIG, INDEX
from megatron_spo.convert.formats.base import Record, Shard, filled
from megatron_spo.convert.safetensors_files import write_tensors
from megatron_spo.convert.source import Model


class HuggingFace:
    """Safetensors files, an index with checksums, config.json, the tokenizer and, for a run, a model card."""

    def shards(self, model: Model, limit: int) -> list[Shard]:
        groups = list(filled(((item, item[1].nbytes) for item in model.tensors.items()), limit))
        if len(groups) == 1:
            return [Shard("model.safetensors", *groups[0])]
        count = len(groups)
        return [Shard(f"model-{i:05d}-of-{count:05d}.safetensors", *group) for i, group in enumerate(groups, start=1)]

    def write(self, path: Path, items: list[tuple[str, Lazy]]) -> Record:
        return {"sum": write_tensors(path, dict(items)), "names": [name for name, _ in items]}

    def finish(self, folder: Path, model: Model, records: dict[str, Record]) -> list[str]:
        index = {
            "metadata": {
                "total_size": sum(tensor.nbytes for tensor in model.tensors.values()),
                "xxh3_128": {file: record["sum"] for file, record in records.items()},
            },
            "weight_map": {name: file for file, record in records.items() for name in record["names"]},
        }
        (folder / INDEX).write_text(json.dumps(index, indent=1) + "\n")
        (folder / CONFIG).write_text(model.config, encoding="utf-8")
        return [*model.notes, *model.sides.write(folder)]
