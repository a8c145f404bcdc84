"""Reads the shape of a model from its Hugging Face config.json and rejects features that are not supported."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_spo.config.json_types import check_types
from megatron_spo.config.model_folder import CONFIG, GEMMA, is_tied, read_config
from megatron_spo.errors import UserError

# the defaults of transformers for max_position_embeddings
DEFAULT_POSITIONS = {"llama": 2048, "mistral": 131072, "qwen2": 32768, "qwen3": 32768,
                     "mixtral": 131072, "qwen3_moe": 32768, "gemma2": 8192, "gemma3_text": 131072}  # fmt: skip
FAMILIES = tuple(DEFAULT_POSITIONS)
ROPE_TYPES: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
"""Supported RoPE types and the numbers that each requires."""
MOST_LAYERS, MOST_EXPERTS = 10_000, 10_000
"""Upper limits. A larger number is a mistake, and the table of tensors would not fit into memory."""
ATTENTION_TYPES = ("full_attention", "sliding_attention")
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The linear projections of a layer, by Hugging Face's names."""


@dataclass(frozen=True)
class Experts:
    """The mixture of experts that replaces the feed-forward network of every layer.

    Each token is processed by `per_token` of `count` experts of width `ffn`. Their weights are the router's softmax
    over all experts, divided by the sum of the selected weights if `renormalised`.
    """

    count: int
    per_token: int
    ffn: int
    renormalised: bool


@dataclass(frozen=True)
class Gemma:
    """Properties of the Gemma families.

    Gemma also scales embeddings by the square root of the hidden size, has norms that multiply by 1 + weight before and
    after attention and feed-forward network, and uses GELU (tanh) instead of SiLU in the gate.

    Attributes:
        attention_scale: scale of the attention scores, instead of the inverse square root of the head dimension.
        attention_softcap, logit_softcap: c in c tanh(x / c) on attention scores and on logits, or None.
        local_theta: RoPE base of the layers with a sliding window, or None if it is the same.
    """

    attention_scale: float
    attention_softcap: float | None
    logit_softcap: float | None
    local_theta: float | None


@dataclass(frozen=True)
class ModelShape:
    """The dimensions and architecture of a model.

    Attributes:
        ffn: width of the feed-forward network of a dense layer; not used if there are `experts`.
        rope_scaling: the Hugging Face dict with `rope_type`, or None for plain RoPE.
        max_positions: context length in tokens.
        sliding_window: maximum number of tokens that a query attends to, itself included, in `sliding_layers`.
        sliding_layers: indices of the layers with a sliding window, counted from 0.
        raw: the content of config.json.
    """

    family: str
    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool
    norm_eps: float
    rope_theta: float
    rope_scaling: dict[str, Any] | None
    qkv_bias: bool
    qk_norm: bool
    max_positions: int
    sliding_window: int | None
    initializer_range: float
    raw: dict[str, Any]
    experts: Experts | None = None
    gemma: Gemma | None = None
    sliding_layers: tuple[int, ...] = ()

    @property
    def active_ffn(self) -> int:
        """Feed-forward columns that process one token in a layer."""
        return self.ffn if self.experts is None else self.experts.per_token * self.experts.ffn

    @property
    def attention_weights(self) -> int:
        """Number of weights in the attention projections of a layer."""
        return self.hidden * self.head_dim * 2 * (self.heads + self.kv_heads)

    @property
    def qkv_biases(self) -> int:
        """Number of query, key and value biases of a layer."""
        return (self.heads + 2 * self.kv_heads) * self.head_dim if self.qkv_bias else 0

    @property
    def norm_weights(self) -> int:
        """Number of weights in the norms of a layer."""
        return (2 if self.gemma is None else 4) * self.hidden + (2 * self.head_dim if self.qk_norm else 0)

    @property
    def parameters(self) -> int:
        """Number of parameters of the model, including all experts."""
        if self.experts is None:
            feed_forward = 3 * self.hidden * self.ffn
        else:
            feed_forward = self.experts.count * (3 * self.hidden * self.experts.ffn + self.hidden)
        layer = self.attention_weights + self.qkv_biases + feed_forward + self.norm_weights
        return self.layers * layer + (1 if self.tied else 2) * self.vocab * self.hidden + self.hidden

    @property
    def projections(self) -> dict[str, tuple[int, int]]:
        """(input, output) features of each projection in PROJECTIONS."""
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        attention = [(self.hidden, queries), (self.hidden, keys), (self.hidden, keys), (queries, self.hidden)]
        mlp = [(self.hidden, self.ffn), (self.hidden, self.ffn), (self.ffn, self.hidden)]
        return dict(zip(PROJECTIONS, [*attention, *mlp], strict=True))


