"""Writes NeMo 2 checkpoints: `weights` in torch_dist, and `context`, from which NeMo builds the model.

NeMo reads context/io.json, a tree of its classes as serialized by fiddle 0.3. context/model.yaml holds the same tree in
readable form; `nemo_names` reads that one.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from megatron_spo.config.model_shape import ModelShape
from megatron_spo.convert import nemo_names
from megatron_spo.convert.formats.base import Shard
from megatron_spo.convert.formats.torch_dist import TorchDist
from megatron_spo.convert.source import Model
from megatron_spo.errors import UserError

_MODELS = "nemo.collections.llm.gpt.model."
_CONFIGS = {"mistral": "MistralConfig7B", "qwen3_moe": "Qwen3MoEConfig"}
_MODULES = {"qwen3_moe": "qwen3"}


class Nemo(TorchDist):
    """A NeMo 2 checkpoint like one written by NeMo's import_ckpt: unpadded, for one GPU, without an optimizer."""

    prefix = nemo_names.PREFIX
    weights = "weights"

    def vocabulary(self, shape: ModelShape) -> int:
        return shape.vocab

    def shards(self, model: Model, limit: int) -> list[Shard]:
        if model.shape.family not in nemo_names.CLASSES:
            raise UserError(f"--to nemo is not supported for {model.shape.family} models, only for "
                            f"{', '.join(nemo_names.CLASSES)}; use --to hf or --to megatron")  # fmt: skip
        return super().shards(model, limit)

    def finish_folder(self, folder: Path, model: Model, sums: dict[str, list[int | str]]) -> list[str]:
        context = folder / "context"
        for name in ("nemo_tokenizer", "artifacts"):
            (context / name).mkdir(parents=True, exist_ok=True)
        notes = model.sides.write(context / "nemo_tokenizer")
        _for_transformers_4(context / "nemo_tokenizer" / "tokenizer_config.json")
        generation = context / "nemo_tokenizer" / "generation_config.json"
        if generation.exists():
            generation.rename(context / "artifacts" / generation.name)
        _write_common(folder / self.weights)
        built = _model(model.shape, model.tensors["model.norm.weight"].dtype)
        (context / "model.yaml").write_text(yaml.safe_dump(_readable(built)), encoding="utf-8")
        (context / "io.json").write_text(json.dumps(_Fiddle().document(_context(built))), encoding="utf-8")
        return notes


