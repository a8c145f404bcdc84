"""Creates tiny Hugging Face models and tokenizers, without network access or weights in the repository."""

import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from megatron_spo.config.yaml_text import format_yaml

FAMILIES = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "mixtral": (MixtralConfig, MixtralForCausalLM),
    "qwen3_moe": (Qwen3MoeConfig, Qwen3MoeForCausalLM),
    "gemma2": (Gemma2Config, Gemma2ForCausalLM),
    "gemma3_text": (Gemma3TextConfig, Gemma3ForCausalLM),
}
CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def tiny_tokenizer(folder: Path, *, chat: bool = False) -> PreTrainedTokenizerFast:
    """Returns a byte-level tokenizer without merges (256 bytes + special tokens), saved in `folder`."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<pad>", "<eos>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>"]
    vocab = {token: i for i, token in enumerate(special + alphabet)}
    raw = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw,
        pad_token="<pad>",
        eos_token="<|end|>" if chat else "<eos>",
        extra_special_tokens=special[1:],
    )
    if chat:
        tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    return tokenizer


def tiny_model(
    folder: Path, family: str = "llama", *, seed: int = 0, scale: float = 0.1, **overrides
) -> PreTrainedModel:
    """Returns a random model, saved in `folder` with a tokenizer. `scale` is the standard deviation of its weights,
    large enough that logits differ clearly between tokens."""
    config_class, model_class = FAMILIES[family]
    shape: dict[str, Any] = {
        "vocab_size": 262,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "initializer_range": scale,
        "tie_word_embeddings": False,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": None,
    }
    if family in ("qwen3", "qwen3_moe", "gemma2", "gemma3_text"):
        shape["head_dim"] = 8
    if family in ("gemma2", "gemma3_text"):
        shape |= {"query_pre_attn_scalar": 12, "sliding_window": 8}
    if family == "gemma2":  # caps that even these small numbers reach
        shape |= {"attn_logit_softcapping": 0.5, "final_logit_softcapping": 2.0}
    if family in ("mixtral", "qwen3_moe"):
        shape |= {"num_local_experts": 4, "num_experts_per_tok": 2}
    if family == "qwen3_moe":
        shape |= {"num_experts": shape.pop("num_local_experts"), "moe_intermediate_size": 48}
    if family == "mistral":
        shape["sliding_window"] = None
    torch.manual_seed(seed)
    model = model_class(config_class(**{**shape, **overrides}))
    with torch.no_grad():  # neutral norms and biases would hide a mapping error
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * scale)
    model.save_pretrained(folder)
    tiny_tokenizer(folder)
    return model


def tiny_judge(folder: Path, **changes: Any) -> Path:
    """Saves a random reward model, a sequence classifier with one output; returns its folder."""
    torch.manual_seed(3)
    shape = {"vocab_size": 262, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
             "num_attention_heads": 2, "max_position_embeddings": 64, "num_labels": 1, "pad_token_id": 0}  # fmt: skip
    LlamaForSequenceClassification(LlamaConfig(**{**shape, **changes})).save_pretrained(folder)
    tiny_tokenizer(folder, chat=True)
    return folder


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def arithmetic_pairs(count: int, *, seed: int = 0) -> list[dict]:
    """Returns short preference pairs of varying length."""
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        a, b = rng.randint(0, 999), rng.randint(0, 999)
        wrong = a + b + rng.choice([-10, -1, 1, 10])
        rejected = f"about {wrong}" if rng.random() < 0.5 else f"{wrong}"
        rows.append({"prompt": f"{a}+{b}=", "chosen": f"{a + b}", "rejected": rejected})
    return rows


def tiny_run(
    folder: Path,
    *,
    pairs: int | list[dict],
    held_out: int | list[dict] = 0,
    family: str = "llama",
    shape: Mapping[str, Any] | None = None,
    **sections: dict[str, Any] | str | None,
) -> Path:
    """Creates a model, data and a configuration for a short run in fp32; returns the path of the configuration.

    `folder` then holds `model`, `pairs.jsonl`, `held-out.jsonl` (unless `held_out` is 0) and `config.yaml`.

    Args:
        pairs: training pairs: a number of `arithmetic_pairs`, or rows.
        held_out: held-out pairs, likewise, with another seed.
        family, shape: as for `tiny_model`. No model is created if `model` gives another path.
        sections: sections of the configuration: their keys are added to the defaults; None removes a section.
    """
    config: dict[str, Any] = {
        "output": f"{folder}/run",
        "model": {"path": f"{folder}/model"},
        "data": {"train": f"{folder}/pairs.jsonl", "max_length": 64},
        "reference": {"cache": f"{folder}/cache"},
        "optimizer": {"lr": 1e-3},
        "precision": {"dtype": "fp32"},
        "training": {"global_batch_size": 8, "steps": 4, "threads": 1},
        "logging": {"progress": False, "report": False},  # the report costs more than the run
    }
    write_jsonl(folder / "pairs.jsonl", arithmetic_pairs(pairs) if isinstance(pairs, int) else pairs)
    if held_out:
        rows = arithmetic_pairs(held_out, seed=1) if isinstance(held_out, int) else held_out
        config["data"]["eval"] = str(write_jsonl(folder / "held-out.jsonl", rows))
    for name, section in sections.items():
        config[name] = {**config.get(name, {}), **section} if isinstance(section, dict) else section
    if config["model"]["path"] == f"{folder}/model":
        tiny_model(folder / "model", family, **(shape or {}))
    path = folder / "config.yaml"
    path.write_text(format_yaml({name: section for name, section in config.items() if section is not None}))
    return path