def read_model_shape(folder: str | Path) -> ModelShape:
    """Reads the shape of the model in `folder`.

    Raises:
        UserError: config.json is missing, damaged, or requires a feature that is not supported.
    """
    path, raw = Path(folder) / CONFIG, read_config(Path(folder))
    family = raw["model_type"]
    _check_supported(path, raw, family)
    check_types(path, raw)
    hidden, heads = _count(path, raw, "hidden_size"), _count(path, raw, "num_attention_heads")
    kv_heads = _count(path, raw, "num_key_value_heads", heads)
    if heads % kv_heads:
        raise UserError(f"{path}: num_attention_heads = {heads} is not a multiple of num_key_value_heads = {kv_heads}")
    theta, scaling, local_theta = _rope(path, raw, family)
    layers = _count(path, raw, "num_hidden_layers", most=MOST_LAYERS)
    window = _sliding_window(path, raw, family)
    vocab = _count(path, raw, "vocab_size")
    if (padding := raw.get("pad_token_id")) is not None and padding >= vocab:
        raise UserError(f"{path}: pad_token_id = {padding} is beyond vocab_size = {vocab}")
    return ModelShape(
        family=family,
        layers=layers,
        hidden=hidden,
        ffn=_count(path, raw, "intermediate_size"),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=_head_dim(path, raw, hidden, heads, family),
        vocab=vocab,
        tied=is_tied(raw),
        norm_eps=_number(path, raw, "rms_norm_eps", 1e-5 if family == "mixtral" else 1e-6),
        rope_theta=theta,
        rope_scaling=scaling,
        qkv_bias=family == "qwen2",
        qk_norm=family in ("qwen3", "qwen3_moe", "gemma3_text"),
        max_positions=_count(path, raw, "max_position_embeddings", DEFAULT_POSITIONS[family]),
        sliding_window=window,
        initializer_range=_number(path, raw, "initializer_range", 0.02),
        raw=raw,
        experts=_experts(path, raw, family),
        gemma=_gemma(path, raw, family, local_theta),
        sliding_layers=_sliding_layers(path, raw, family, layers) if window else (),
    )


def _check_supported(path: Path, raw: Mapping[str, Any], family: str) -> None:
    if family == "gemma3":
        raise UserError(f"{path}: model_type = 'gemma3' (text and images) is not supported, only the text model "
                        "gemma3_text; docs/convert.md shows how to save the text model to its own folder")  # fmt: skip
    if family not in FAMILIES:
        raise UserError(
            f"{path}: model_type = {raw.get('model_type')!r} is not supported; supported: {', '.join(FAMILIES)}"
        )
    unsupported = {
        "attention_bias": raw.get("attention_bias"),
        "mlp_bias": raw.get("mlp_bias"),
        "quantization_config": raw.get("quantization_config"),
        "router_jitter_noise": raw.get("router_jitter_noise"),
        "mlp_only_layers": raw.get("mlp_only_layers"),
        "use_bidirectional_attention": raw.get("use_bidirectional_attention"),
        # transformers has this key for gemma3_text but does not read it
        "attn_logit_softcapping": family == "gemma3_text" and raw.get("attn_logit_softcapping"),
    }
    for key, value in unsupported.items():
        if value:
            raise UserError(f"{path}: {key} = {value!r} is not supported for {family} models; use a model without it")
    key, only = ("hidden_activation", "gelu_pytorch_tanh") if family in GEMMA else ("hidden_act", "silu")
    if (activation := raw.get(key, only)) != only:
        raise UserError(
            f"{path}: {key} = {activation!r} is not supported for {family} models; only {only!r} (gated) is"
        )


