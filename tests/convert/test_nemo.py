"""NeMo 2 checkpoints: one written by NeMo is read, and ours have the same structure."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
import yaml
from safetensors.torch import load_file
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_spo.checkpoint.stored import StoredTensors
from megatron_spo.convert.export import convert
from megatron_spo.errors import UserError
from tests.support.tiny import tiny_model

FOLDERS = [parent / "shared/data/nemo2_llama_tiny" for parent in Path(__file__).parents]
DATA = next((folder for folder in FOLDERS if folder.is_dir()), FOLDERS[0])
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="shared/data/nemo2_llama_tiny is missing")


# The sample's layer norms are all one, unlike those of the Hugging Face model next to it. It was imported without
# Transformer Engine. The toolkit's norms then have other names than its importer expects, and keep their initial
# values. The format itself does not require this: test_nemo_reads_ours has norms that are not one.
@needs_data
def test_reads_what_nemo_wrote(tmp_path: Path) -> None:
    notes = convert(DATA / "nemo2", tmp_path / "hf", "hf", verify=True)
    assert "39 tensors" in notes[0]
    ours, theirs = load_file(tmp_path / "hf/model.safetensors"), load_file(DATA / "hf/model.safetensors")
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        if name.endswith("layernorm.weight"):  # these differ in the sample: see above
            assert torch.equal(ours[name], torch.ones_like(tensor))
        else:
            assert torch.equal(ours[name], tensor), name
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (DATA / "hf", tmp_path / "hf"))
    for key in ("transformers_version", "torch_dtype", "pretraining_tp", "attention_dropout", "mlp_bias"):
        before.pop(key)
    assert {key: after[key] for key in before} == before
    AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    one, other = (AutoTokenizer.from_pretrained(folder) for folder in (DATA / "hf", tmp_path / "hf"))
    assert one("12 + 30 = 42").input_ids == other("12 + 30 = 42").input_ids
    assert (tmp_path / "hf/generation_config.json").exists()


@needs_data
def test_reads_as_torch_does() -> None:
    """Every stored tensor equals what torch's own reader loads."""
    stored = StoredTensors(DATA / "nemo2/weights", "module.")
    theirs = {f"module.{key}": torch.empty(stored.size(key), dtype=stored.dtype(key)) for key in sorted(stored.keys())}
    dcp.load(theirs, checkpoint_id=str(DATA / "nemo2/weights"), no_dist=True)
    assert len(theirs) == 9
    for key, tensor in theirs.items():
        assert torch.equal(stored.read(key.removeprefix("module."), None), tensor), key


@needs_data
def test_writes_what_nemo_would(tmp_path: Path) -> None:
    """Our checkpoint has the keys, shapes, dtypes and settings of NeMo's checkpoint of the same model."""
    convert(DATA / "hf", tmp_path / "nemo", "nemo", verify=True)
    ours, theirs = (dcp.FileSystemReader(folder / "weights") for folder in (tmp_path / "nemo", DATA / "nemo2"))
    before, after = theirs.read_metadata().state_dict_metadata, ours.read_metadata().state_dict_metadata
    assert before.keys() == after.keys()
    for key, entry in before.items():
        assert type(entry) is type(after[key]), key
        if isinstance(entry, TensorStorageMetadata):
            ours_of = after[key]
            assert isinstance(ours_of, TensorStorageMetadata)
            assert (entry.size, entry.properties.dtype) == (ours_of.size, ours_of.properties.dtype), key
    common = [torch.load(folder / "weights/common.pt") for folder in (DATA / "nemo2", tmp_path / "nemo")]
    assert common[0].keys() == common[1].keys()
    trees = [
        yaml.safe_load((folder / "context/model.yaml").read_text()) for folder in (DATA / "nemo2", tmp_path / "nemo")
    ]
    assert trees[0]["_target_"] == trees[1]["_target_"]
    for name in ("config", "tokenizer"):
        assert {key: trees[0][name][key] for key in trees[1][name]} == trees[1][name]


@needs_data
def test_writes_the_tree_as_nemo_does(tmp_path: Path) -> None:
    """Every kind of entry in io.json has the same form as in NeMo's file, and every reference exists."""
    convert(DATA / "hf", tmp_path / "nemo", "nemo")
    ours, theirs = (
        json.loads((folder / "context/io.json").read_text()) for folder in (tmp_path / "nemo", DATA / "nemo2")
    )
    assert ours.keys() == theirs.keys()
    assert ours["version"] == theirs["version"]
    assert ours["objects"].keys() == ours["refcounts"].keys()
    assert forms(ours) <= forms(theirs)
    refs = [key for entry in [ours["root"], *ours["objects"].values()] for key in references(entry)]
    assert sorted(refs) == sorted(ours["objects"])


def forms(document: dict) -> set[str]:
    """Returns entries without their content, so that only the names of fields and kinds remain."""
    kinds = set()
    for entry in document["objects"].values():
        metadata = entry["metadata"]
        described = {
            "fields": sorted(entry),
            "type": entry["type"],
            "metadata": metadata if metadata is None or metadata["type"] != "ref" else "ref",
            "items": sorted({str(shape(value)) for _, value in entry["items"]}),
        }
        if entry["type"]["name"] in ("Config", "tuple"):  # their items differ with the arguments
            described.pop("items")
        kinds.add(json.dumps(described, sort_keys=True))
    return kinds


