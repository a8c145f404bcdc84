"""Writes a family of models for a study: different sizes of one architecture, random weights, a common tokenizer."""

import json
import shutil
from pathlib import Path
from typing import Any

from megatron_spo.config.model_shape import read_model_shape
from megatron_spo.errors import UserError
from megatron_spo.files import new_folder
from megatron_spo.scaling.spec import ModelsSpec
from megatron_spo.scaling.study import Study

WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json")


def write_models(study: Study) -> None:
    """Writes OUT/models/NAME in Hugging Face format, skipping models that exist.

    Raises:
        UserError: If config.json lacks a key, a shape is not supported, or a folder has a model of another shape.
    """
    if study.spec.models is not None:
        for name, config in sized_configs(study.path, study.spec.models).items():
            _write(study.spec.models, study.out / "models" / name, config)


def sized_configs(path: Path, models: ModelsSpec) -> dict[str, dict[str, Any]]:
    """Returns the content of config.json of each model of a study by name; `path` is that of the study."""
    read_model_shape(models.like)
    base = json.loads((Path(models.like) / "config.json").read_text())
    for name, changes in models.sizes.items():
        if unknown := [key for key in changes if key not in base]:
            raise UserError(f"{path}: models.sizes.{name}: {models.like}/config.json has no {unknown[0]}; use its keys")
    return {name: {**base, **changes} for name, changes in models.sizes.items()}


def _write(models: ModelsSpec, folder: Path, config: dict[str, Any]) -> None:
    text = json.dumps(config, indent=1)
    record = folder / "made_from.json"
    if record.is_file():
        if record.read_text() != text:
            raise UserError(f"{folder} holds a model of other sizes; remove it, or set another `out`")
        return
    with new_folder(folder) as partial:
        shutil.copytree(models.like, partial, ignore=shutil.ignore_patterns(*WEIGHTS), dirs_exist_ok=True)
        (partial / "config.json").write_text(text)
        read_model_shape(partial)
        from transformers import AutoConfig, AutoModelForCausalLM, set_seed  # takes seconds; most studies need none
        from transformers.utils import logging

        logging.disable_progress_bar()
        set_seed(models.seed)
        AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(partial)).save_pretrained(partial)
        (partial / record.name).write_text(text)
