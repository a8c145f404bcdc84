"""Shapes of published models: one folder each, with the keys of config.json on the hub that determine the shape.

Source: config.json of meta-llama/Llama-3.3-70B-Instruct, meta-llama/Llama-3.1-8B-Instruct, Qwen/Qwen2.5-72B-Instruct,
Qwen/Qwen3-32B, Qwen/Qwen3-30B-A3B, Qwen/Qwen3-235B-A22B, mistralai/Mixtral-8x7B-Instruct-v0.1,
mistralai/Mixtral-8x22B-Instruct-v0.1, google/gemma-2-9b-it, google/gemma-2-27b-it, and the text_config of
google/gemma-3-12b-it and google/gemma-3-27b-it with the defaults of transformers for missing keys.
"""

from pathlib import Path

from megatron_spo.config.model_folder import check_folder, count_numbers, has_weights
from megatron_spo.config.model_shape import ModelShape, read_model_shape
from megatron_spo.errors import UserError

FOLDER = Path(__file__).parent
PRESETS = tuple(sorted(path.parent.name for path in FOLDER.glob("*/config.json")))


def shape_of(model: str) -> ModelShape:
    """Returns the shape of a model folder, of a preset, or of a hub id whose name starts with the name of a preset.

    Raises:
        UserError: the model is none of these, or the files of the folder are invalid.
    """
    if Path(model).is_dir():
        return _shape_of_folder(Path(model))
    name = model.rpartition("/")[2].lower().removeprefix("meta-")
    for preset in PRESETS:
        if name == preset.lower() or name.startswith(f"{preset.lower()}-"):
            return read_model_shape(FOLDER / preset)
    raise UserError(
        f"model.path {model!r}: neither a folder with config.json nor a known model ({', '.join(PRESETS)}); "
        "download its config.json, or give a model of the same shape with --model"
    )


def _shape_of_folder(folder: Path) -> ModelShape:
    """Returns the shape in config.json, and checks that it matches the weights if there are any."""
    if not has_weights(folder):
        return read_model_shape(folder)
    check_folder(folder)
    shape = read_model_shape(folder)
    if (stored := count_numbers(folder, tied=shape.tied)) != shape.parameters:
        raise UserError(f"{folder}: the weights have {stored} parameters, but config.json requires "
                        f"{shape.parameters}; use config.json and weights of the same model")  # fmt: skip
    return shape