def shape(value: object) -> object:
    return (value["type"], sorted(value)) if isinstance(value, dict) else type(value).__name__


def references(entry: object) -> list[str]:
    if isinstance(entry, dict):
        own = [entry["key"]] if entry.get("type") == "ref" else []
        return own + [key for value in entry.values() for key in references(value)]
    return [key for value in entry for key in references(value)] if isinstance(entry, list) else []


@pytest.mark.parametrize(
    ("family", "overrides"),
    [
        ("llama", {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0,
                                       "high_freq_factor": 4.0, "original_max_position_embeddings": 256}}),
        ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}, "vocab_size": 263}),
        ("mistral", {"sliding_window": 64}),
        ("qwen2", {"tie_word_embeddings": True}),
        ("qwen3", {}),
        ("mixtral", {}),
        ("qwen3_moe", {"norm_topk_prob": True}),
    ],
)  # fmt: skip
def test_round_trip(tmp_path: Path, family: str, overrides: dict) -> None:
    theirs = tiny_model(tmp_path / "model", family, **overrides)
    convert(tmp_path / "model", tmp_path / "nemo", "nemo", verify=True)
    settings = json.loads((tmp_path / "nemo/context/nemo_tokenizer/tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"  # the name in transformers 4, which NeMo requires
    assert settings["additional_special_tokens"] and "extra_special_tokens" not in settings
    convert(tmp_path / "nemo", tmp_path / "hf", "hf", verify=True)
    tokens = torch.arange(6, 200)[None]
    with torch.no_grad():
        ours = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
        assert type(ours) is type(theirs)
        assert torch.equal(ours(tokens).logits, theirs(tokens).logits)
    assert AutoTokenizer.from_pretrained(tmp_path / "hf").eos_token == "<eos>"


def test_gemma_is_refused_by_name(tmp_path: Path) -> None:
    tiny_model(tmp_path / "model", "gemma2")
    with pytest.raises(UserError, match="--to nemo is not supported for gemma2 models, only for llama"):
        convert(tmp_path / "model", tmp_path / "nemo", "nemo")
    assert not (tmp_path / "nemo").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"normalization": "LayerNorm"}, "normalization = 'LayerNorm' is not supported for llama models"),
        ({"add_qkv_bias": True}, "add_qkv_bias = True is not supported for llama"),
        ({"num_layers": None}, "num_hidden_layers"),
        ({"activation_func": {"_target_": "torch.nn.functional.gelu"}}, "gelu' is not supported"),
        ({"hidden_size": 64}, "has shape .*, but its model expects"),
    ],
)
def test_refuses(tmp_path: Path, change: dict, message: str) -> None:
    tiny_model(tmp_path / "model")
    convert(tmp_path / "model", tmp_path / "nemo", "nemo")
    path = tmp_path / "nemo/context/model.yaml"
    tree = yaml.safe_load(path.read_text())
    tree["config"] |= change
    path.write_text(yaml.safe_dump(tree))
    with pytest.raises(UserError, match=message):
        convert(tmp_path / "nemo", tmp_path / "hf", "hf")


NEMO_PYTHON = os.environ.get("NEMO_PYTHON", "")
# the variants that the toolkit builds, with the classes that it must choose
READ_BY_NEMO: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaModel LlamaConfig", {}),
    "llama-31": ("LlamaModel Llama31Config", {"rope_parameters": {
        "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64}}),
    "mistral": ("MistralModel MistralConfig7B", {}),
    "qwen2": ("Qwen2Model Qwen2Config", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3Model Qwen3Config", {}),
    "mixtral": ("MixtralModel MixtralConfig", {}),
    "qwen3_moe": ("Qwen3Model Qwen3MoEConfig", {"norm_topk_prob": True}),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.skipif(not NEMO_PYTHON, reason="NEMO_PYTHON must name the interpreter of an environment with NeMo 2")
@pytest.mark.parametrize("variant", READ_BY_NEMO)
def test_nemo_reads_ours(tmp_path: Path, variant: str) -> None:
    """The toolkit builds model and tokenizer from our context and loads our weights; its logits equal transformers'."""
    classes, overrides = READ_BY_NEMO[variant]
    theirs = tiny_model(tmp_path / "model", variant.partition("-")[0], **overrides)
    convert(tmp_path / "model", tmp_path / "nemo", "nemo")
    script, out = Path(__file__).with_name("nemo_reader.py"), tmp_path / "logits.pt"
    environment = {**os.environ, "PYTHONPATH": "", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [NEMO_PYTHON, str(script), str(tmp_path / "nemo"), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert classes in done.stdout
    if theirs.config.model_type in ("mixtral", "qwen3_moe"):
        return
    logits = torch.load(out)
    with torch.no_grad():
        expected = theirs(torch.arange(logits.shape[1])[None] + 6).logits
    torch.testing.assert_close(logits[..., : expected.shape[-1]], expected, rtol=1e-4, atol=1e-5)
