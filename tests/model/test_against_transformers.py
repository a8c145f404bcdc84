"""Compares imported models with transformers for each family: log-probs and gradients."""

import numpy as np
import pytest
import torch

from megatron_spo.errors import UserError
from tests.support.megatron import example, load_model, megatron_sums, one_process, row_of, transformers_sums
from tests.support.tiny import tiny_model

LLAMA3_SCALING = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
GEMMA3 = {  # layers with a window have another rotary base
    "rope_parameters": {
        "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    },
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
}
VARIANTS = [
    ("llama", {}),
    ("llama", {"tie_word_embeddings": True}),
    ("llama", {"rope_parameters": LLAMA3_SCALING}),
    ("llama", {"num_key_value_heads": 4, "vocab_size": 384}),
    ("mistral", {"head_dim": 16}),
    ("qwen2", {"tie_word_embeddings": True}),
    ("qwen3", {"head_dim": 16}),
    ("mixtral", {}),
    ("qwen3_moe", {"norm_topk_prob": False}),
    ("qwen3_moe", {"norm_topk_prob": True, "num_experts": 6, "num_experts_per_tok": 3}),
    ("qwen3_moe", {"num_experts_per_tok": 1}),
    # windows of 8 tokens, which most sequences exceed
    ("mistral", {"sliding_window": 8}),
    ("qwen2", {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 2}),
    ("qwen3", {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 3}),
    ("qwen3_moe", {"sliding_window": 8, "use_sliding_window": True}),
    ("gemma2", {"tie_word_embeddings": True}),
    ("gemma2", {"attn_logit_softcapping": None, "final_logit_softcapping": 1.0, "tie_word_embeddings": True}),
    ("gemma3_text", {"tie_word_embeddings": True, **GEMMA3}),
    ("gemma3_text", {"final_logit_softcapping": 2.0}),
]


def pairs(seed: int = 0, count: int = 5):
    rng = np.random.default_rng(seed)
    draw = lambda low, high: rng.integers(6, 262, rng.integers(low, high)).tolist()  # noqa: E731
    made = [example(draw(1, 12), draw(1, 9), draw(1, 9)) for _ in range(count - 2)]
    common = draw(3, 4)  # both answers start with the same tokens
    made.append(example(draw(2, 5), [*common, 7, 1], [*common, 8, 9, 1]))
    made.append(example(draw(2, 5), draw(2, 6)))  # no rejected answer
    return made


def feed_forward_gradients(ours, theirs):
    """Returns gradients of the same weights in both models: output projection of the dense layer or experts, router."""
    if not hasattr(theirs, "experts"):
        return [(ours.linear_fc2.weight.grad, theirs.down_proj.weight.grad)]
    experts = [expert.linear_fc2.weight.grad for expert in ours.experts.local_experts]
    return [
        *zip(experts, theirs.experts.down_proj.grad, strict=True),
        (ours.router.weight.grad, theirs.gate.weight.grad),
    ]


@pytest.mark.parametrize(("family", "overrides"), VARIANTS)
def test_sums_and_gradients_equal_those_of_transformers(tmp_path, family, overrides):
    theirs = tiny_model(tmp_path, family, **overrides)
    ours = load_model(tmp_path)
    examples = pairs()
    mine, expected = megatron_sums(ours, row_of(examples, multiple=8)), transformers_sums(theirs, examples)
    torch.testing.assert_close(mine, expected, rtol=1e-5, atol=1e-4)
    weights = torch.randn(mine.shape, generator=torch.Generator().manual_seed(1))
    (mine * weights).sum().backward()
    (expected * weights).sum().backward()
    embedding = ours.embedding.word_embeddings.weight.grad[: theirs.config.vocab_size]
    torch.testing.assert_close(embedding, theirs.model.embed_tokens.weight.grad, rtol=1e-4, atol=1e-4)
    for got, wanted in feed_forward_gradients(ours.decoder.layers[-1].mlp, theirs.model.layers[-1].mlp):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


def test_gradients_of_gemmas_norms(tmp_path):
    theirs = tiny_model(tmp_path, "gemma3_text", tie_word_embeddings=True)
    ours = load_model(tmp_path)
    megatron_sums(ours, row_of(pairs())).sum().backward()
    transformers_sums(theirs, pairs()).sum().backward()
    for mine, other in zip(ours.decoder.layers, theirs.model.layers, strict=True):
        same = {
            mine.input_layernorm: other.input_layernorm,
            mine.self_attn_bda.norm: other.post_attention_layernorm,
            mine.pre_mlp_layernorm: other.pre_feedforward_layernorm,
            mine.mlp_bda.norm: other.post_feedforward_layernorm,
            mine.self_attention.q_layernorm: other.self_attn.q_norm,
            mine.self_attention.k_layernorm: other.self_attn.k_norm,
        }
        for norm, expected in same.items():
            torch.testing.assert_close(norm.weight.grad, expected.weight.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3_text"])
def test_a_forward_pass_alone_keeps_nothing(tmp_path, family):
    tiny_model(tmp_path, family)
    model, kept = load_model(tmp_path), []
    with torch.no_grad(), torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        assert not megatron_sums(model, row_of(pairs())).requires_grad
    assert not kept


def test_the_embedding_is_scaled_as_in_bf16(tmp_path):
    """Uses a factor that bf16 rounds: the root of 48 is 6.928, or 6.9375 in bf16."""
    from transformers.models.gemma2.modeling_gemma2 import Gemma2TextScaledWordEmbedding

    one_process()
    from megatron_spo.model.build import scale_by

    theirs = Gemma2TextScaledWordEmbedding(50, 48, 0, embed_scale=48**0.5).bfloat16()
    tokens = torch.arange(50)
    assert torch.equal(scale_by(48**0.5)(None, None, theirs.weight[tokens]), theirs(tokens))


def test_window_and_caps_are_seen(tmp_path):
    """Checks that windows and caps change the results of these pairs, so that the comparison above tests them."""
    sums = []
    for changes in ({}, {"sliding_window": 512}, {"attn_logit_softcapping": None}, {"final_logit_softcapping": None}):
        tiny_model(tmp_path, "gemma2", **changes)
        sums.append(megatron_sums(load_model(tmp_path), row_of(pairs())).detach())
    assert all((other - sums[0]).abs().max() > 1e-2 for other in sums[1:])


@pytest.mark.parametrize("scores", [1, 2**24])
def test_capped_attention_in_chunks_of_any_size(tmp_path, monkeypatch, scores):
    monkeypatch.setattr("megatron_spo.model.attention.SCORES_PER_CHUNK", scores)
    test_sums_and_gradients_equal_those_of_transformers(tmp_path, "gemma2", {"tie_word_embeddings": True})


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_packed_equals_one_by_one(tmp_path, family):
    tiny_model(tmp_path, family)
    model = load_model(tmp_path)
    examples = pairs(count=8)
    packed = megatron_sums(model, row_of(examples))
    single = torch.cat([megatron_sums(model, row_of([one])) for one in examples])
    torch.testing.assert_close(packed, single, rtol=1e-6, atol=1e-5)


def test_experts_stacked_on_disk_are_refused(tmp_path):
    tiny_model(tmp_path, "mixtral").save_pretrained(tmp_path, save_original_format=False)
    with pytest.raises(UserError, match=r"mlp.experts.down_proj, .* as transformers' save_pretrained writes it by"):
        load_model(tmp_path)
