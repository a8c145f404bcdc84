"""The table of Hugging Face and Megatron tensor names, for import, export and random weights.

The families llama, mistral, qwen2 and qwen3 share Hugging Face's names; they differ in query/key norms, in the biases
of the attention projections and in tied embeddings, which ModelShape describes. Gemma's layers have two more norms, and
`post_attention_layernorm` is a different norm there. The mixtures of experts, mixtral and qwen3_moe, have their own
names for the router and for the three matrices of each expert. On the hub, and as saved by transformers, every expert
has its own tensors.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_spo.config.model_folder import is_needless
from megatron_spo.config.model_shape import ModelShape
from megatron_spo.errors import UserError
from megatron_spo.model.transforms import Concatenate, Copy, GroupedQKV, PaddedVocabulary, Transform

_LAYER = "model.layers.{layer}."
_EXPERTS = {  # block of the layer; gate, up and down projection of an expert
    "mixtral": ("block_sparse_moe.", ("w1", "w3", "w2")),
    "qwen3_moe": ("mlp.", ("gate_proj", "up_proj", "down_proj")),
}


@dataclass(frozen=True)
class Mapping:
    """One Megatron checkpoint key and the Hugging Face tensors it is made of.

    Megatron's sharded state dict stacks the layers of a model on a first axis under one key, and the experts of a layer
    on a second. So `at` is (layer,) or (layer, expert), or () for tensors outside the layers. Norm weights have the key
    of the linear layer after them, as in Transformer Engine's fused layers, so that checkpoints of both kinds of layers
    are interchangeable; the norm before a router has its own key in both.
    """

    key: str
    sources: tuple[str, ...]
    transform: Transform
    at: tuple[int, ...] = ()

    @property
    def is_norm(self) -> bool:
        return "norm" in self.key


Layout = tuple[str, tuple[str, ...], Transform]
"""Key, Hugging Face names with the placeholders {layer} and {expert}, and transform."""


def _attention_rows(shape: ModelShape) -> Iterator[Layout]:
    qkv = GroupedQKV(shape.heads, shape.kv_heads, shape.head_dim)
    attention, hf_attention = "self_attention.", _LAYER + "self_attn."
    projections = tuple(f"{hf_attention}{p}_proj" for p in "qkv")
    yield attention + "linear_qkv.layer_norm_weight", (_LAYER + "input_layernorm.weight",), Copy()
    yield attention + "linear_qkv.weight", tuple(f"{p}.weight" for p in projections), qkv
    if shape.qkv_bias:
        yield attention + "linear_qkv.bias", tuple(f"{p}.bias" for p in projections), qkv
    if shape.qk_norm:
        yield attention + "q_layernorm.weight", (hf_attention + "q_norm.weight",), Copy()
        yield attention + "k_layernorm.weight", (hf_attention + "k_norm.weight",), Copy()
    yield attention + "linear_proj.weight", (hf_attention + "o_proj.weight",), Copy()
    if shape.gemma is not None:
        yield attention + "linear_proj.post_layernorm.weight", (_LAYER + "post_attention_layernorm.weight",), Copy()
        yield "mlp.linear_fc2.post_layernorm.weight", (_LAYER + "post_feedforward_layernorm.weight",), Copy()


def _dense_rows(shape: ModelShape) -> Iterator[Layout]:
    hf = _LAYER + "mlp."
    norm = "post_attention_layernorm" if shape.gemma is None else "pre_feedforward_layernorm"
    yield "mlp.linear_fc1.layer_norm_weight", (f"{_LAYER}{norm}.weight",), Copy()
    yield "mlp.linear_fc1.weight", (hf + "gate_proj.weight", hf + "up_proj.weight"), Concatenate(2)
    yield "mlp.linear_fc2.weight", (hf + "down_proj.weight",), Copy()


def _router_rows(shape: ModelShape) -> Iterator[Layout]:
    block, _ = _EXPERTS[shape.family]
    yield "pre_mlp_layernorm.weight", (_LAYER + "post_attention_layernorm.weight",), Copy()
    yield "mlp.router.weight", (f"{_LAYER}{block}gate.weight",), Copy()


def _expert_rows(shape: ModelShape) -> Iterator[Layout]:
    block, projections = _EXPERTS[shape.family]
    gate, up, down = (f"{_LAYER}{block}experts.{{expert}}.{name}.weight" for name in projections)
    yield "mlp.experts.experts.linear_fc1.weight", (gate, up), Concatenate(2)
    yield "mlp.experts.experts.linear_fc2.weight", (down,), Copy()


def _filled(rows: Iterable[Layout], layer: int, expert: int | None = None) -> Iterator[Mapping]:
    at = (layer,) if expert is None else (layer, expert)
    for key, sources, transform in rows:
        names = tuple(source.format(layer=layer, expert=expert) for source in sources)
        yield Mapping("decoder.layers." + key, names, transform, at)


def mappings(shape: ModelShape) -> list[Mapping]:
    """Returns the mappings of all tensors of a model of this shape, each Hugging Face name exactly once."""
    rows = [Mapping("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), PaddedVocabulary(shape.vocab))]
    for layer in range(shape.layers):
        rows += _filled(_attention_rows(shape), layer)
        if shape.experts is None:
            rows += _filled(_dense_rows(shape), layer)
            continue
        rows += _filled(_router_rows(shape), layer)
        for expert in range(shape.experts.count):
            rows += _filled(_expert_rows(shape), layer, expert)
    rows.append(Mapping("decoder.final_layernorm.weight", ("model.norm.weight",), Copy()))
    if not shape.tied:
        rows.append(Mapping("output_layer.weight", ("lm_head.weight",), PaddedVocabulary(shape.vocab)))
    return rows


def full_shape(row: Mapping, shape: ModelShape, vocabulary: int) -> tuple[int, ...]:
    """Returns the shape of the Megatron tensor of one row without its stacked axes; `vocabulary` includes padding."""
    heads, ffn = (shape.heads + 2 * shape.kv_heads) * shape.head_dim, shape.ffn
    if row.key.startswith("decoder.layers.mlp.experts.") and shape.experts is not None:
        ffn = shape.experts.ffn
    vectors = {"linear_qkv.bias": heads, "q_layernorm.weight": shape.head_dim, "k_layernorm.weight": shape.head_dim}
    matrices = {
        "word_embeddings.weight": (vocabulary, shape.hidden),
        "output_layer.weight": (vocabulary, shape.hidden),
        "linear_qkv.weight": (heads, shape.hidden),
        "linear_proj.weight": (shape.hidden, shape.heads * shape.head_dim),
        "linear_fc1.weight": (2 * ffn, shape.hidden),
        "linear_fc2.weight": (shape.hidden, ffn),
        "router.weight": (shape.experts.count if shape.experts else 0, shape.hidden),
    }
    name = ".".join(row.key.split(".")[-2:])
    return matrices.get(name) or (vectors.get(name, shape.hidden),)


def left_out(names: Iterable[str], shape: ModelShape, folder: Path) -> list[str]:
    """Returns the names of a Hugging Face folder's tensors that the model computes from others and does not need.

    Raises:
        UserError: a tensor belongs to no part of the model.
    """
    known = {name for row in mappings(shape) for name in row.sources}
    others = sorted(set(names) - known)
    needless = {name for name in others if is_needless(name, tied=shape.tied)}
    if stray := [name for name in others if name not in needless]:
        raise UserError(f"{folder} holds {stray[0]}, which is not part of a {shape.family} model with its "
                        f"config.json ({len(stray)} such tensors); use the model as it is on the hub, or as "
                        "transformers' save_pretrained writes it by default")  # fmt: skip
    return sorted(needless)
