"""Shapes of published models: a folder each, with what of its config.json on the hub decides shape and arithmetic.

Source: config.json of meta-llama/Llama-3.3-70B-Instruct, meta-llama/Llama-3.1-8B-Instruct, Qwen/Qwen2.5-72B-Instruct,
Qwen/Qwen3-32B, Qwen/Qwen3-30B-A3B, Qwen/Qwen3-235B-A22B, mistralai/Mixtral-8x7B-Instruct-v0.1,
mistralai/Mixtral-8x22B-Instruct-v0.1, google/gemma-2-9b-it, google/gemma-2-27b-it, and the text_config of
google/gemma-3-12b-it and google/gemma-3-27b-it with what transformers assumes for the keys that it leaves out.
"""

from pathlib import Path

from megatron_spo.config.model_folder import check_folder, count_numbers, has_weights
from megatron_spo.config.model_shape import ModelShape, read_model_shape
from megatron_spo.errors import UserError

FOLDER = Path(__file__).parent
PRESETS = tuple(sorted(path.parent.name for path in FOLDER.glob("*/config.json")))


def shape_of(model: str) -> ModelShape:
    """The shape of a model folder, of a preset, or of a hub id whose name begins with that of a preset.

    Raises:
        UserError: none of these, or the folder's files are not as they must be.
    """
    if Path(model).is_dir():
        return _shape_of_folder(Path(model))
    name = model.rpartition("/")[2].lower().removeprefix("meta-")
    for preset in PRESETS:
        if name == preset.lower() or name.startswith(f"{preset.lower()}-"):
            return read_model_shape(FOLDER / preset)
    raise UserError(
        f"model.path {model!r}: neither a folder with config.json nor a known model ({', '.join(PRESETS)}); fetch its "
        "config.json, or name a model of the same shape with --model"
    )


def _shape_of_folder(folder: Path) -> ModelShape:
    """The shape by config.json, which must be that of the weights if the folder has some."""
    if not has_weights(folder):
        return read_model_shape(folder)
    check_folder(folder)
    shape = read_model_shape(folder)
    if (stored := count_numbers(folder, tied=shape.tied)) != shape.parameters:
        raise UserError(f"{folder}: its weights are {stored} numbers, but its config.json calls for "
                        f"{shape.parameters}; take both from the same model")  # fmt: skip
    return shape