def _experts(path: Path, raw: Mapping[str, Any], family: str) -> Experts | None:
    """Returns the mixture of experts, or None for dense families. Every layer must have experts."""
    if family not in ("mixtral", "qwen3_moe"):
        return None
    if raw.get("decoder_sparse_step", 1) != 1:
        raise UserError(f"{path}: decoder_sparse_step = {raw['decoder_sparse_step']!r} is not supported; only 1 "
                        "(experts in every layer) is")  # fmt: skip
    # transformers 5 writes num_local_experts for both families; qwen3_moe models on the hub have num_experts
    count = _count(path, raw, "num_local_experts", raw.get("num_experts"), most=MOST_EXPERTS)
    per_token = _count(path, raw, "num_experts_per_tok")
    renormalised = family == "mixtral" or bool(raw.get("norm_topk_prob", False))
    if per_token > count:
        raise UserError(f"{path}: num_experts_per_tok = {per_token} exceeds the model's {count} experts")
    if per_token == 1 and renormalised:
        raise UserError(f"{path}: num_experts_per_tok = 1 with renormalised weights is not supported: every weight "
                        "would be 1, so the router would get no gradient")  # fmt: skip
    width = "intermediate_size" if family == "mixtral" else "moe_intermediate_size"
    return Experts(count, per_token, _count(path, raw, width), renormalised)


def _count(path: Path, raw: Mapping[str, Any], key: str, default: int | None = None, most: int = 2**31) -> int:
    value = raw.get(key)
    value = default if value is None else value
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(f"{path}: {key} = {value!r}; must be a positive integer")
    if value > most:
        raise UserError(f"{path}: {key} = {value!r}; must be at most {most}")
    return value


def _number(path: Path, raw: Mapping[str, Any], key: str, default: float | None) -> float:
    """Returns a positive number from config.json; null is the same as a missing key."""
    value = raw.get(key)
    value = default if value is None else value
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
        raise UserError(f"{path}: {key} = {value!r}; must be a positive number")
    return float(value)


def _mapping(path: Path, raw: Mapping[str, Any], key: str) -> dict[str, Any]:
    """Returns a copy of a JSON object; null is the same as an empty object."""
    value = raw.get(key)
    if not isinstance(value, dict | None):
        raise UserError(f"{path}: {key} = {value!r}; must be a JSON object")
    return dict(value or {})


def _head_dim(path: Path, raw: Mapping[str, Any], hidden: int, heads: int, family: str) -> int:
    default = {"qwen3": 128, "gemma2": 256, "gemma3_text": 256}.get(family)  # independent of the hidden size
    given = raw.get("head_dim") is not None
    divided = not given and default is None
    # transformers refuses the size of these families even if head_dim is given
    if hidden % heads and (divided or family in ("llama", *GEMMA)):
        raise UserError(f"{path}: hidden_size = {hidden} is not a multiple of num_attention_heads = {heads}")
    return hidden // heads if divided else _count(path, raw, "head_dim", default)


def _gemma(path: Path, raw: Mapping[str, Any], family: str, local_theta: float | None) -> Gemma | None:
    if family not in GEMMA:
        return None
    caps = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0} if family == "gemma2" else {}
    attention, logits = (
        None if raw.get(key, caps.get(key)) is None else _number(path, raw, key, caps.get(key))
        for key in ("attn_logit_softcapping", "final_logit_softcapping")
    )
    return Gemma(_number(path, raw, "query_pre_attn_scalar", 256) ** -0.5, attention, logits, local_theta)


