"""Hugging Face -> Megatron -> checkpoint -> Hugging Face gives the same files; random weights depend only on config and
seed."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_spo.cli import main
from megatron_spo.config.model_shape import read_model_shape
from megatron_spo.model.families import mappings
from tests.support.tiny import FAMILIES, arithmetic_pairs, tiny_model, write_jsonl

VARIANTS = [
    ("llama", {"vocab_size": 301}),
    ("llama", {"tie_word_embeddings": True}),
    ("mistral", {"head_dim": 16}),
    ("qwen2", {}),
    ("qwen3", {"tie_word_embeddings": True}),
    ("mixtral", {}),
    ("qwen3_moe", {"norm_topk_prob": True, "tie_word_embeddings": True}),
    ("gemma2", {"tie_word_embeddings": True}),
    ("gemma3_text", {}),
]


def train_without_change(folder: Path, *more: str) -> Path:
    """Trains one step with a learning rate too small to change any weight."""
    data = write_jsonl(folder / "pairs.jsonl", arithmetic_pairs(3))
    config = folder / "config.yaml"
    config.write_text(
        f"""
output: {folder}/run
model: {{path: {folder}/model}}
data: {{train: {data}, max_length: 64}}
spo: {{schedule: sft}}
optimizer: {{lr: 1e-300}}
precision: {{dtype: fp32}}
training: {{steps: 1, threads: 1}}
logging: {{progress: false}}
"""
    )
    assert main(["train", str(config), *more]) == 0
    return folder / "run"


@pytest.mark.parametrize(("family", "overrides"), VARIANTS)
def test_weights_come_back_bit_for_bit(tmp_path, family, overrides):
    theirs = tiny_model(tmp_path / "model", family, **overrides)
    run = train_without_change(tmp_path)
    assert main(["convert", str(run), str(tmp_path / "hf"), "--to", "hf"]) == 0
    before, after = load_file(tmp_path / "model/model.safetensors"), load_file(tmp_path / "hf/model.safetensors")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]), name
    tokens = torch.arange(6, 60)[None]
    with torch.no_grad():
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
        assert torch.equal(loaded(tokens).logits, theirs(tokens).logits)
    assert AutoTokenizer.from_pretrained(tmp_path / "hf").eos_token == "<eos>"
    assert (tmp_path / "hf/generation_config.json").exists()
    card = (tmp_path / "hf/README.md").read_text()
    assert '| base model | `"model"` |' in card and "base_model:" not in card and str(tmp_path) not in card
    for entry in ('| spo.schedule | `"sft"` |', "| optimizer steps | `1` |", "| data, train |", "| loss |"):
        assert entry in card


def test_random_weights_follow_the_config_and_the_seed(tmp_path):
    tiny_model(tmp_path / "model", scale=0.02)
    for name in ("a", "b", "c"):
        run = train_without_change(
            tmp_path, "model.init=random", f"output={tmp_path}/{name}", f"training.seed={int(name == 'c')}"
        ).with_name(name)
        assert main(["convert", str(run), str(tmp_path / f"hf-{name}"), "--to", "hf"]) == 0
    a, b, c = (load_file(tmp_path / f"hf-{name}/model.safetensors") for name in "abc")
    matrix = "model.layers.1.mlp.up_proj.weight"
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(a[matrix], c[matrix])
    assert a[matrix].std().item() == pytest.approx(0.02, rel=0.1)
    assert torch.equal(a["model.norm.weight"], torch.ones(32))


def test_random_norms_of_gemma_are_neutral(tmp_path):
    tiny_model(tmp_path / "model", "gemma2")
    run = train_without_change(tmp_path, "model.init=random")
    assert main(["convert", str(run), str(tmp_path / "hf"), "--to", "hf"]) == 0
    tensors = load_file(tmp_path / "hf/model.safetensors")
    assert not any(tensor.any() for name, tensor in tensors.items() if "norm" in name)


def test_shards_with_an_index_when_large(tmp_path, monkeypatch):
    tiny_model(tmp_path / "model")
    monkeypatch.setattr("megatron_spo.model.hf_files.SHARD_BYTES", 40_000)
    run = train_without_change(tmp_path)
    assert main(["convert", str(run), str(tmp_path / "hf"), "--to", "hf"]) == 0
    assert len(list((tmp_path / "hf").glob("model-*-of-*.safetensors"))) > 2
    before = load_file(tmp_path / "model/model.safetensors")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("family", FAMILIES)
def test_every_tensor_of_the_family_is_mapped_once(tmp_path, family):
    tiny_model(tmp_path, family)
    names = [name for row in mappings(read_model_shape(tmp_path)) for name in row.sources]
    assert sorted(names) == sorted(load_file(tmp_path / "model.safetensors"))