def _for_transformers_4(path: Path) -> None:
    """Restores the names that transformers 5 has changed in a tokenizer's configuration; NeMo 2.7 needs version 4."""
    content = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if content.get("tokenizer_class") != "TokenizersBackend":
        return
    content["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(content.get("extra_special_tokens"), list):
        content["additional_special_tokens"] = content.pop("extra_special_tokens")
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _write_common(weights: Path) -> None:
    """Writes common.pt with the entries that Lightning and NeMo 2.7 require besides tensors."""
    content = {"singleton_local_shards": False, "chained_optim_avoid_prefix": True}
    torch.save(
        {
            "epoch": 0,
            "global_step": 0,
            "pytorch-lightning_version": "2.4.0",
            "state_dict": {},
            "loops": {},
            "callbacks": {},
            "optimizer_states": [],
            "lr_schedulers": [],
            "content_metadata": {**content, "distrib_optim_sharding_type": "dp_reshardable"},
        },
        weights / "common.pt",
    )


@dataclass(frozen=True)
class _Object:
    """A class or function of another package; `arguments` is None if it is only referred to, not called."""

    path: str
    arguments: Mapping[str, Any] | None = None


def _model(shape: ModelShape, dtype: torch.dtype) -> _Object:
    module = _MODELS + _MODULES.get(shape.family, shape.family) + "."
    config = _CONFIGS.get(shape.family, f"{nemo_names.CLASSES[shape.family]}Config")
    settings = _settings(shape, dtype)
    if "scale_factor" in settings:
        config = "Llama31Config"
    tokenizer = "nemo.collections.common.tokenizers.huggingface.auto_tokenizer.AutoTokenizer"
    return _Object(
        f"{module}{nemo_names.CLASSES[shape.family]}Model",
        {
            "config": _Object(module + config, settings),
            "tokenizer": _Object(tokenizer, {"pretrained_model_name": "nemo_tokenizer"}),
        },
    )


def _context(model: _Object) -> _Object:
    strategy = _Object(
        "nemo.lightning.pytorch.strategies.megatron_strategy.MegatronStrategy", {"ckpt_save_optimizer": False}
    )
    trainer = {"accelerator": "cpu", "strategy": strategy, "devices": 1}
    return _Object(
        "nemo.lightning.io.pl.TrainerContext",
        {"model": model, "trainer": _Object("nemo.lightning.pytorch.trainer.Trainer", trainer), "extra": {}},
    )


def _settings(shape: ModelShape, dtype: torch.dtype) -> dict[str, Any]:
    """Returns the arguments of the model's configuration class in NeMo."""
    settings: dict[str, Any] = {
        "num_layers": shape.layers,
        "hidden_size": shape.hidden,
        "ffn_hidden_size": shape.ffn,
        "num_attention_heads": shape.heads,
        "num_query_groups": shape.kv_heads,
        "kv_channels": shape.head_dim,
        "layernorm_epsilon": shape.norm_eps,
        "init_method_std": shape.initializer_range,
        "seq_length": shape.max_positions,
        "rotary_base": shape.rope_theta,
        "share_embeddings_and_output_weights": shape.tied,
        "vocab_size": shape.vocab,
        "make_vocab_size_divisible_by": shape.vocab & -shape.vocab if shape.vocab % 128 else 128,
        "bf16": dtype == torch.bfloat16,
        "fp16": dtype == torch.float16,
        "params_dtype": _Object(str(dtype)),
    }
    if shape.family in ("mistral", "mixtral"):
        settings["window_size"] = None if shape.sliding_window is None else [shape.sliding_window, 0]
    elif shape.sliding_window is not None:
        raise UserError(f"sliding_window = {shape.sliding_window} is not supported by NeMo for {shape.family} models; "
                        "use --to hf or --to megatron")  # fmt: skip
    if shape.experts is not None:
        settings |= {
            "num_moe_experts": shape.experts.count,
            "moe_router_topk": shape.experts.per_token,
            "moe_ffn_hidden_size": shape.experts.ffn,
            "moe_router_pre_softmax": not shape.experts.renormalised,
            "moe_aux_loss_coeff": float(shape.raw.get("router_aux_loss_coef", 0.0)),
        }
    return settings | _rope(shape)


def _rope(shape: ModelShape) -> dict[str, Any]:
    scaling = shape.rope_scaling
    if scaling is None:
        return {}
    if scaling["rope_type"] == "linear":
        return {"seq_len_interpolation_factor": float(scaling["factor"])}
    if shape.family != "llama":
        raise UserError(f"rope_type = {scaling['rope_type']!r} is not supported by NeMo for {shape.family} models, "
                        "only for llama; use --to hf or --to megatron")  # fmt: skip
    return {
        "scale_factor": float(scaling["factor"]),
        "low_freq_factor": float(scaling["low_freq_factor"]),
        "high_freq_factor": float(scaling["high_freq_factor"]),
        "old_context_len": int(scaling["original_max_position_embeddings"]),
    }


def _readable(value: Any) -> Any:
    """Returns the tree in the form of model.yaml."""
    if not isinstance(value, _Object):
        return value
    if value.arguments is None:
        return {"_target_": value.path, "_call_": False}
    return {"_target_": value.path, **{name: _readable(argument) for name, argument in value.arguments.items()}}


class _Fiddle:
    """Serializes a tree to fiddle's JSON, in which every object has a key and is referred to by it."""

    def __init__(self) -> None:
        self._objects: dict[str, Any] = {}
        self._counts: dict[str, int] = {}

    def document(self, tree: _Object) -> dict[str, Any]:
        """Returns the whole JSON document of a tree."""
        root = self._value(tree, "<root>")
        return {
            "root": root,
            "objects": self._objects,
            "refcounts": dict.fromkeys(self._objects, 1),
            "version": "0.0.1",
        }

    def _add(self, name: str, content: dict[str, Any]) -> dict[str, str]:
        self._counts[name] = self._counts.get(name, 0) + 1
        key = f"{name}_{self._counts[name]}"
        self._objects[key] = content
        return {"type": "ref", "key": key}

    def _value(self, value: Any, path: str) -> dict[str, Any]:
        if isinstance(value, dict):
            return self._add("dict", {**_EMPTY, "paths": [path]})
        if isinstance(value, list):
            items = [[f"Index(index={i})", self._value(item, f"{path}[{i}]")] for i, item in enumerate(value)]
            return self._add("list", {**_collection("list", items), "paths": [path]})
        if not isinstance(value, _Object):
            return {"type": "leaf", "value": value, "paths": [path]}
        if value.arguments is None:
            return {**_name(value.path), "paths": [path]}
        items = [[f"Attr(name={name!r})", self._value(a, f"{path}.{name}")] for name, a in value.arguments.items()]
        names = [[f"Index(index={i})", name] for i, name in enumerate(value.arguments)]
        traverser = _name("fiddle._src.config.BuildableTraverserMetadata")
        metadata = self._add(
            "buildable_traverser_metadata",
            {
                "type": traverser,
                "items": [
                    ["Attr(name='fn_or_cls')", _name(value.path)],
                    ["Attr(name='argument_names')", self._add("tuple", _collection("tuple", names))],
                    ["Attr(name='argument_tags')", self._add("dict", _EMPTY)],
                    ["Attr(name='argument_history')", self._add("dict", _EMPTY)],
                ],
                "metadata": traverser,
            },
        )
        config = {"type": _name("fiddle._src.config.Config"), "items": items, "metadata": metadata, "paths": [path]}
        return self._add("config", config)


def _name(path: str) -> dict[str, Any]:
    module, _, name = path.rpartition(".")
    return {"type": "pyref", "module": module, "name": name}


def _collection(kind: str, items: list[Any], metadata: Any = None) -> dict[str, Any]:
    return {"type": _name(f"builtins.{kind}"), "items": items, "metadata": metadata}


_EMPTY = _collection("dict", [], _collection("tuple", []))
