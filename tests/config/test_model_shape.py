"""config.json of both generations of transformers; features that are not supported are rejected by name."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import (
    AutoConfig,
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from megatron_spo.config.model_shape import Experts, read_model_shape
from megatron_spo.errors import UserError

Write = Callable[..., Path]
MIXTURE = {"model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 2}
QWEN_MIXTURE = {"model_type": "qwen3_moe", "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
EXTRA: dict[type[PretrainedConfig], dict[str, Any]] = {  # keys in addition to those of a dense model
    **dict.fromkeys((LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config), {}),
    **dict.fromkeys((Gemma2Config, Gemma3TextConfig), {"hidden_act": None}),
    MixtralConfig: {key: value for key, value in MIXTURE.items() if key != "model_type"},
    Qwen3MoeConfig: {key: value for key, value in QWEN_MIXTURE.items() if key != "model_type"},
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 256,
}


def test_llama(write_model: Write) -> None:
    shape = read_model_shape(write_model())
    assert (shape.layers, shape.hidden, shape.ffn, shape.heads, shape.kv_heads, shape.head_dim) == (
        4,
        32,
        64,
        4,
        2,
        8,
    )
    assert (shape.family, shape.vocab, shape.tied, shape.max_positions) == ("llama", 300, False, 512)
    assert (shape.rope_theta, shape.rope_scaling, shape.sliding_window) == (10000.0, None, None)
    assert not shape.qkv_bias and not shape.qk_norm


def test_experts(write_model: Write) -> None:
    assert read_model_shape(write_model()).experts is None
    mixtral = read_model_shape(write_model(**MIXTURE))
    assert mixtral.experts == Experts(count=8, per_token=2, ffn=64, renormalised=True)
    for name in ("num_experts", "num_local_experts"):  # as on the hub, and as transformers 5 writes it
        qwen = read_model_shape(write_model(**{**QWEN_MIXTURE, "num_experts": None, name: 8}))
        assert qwen.experts == Experts(count=8, per_token=2, ffn=16, renormalised=False)
    assert qwen.active_ffn == 32
    renormalised = read_model_shape(write_model(**QWEN_MIXTURE, norm_topk_prob=True)).experts
    assert renormalised is not None and renormalised.renormalised


def test_rope_of_both_generations(write_model: Write) -> None:
    older = read_model_shape(write_model(rope_theta=5e5, rope_scaling=LLAMA3))
    newer = read_model_shape(write_model(rope_parameters={**LLAMA3, "rope_theta": 5e5}))
    assert older.rope_theta == newer.rope_theta == 5e5
    assert older.rope_scaling == newer.rope_scaling == LLAMA3
    oldest = read_model_shape(write_model(rope_scaling={"type": "linear", "factor": 2.0}))
    assert oldest.rope_scaling == {"rope_type": "linear", "factor": 2.0}


@pytest.mark.parametrize("config_class", list(EXTRA))
def test_absent_keys_mean_what_transformers_means(write_model: Write, config_class: type[PretrainedConfig]) -> None:
    optional = ("max_position_embeddings", "rms_norm_eps")
    family = config_class.model_type
    folder = write_model(model_type=family, **dict.fromkeys(optional), num_key_value_heads=4, **EXTRA[config_class])
    shape, theirs = read_model_shape(folder), config_class.from_pretrained(folder)
    assert shape.max_positions == theirs.max_position_embeddings
    assert shape.norm_eps == theirs.rms_norm_eps
    assert shape.tied == theirs.tie_word_embeddings
    rope = theirs.rope_parameters
    assert shape.rope_theta == (rope.get("full_attention") or rope)["rope_theta"]
    assert shape.initializer_range == theirs.initializer_range
    assert shape.sliding_window == getattr(theirs, "sliding_window", None)
    assert shape.head_dim == (getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads)


def test_families(write_model: Write) -> None:
    qwen2 = read_model_shape(write_model(model_type="qwen2", sliding_window=64, use_sliding_window=False))
    assert qwen2.qkv_bias and not qwen2.qk_norm and qwen2.sliding_window is None
    qwen3 = read_model_shape(write_model(model_type="qwen3", tie_word_embeddings=True, head_dim=16))
    assert qwen3.qk_norm and not qwen3.qkv_bias and qwen3.tied and qwen3.head_dim == 16
    layers = ["full_attention", "sliding_attention"] * 2
    mixed = read_model_shape(write_model(model_type="qwen3", sliding_window=64, layer_types=layers))
    assert (mixed.sliding_window, mixed.sliding_layers) == (64, (1, 3))


def test_sliding_layers(write_model: Write) -> None:
    """Without a list of layer types, the layers are those of transformers."""
    window = {"sliding_window": 64, "num_hidden_layers": 12}
    every = set(range(12))
    expected = {
        "mistral": every,
        "qwen2": {10, 11},
        "qwen3_moe": every,
        "gemma2": set(range(0, 12, 2)),
        "gemma3_text": every - {5, 11},
    }
    for family, layers in expected.items():
        more = {"use_sliding_window": True, "max_window_layers": 10, **(QWEN_MIXTURE if "moe" in family else {})}
        shape = read_model_shape(write_model(**more | window | {"model_type": family, "hidden_act": None}))
        assert set(shape.sliding_layers) == layers, family
    assert read_model_shape(write_model(**MIXTURE)).sliding_layers == ()


def test_gemma3_of_both_generations(write_model: Write) -> None:
    """config.json as on the hub, and as transformers 5 writes it."""
    linear = {"rope_type": "linear", "factor": 8.0}
    shared = {"model_type": "gemma3_text", "hidden_act": None}
    older = write_model(**shared, rope_theta=2e6, rope_local_base_freq=2e4, rope_scaling=linear)
    shapes = [read_model_shape(older)]
    rope = {
        "full_attention": {**linear, "rope_theta": 2e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 2e4},
    }
    shapes.append(read_model_shape(write_model(**shared, rope_parameters=rope)))
    for shape in shapes:
        assert shape.gemma is not None
        assert (shape.rope_theta, shape.rope_scaling, shape.gemma.local_theta) == (2e6, linear, 2e4)


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({**MIXTURE, "router_jitter_noise": 0.1}, "router_jitter_noise = 0.1 is not supported for mixtral"),
        ({**MIXTURE, "num_local_experts": None}, "num_local_experts = None; must be a positive integer"),
        ({**MIXTURE, "num_experts_per_tok": 9}, "num_experts_per_tok = 9 exceeds the model's 8 experts"),
        ({**MIXTURE, "num_experts_per_tok": 1}, "num_experts_per_tok = 1 with renormalised weights is not supported"),
        ({**QWEN_MIXTURE, "decoder_sparse_step": 2}, "decoder_sparse_step = 2 is not supported; only 1"),
        ({**QWEN_MIXTURE, "mlp_only_layers": [0]}, "mlp_only_layers = [0] is not supported for qwen3_moe"),
        ({**QWEN_MIXTURE, "moe_intermediate_size": None}, "moe_intermediate_size = None; must be a positive integer"),
        ({"model_type": "qwen2_moe"}, "model_type = 'qwen2_moe' is not supported"),
        (
            {"model_type": "gpt2"},
            "model_type = 'gpt2' is not supported; supported: llama, mistral, qwen2, qwen3, mixtral, qwen3_moe, "
            "gemma2, gemma3_text",
        ),
        ({"model_type": None}, "model_type = None"),
        ({"attention_bias": True}, "attention_bias = True is not supported for llama"),
        ({"mlp_bias": True}, "mlp_bias = True"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        (
            {"model_type": "gemma2", "hidden_activation": "gelu"},
            "hidden_activation = 'gelu' is not supported for gemma2",
        ),
        ({"model_type": "gemma3"}, "model_type = 'gemma3' (text and images) is not supported, only the text model"),
        ({"model_type": "gemma3_text", "use_bidirectional_attention": True}, "use_bidirectional_attention = True"),
        (
            {"model_type": "gemma3_text", "attn_logit_softcapping": 50.0},
            "attn_logit_softcapping = 50.0 is not supported",
        ),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "RoPE type 'dynamic' is not supported"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "RoPE type 'longrope'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
        ({"num_hidden_layers": None}, "num_hidden_layers = None; must be a positive integer"),
        ({"vocab_size": "many"}, "vocab_size = 'many'"),
        ({"num_key_value_heads": 3}, "not a multiple of num_key_value_heads = 3"),
        ({"hidden_size": 33}, "hidden_size = 33 is not a multiple"),
        ({"num_hidden_layers": 10**30}, "must be at most 10000"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps = 'small'; must be a number with a decimal point"),
        ({"initializer_range": float("nan")}, "initializer_range = nan; must be a number with"),
        ({"rms_norm_eps": 1}, "rms_norm_eps = 1; must be a number with a decimal point or an exponent"),
        ({"hidden_act": ""}, "hidden_act = '' is not supported"),
        ({"attention_bias": 0}, "attention_bias = 0; must be true or false"),
        ({"max_position_embeddings": 4096.0}, "max_position_embeddings = 4096.0; must be an integer"),
        ({"eos_token_id": ["x"]}, "eos_token_id = ['x']; must be null, an integer or a list of integers"),
        ({"pad_token_id": 2**40}, "pad_token_id = 1099511627776 is beyond vocab_size"),
        ({"dtype": "x"}, "dtype = 'x'; must be null or one of float32"),
        ({"quantization_config": {}}, "quantization_config = {}; must be absent"),
        ({"hidden_size": 34}, "hidden_size = 34 is not a multiple of num_attention_heads"),
        ({"layer_types": []}, "layer_types has 0 entries for 4 layers"),
        ({"rope_theta": [1]}, "rope_theta = [1]; must be a positive number"),
        ({"rope_scaling": "linear"}, "rope_scaling = 'linear'; must be null or a JSON object"),
        ({"rope_scaling": {"type": "linear"}}, "factor = None; must be a positive number"),
        ({"rope_scaling": {**LLAMA3, "low_freq_factor": None}}, "low_freq_factor = None; must be a positive number"),
        ({"rope_scaling": {"rope_type": []}}, "RoPE type [] is not supported"),
        ({"model_type": "mistral", "sliding_window": "4k"}, "sliding_window = '4k'; must be a positive integer"),
        ({"model_type": "qwen3", "layer_types": ["full"]}, "layer_types = ['full']; must be a list of"),
        (
            {"model_type": "qwen3", "sliding_window": 8, "layer_types": ["sliding_attention"]},
            "layer_types has 1 entries for 4 layers",
        ),
        (
            {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 8, "max_window_layers": -1},
            "max_window_layers = -1",
        ),
        ({"model_type": "gemma2", "query_pre_attn_scalar": "x"}, "query_pre_attn_scalar = 'x'"),
        ({"model_type": "gemma2", "final_logit_softcapping": 0}, "final_logit_softcapping = 0; must be a positive"),
    ],
)
def test_refused(write_model: Write, changes: dict[str, object], part: str) -> None:
    with pytest.raises(UserError, match="config.json") as raised:
        read_model_shape(write_model(**changes))
    assert part in str(raised.value)


def test_rope_scaling_replaces_rope_parameters(write_model: Write) -> None:
    """As in transformers, if a config.json has both."""
    linear = {"rope_type": "linear", "factor": 2.0}
    both = write_model(rope_parameters={"rope_type": "default", "rope_theta": 1e4}, rope_scaling=linear)
    assert read_model_shape(both).rope_scaling == linear
    assert AutoConfig.from_pretrained(both).rope_parameters["rope_type"] == "linear"


def test_no_config(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="file does not exist"):
        read_model_shape(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": ')
    with pytest.raises(UserError, match="not readable as JSON"):
        read_model_shape(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(UserError, match="must be a JSON object"):
        read_model_shape(tmp_path)
