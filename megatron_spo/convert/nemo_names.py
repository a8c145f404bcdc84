"""Detects NeMo 2 checkpoints and reads the model configuration from their context; NeMo itself is not needed."""

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
import yaml

from megatron_spo.config.model_shape import ModelShape, read_model_shape
from megatron_spo.errors import UserError

PREFIX = "module."
"""Prefix of every key in `weights`."""
CLASSES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3", "mixtral": "Mixtral",
           "qwen3_moe": "Qwen3"}  # fmt: skip
"""Family -> prefix of its NeMo classes, such as LlamaModel and LlamaConfig."""
_ARCHITECTURES = {"qwen3_moe": "Qwen3MoeForCausalLM"}
_EXPECTED = {
    "add_bias_linear": False, "gated_linear_unit": True, "layernorm_zero_centered_gamma": False,
    "normalization": "RMSNorm", "position_embedding_type": "rope", "rotary_interleaved": False, "rotary_percent": 1.0,
    "moe_layer_freq": 1, "moe_shared_expert_intermediate_size": None, "multi_latent_attention": False,
    "moe_router_score_function": "softmax", "mtp_num_layers": None, "moe_router_enable_expert_bias": False,
}  # fmt: skip


def is_checkpoint(folder: Path) -> bool:
    """Returns whether a folder is a NeMo 2 checkpoint."""
    return (folder / "context").is_dir() and (folder / "weights").is_dir()


def refuse_legacy(path: Path) -> None:
    """Refuses a NeMo 1 checkpoint: a `.nemo` tar file, or its extracted content.

    Raises:
        UserError: If `path` is one; the message says how to convert it.
    """
    if path.suffix == ".nemo" or (path / "model_weights").is_dir():
        raise UserError(f"{path} is a NeMo 1 checkpoint, which is not supported; convert it to Hugging Face format "
                        "with NeMo 1 (convert_*_nemo_to_hf.py in scripts/checkpoint_converters of its repository), or "
                        "use the Hugging Face model that it was made from")  # fmt: skip


def side_folders(folder: Path) -> tuple[Path, ...]:
    """Returns the folders of the tokenizer and of the generation config; either may be missing."""
    return folder / "context" / "nemo_tokenizer", folder / "context" / "artifacts"


def hf_config(folder: Path, rows: int, dtype: torch.dtype) -> dict[str, Any]:
    """Returns the content of config.json for the model in a NeMo 2 checkpoint.

    Args:
        folder: Folder of the checkpoint.
        rows: Rows of its embedding, used as the vocabulary size if the checkpoint does not give one.
        dtype: Dtype of its weights.

    Raises:
        UserError: If its context cannot be read, or asks for something that is not supported.
    """
    path = folder / "context" / "model.yaml"
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        config, name = content["config"], content["_target_"].rsplit(".", 1)[-1].removesuffix("Model")
    except (OSError, UnicodeDecodeError, yaml.YAMLError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} cannot be read as the configuration of a NeMo 2 checkpoint ({error})") from None
    families = [family for family, beginning in CLASSES.items() if beginning == name]
    if not families:
        raise UserError(f"{path}: {name}Model is not supported; supported: {', '.join(sorted(set(CLASSES.values())))}")
    family = families[-1] if config.get("num_moe_experts") else families[0]
    _refuse_unsupported(path, config, family)
    try:
        return _hf_config(family, config, rows, dtype) | _generation(folder)
    except KeyError as error:
        raise UserError(f"{path}: config.{error.args[0]} is missing") from None


def _refuse_unsupported(path: Path, config: dict[str, Any], family: str) -> None:
    expected = _EXPECTED | {"add_qkv_bias": family == "qwen2", "qk_layernorm": family.startswith("qwen3")}
    for key, only in expected.items():
        if (value := config.get(key, only)) != only:
            raise UserError(f"{path}: {key} = {value!r} is not supported for {family} models; it must be {only!r}")
    activation = (config.get("activation_func") or {}).get("_target_", "silu")
    if not activation.endswith("silu"):
        raise UserError(f"{path}: activation_func = {activation!r} is not supported; it must be silu (SwiGLU)")


def shape_of(text: str) -> ModelShape:
    """Returns the shape of a model whose config.json has this text.

    Raises:
        UserError: As for `read_model_shape`.
    """
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(text)
        return read_model_shape(folder)


def _hf_config(family: str, config: dict[str, Any], rows: int, dtype: torch.dtype) -> dict[str, Any]:
    raw: dict[str, Any] = {
        "architectures": [_ARCHITECTURES.get(family, f"{CLASSES[family]}ForCausalLM")],
        "model_type": family,
        "dtype": str(dtype).removeprefix("torch."),
        "hidden_act": "silu",
        "hidden_size": config["hidden_size"],
        "intermediate_size": config["ffn_hidden_size"],
        "num_hidden_layers": config["num_layers"],
        "num_attention_heads": config["num_attention_heads"],
        "num_key_value_heads": config.get("num_query_groups") or config["num_attention_heads"],
        "head_dim": config.get("kv_channels") or config["hidden_size"] // config["num_attention_heads"],
        "max_position_embeddings": config["seq_length"],
        "initializer_range": config["init_method_std"],
        "rms_norm_eps": config["layernorm_epsilon"],
        "rope_theta": config["rotary_base"],
        "tie_word_embeddings": config["share_embeddings_and_output_weights"],
        "vocab_size": config.get("vocab_size") or rows,
        "attention_bias": False,
        "use_cache": True,
    }
    if window := config.get("window_size"):
        raw["sliding_window"] = window[0]
    elif family in ("mistral", "mixtral"):
        raw["sliding_window"] = None
    if config.get("scale_factor"):
        raw["rope_scaling"] = {
            "rope_type": "llama3",
            "factor": float(config["scale_factor"]),
            "low_freq_factor": float(config["low_freq_factor"]),
            "high_freq_factor": float(config["high_freq_factor"]),
            "original_max_position_embeddings": config["old_context_len"],
        }
    elif config.get("seq_len_interpolation_factor"):
        raw["rope_scaling"] = {"rope_type": "linear", "factor": float(config["seq_len_interpolation_factor"])}
    return raw | (_experts(family, config) if config.get("num_moe_experts") else {})


def _experts(family: str, config: dict[str, Any]) -> dict[str, Any]:
    width = config.get("moe_ffn_hidden_size") or config["ffn_hidden_size"]
    shared = {"num_experts_per_tok": config["moe_router_topk"], "router_aux_loss_coef": config["moe_aux_loss_coeff"]}
    if family == "mixtral":
        return shared | {"num_local_experts": config["num_moe_experts"], "intermediate_size": width}
    return shared | {
        "num_experts": config["num_moe_experts"],
        "moe_intermediate_size": width,
        "norm_topk_prob": not config["moe_router_pre_softmax"],
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }


def _generation(folder: Path) -> dict[str, Any]:
    """Returns the ids of the special tokens in the generation config."""
    path = folder / "context" / "artifacts" / "generation_config.json"
    given = json.loads(path.read_text()) if path.exists() else {}
    return {key: given[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if key in given}