def _rope(path: Path, raw: Mapping[str, Any], family: str) -> tuple[float, dict[str, Any] | None, float | None]:
    """Returns the RoPE base, the scaling, and the base of layers with a sliding window (None if it is the same).

    transformers 5 stores them in `rope_parameters`, transformers 4 in `rope_theta`, `rope_scaling` and
    `rope_local_base_freq`.
    """
    # transformers prefers rope_scaling if both are present
    scaling = _mapping(path, raw, "rope_scaling") or _mapping(path, raw, "rope_parameters")
    local = None
    if family == "gemma3_text":
        within = _mapping(path, scaling, "sliding_attention")
        if (kind := within.get("rope_type", "default")) != "default":
            raise UserError(f"{path}: RoPE type {kind!r} is not supported in sliding-window layers; only 'default' is")
        local = _number(path, within, "rope_theta", _number(path, raw, "rope_local_base_freq", 1e4))
        scaling = _mapping(path, scaling, "full_attention") if "full_attention" in scaling else scaling
    default = 1e6 if family in ("mixtral", "gemma3_text") else 1e4
    theta = _number(
        path, {"rope_theta": scaling.pop("rope_theta", None)}, "rope_theta", _number(path, raw, "rope_theta", default)
    )
    kind = scaling.setdefault("rope_type", scaling.pop("type", "default"))
    scaling.pop("type", None)
    if (
        not isinstance(kind, str)
        or kind not in ROPE_TYPES
        or any(isinstance(value, dict) for value in scaling.values())
    ):
        raise UserError(f"{path}: RoPE type {kind!r} is not supported; supported: {', '.join(ROPE_TYPES)}")
    partial = scaling.pop("partial_rotary_factor", None) or raw.get("partial_rotary_factor") or 1.0
    if partial != 1.0:
        raise UserError(f"{path}: partial_rotary_factor = {partial} is not supported; only 1.0 is")
    for key in ROPE_TYPES[kind]:
        _number(path, scaling, key, None)
    return theta, None if kind == "default" else scaling, local


def _sliding_window(path: Path, raw: Mapping[str, Any], family: str) -> int | None:
    """Returns the sliding window in tokens, or None. Most Qwen models have a window that is switched off."""
    types = _layer_types(path, raw)
    if family == "llama":
        return None
    default = None
    if family in ("mistral", "mixtral", *GEMMA):
        default = None if family == "mixtral" else 4096
    else:
        if not ("sliding_attention" in types if types else raw.get("use_sliding_window")):
            return None
    return None if raw.get("sliding_window", default) is None else _count(path, raw, "sliding_window", default)


def _sliding_layers(path: Path, raw: Mapping[str, Any], family: str, count: int) -> tuple[int, ...]:
    """Returns the indices of the layers with a sliding window, for a model that has one, as in transformers."""
    every = range(count)
    if family in ("mistral", "mixtral", "qwen3_moe"):
        return tuple(every)
    if types := _layer_types(path, raw):
        return tuple(layer for layer in every if types[layer] == "sliding_attention")
    if family in GEMMA:  # every `pattern`-th layer has no sliding window
        pattern = 2 if family == "gemma2" else _count(path, raw, "sliding_window_pattern", 6)
        return tuple(layer for layer in every if (layer + 1) % pattern)
    first = raw.get("max_window_layers")
    if not isinstance(first, int | None) or isinstance(first, bool) or (first or 0) < 0:
        raise UserError(f"{path}: max_window_layers = {first!r}; must be an integer >= 0")
    return tuple(range(28 if first is None else first, count))


def _layer_types(path: Path, raw: Mapping[str, Any]) -> list[str]:
    """Returns the attention type of each layer; empty if config.json does not list them."""
    types = raw.get("layer_types")
    if not isinstance(types, list | None) or not all(one in ATTENTION_TYPES for one in types or ()):
        raise UserError(f"{path}: layer_types = {types!r}; must be a list of {' and '.join(ATTENTION_TYPES)}")
    layers = raw["num_hidden_layers"]
    if types is not None and len(types) != layers:
        raise UserError(f"{path}: layer_types has {len(types)} entries for {layers} layers; must have one for each")
    return types or []
