"""The one table between Hugging Face and Megatron tensor names, for import, export and random weights.

The families llama, mistral, qwen2 and qwen3 share Hugging Face's names; they differ in query/key norms, in the
biases of the attention projections and in tied embeddings, which are facts of the ModelShape.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from megatron_spo.config.model_shape import ModelShape
from megatron_spo.model.tensors import Concatenate, Copy, GroupedQKV, PaddedVocabulary, Transform

_LAYER = "model.layers.{layer}."


@dataclass(frozen=True)
class Mapping:
    """One Megatron checkpoint key and the Hugging Face tensors it is made of.

    In Megatron's sharded state dict the layers of a model are stacked on a first axis under one key, so `layer` is
    the index on that axis, or None for tensors outside the layers. Norm weights carry the key of the linear layer
    behind them, as in Transformer Engine's fused layers, so checkpoints of both layer specs are interchangeable.
    """

    key: str
    sources: tuple[str, ...]
    transform: Transform
    layer: int | None = None

    @property
    def is_norm(self) -> bool:
        return "norm" in self.key


def _layer_rows(shape: ModelShape) -> Iterator[tuple[str, tuple[str, ...], Transform]]:
    qkv = GroupedQKV(shape.heads, shape.kv_heads, shape.head_dim)
    attention, mlp = "self_attention.", "mlp."
    hf_attention, hf_mlp = _LAYER + "self_attn.", _LAYER + "mlp."
    projections = tuple(f"{hf_attention}{p}_proj" for p in "qkv")
    yield attention + "linear_qkv.layer_norm_weight", (_LAYER + "input_layernorm.weight",), Copy()
    yield attention + "linear_qkv.weight", tuple(f"{p}.weight" for p in projections), qkv
    if shape.qkv_bias:
        yield attention + "linear_qkv.bias", tuple(f"{p}.bias" for p in projections), qkv
    if shape.qk_norm:
        yield attention + "q_layernorm.weight", (hf_attention + "q_norm.weight",), Copy()
        yield attention + "k_layernorm.weight", (hf_attention + "k_norm.weight",), Copy()
    yield attention + "linear_proj.weight", (hf_attention + "o_proj.weight",), Copy()
    yield mlp + "linear_fc1.layer_norm_weight", (_LAYER + "post_attention_layernorm.weight",), Copy()
    gate_up = (hf_mlp + "gate_proj.weight", hf_mlp + "up_proj.weight")
    yield mlp + "linear_fc1.weight", gate_up, Concatenate(2)
    yield mlp + "linear_fc2.weight", (hf_mlp + "down_proj.weight",), Copy()


def mappings(shape: ModelShape) -> list[Mapping]:
    """Every tensor of a model of this shape, each Hugging Face name exactly once."""
    rows = [Mapping("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), PaddedVocabulary(shape.vocab))]
    for layer in range(shape.layers):
        for key, sources, transform in _layer_rows(shape):
            names = tuple(source.format(layer=layer) for source in sources)
            rows.append(Mapping("decoder.layers." + key, names, transform, layer))
    rows.append(Mapping("decoder.final_layernorm.weight", ("model.norm.weight",), Copy()))
    if not shape.tied:
        rows.append(Mapping("output_layer.weight", ("lm_head.weight",), PaddedVocabulary(shape.vocab)))
    return rows


def padded_vocabulary(shape: ModelShape, tensor_parallel: int) -> int:
    """Rows of the embedding: the vocabulary rounded up so that every tensor-parallel rank holds equally many."""
    multiple = 128 if 128 % tensor_parallel == 0 else 128 * tensor_parallel
    return -(-shape.vocab // multiple) * multiple
