"""Conversion from one format to another and back is exact for every family, number of files and block size."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_spo.checkpoint import lazy
from megatron_spo.cli import main
from megatron_spo.config.model_folder import shard_files
from megatron_spo.convert import work
from megatron_spo.convert.export import convert
from megatron_spo.convert.formats import torch_dist
from megatron_spo.convert.formats.hugging_face import HuggingFace
from megatron_spo.convert.formats.torch_dist import TorchDist
from megatron_spo.errors import UserError
from megatron_spo.model import hf_files
from tests.support.megatron import load_model
from tests.support.processes import largest_difference
from tests.support.tiny import tiny_model, tiny_run

VARIANTS = [
    ("llama", {"vocab_size": 301}),
    ("llama", {"tie_word_embeddings": True, "num_key_value_heads": 4}),
    ("llama", {"num_key_value_heads": 1, "head_dim": 16}),
    ("mistral", {"head_dim": 16, "sliding_window": 64}),
    # as Qwen2.5's config.json has it
    ("qwen2", {"use_sliding_window": False, "max_window_layers": 28, "tie_word_embeddings": True, "vocab_size": 257}),
    ("qwen3", {}),
    ("mixtral", {"vocab_size": 263}),
    ("qwen3_moe", {"norm_topk_prob": True, "tie_word_embeddings": True}),
    ("gemma2", {"tie_word_embeddings": True}),
    ("gemma3_text", {"tie_word_embeddings": True}),
]


def read(folder: Path) -> dict[str, torch.Tensor]:
    """Returns all tensors of a Hugging Face folder, read by safetensors."""
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def assert_same(one: Path, other: Path) -> None:
    ours, theirs = read(one), read(other)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype, name
        assert torch.equal(tensor.view(torch.uint8), theirs[name].view(torch.uint8)), name


@pytest.fixture
def cut_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sets sizes so small that there are several files, boxes that end within a query group and blocks of few rows."""
    monkeypatch.setattr(hf_files, "SHARD_BYTES", 60_000)
    monkeypatch.setattr(torch_dist, "CHUNK_BYTES", 1900)
    monkeypatch.setattr(lazy, "BLOCK_BYTES", 700)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    tiny_model(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("family", "overrides"), VARIANTS)
@pytest.mark.usefixtures("cut_small")
def test_to_megatron_and_back(tmp_path: Path, family: str, overrides: dict[str, Any], dtype: torch.dtype) -> None:
    theirs = tiny_model(tmp_path / "model", family, **overrides).to(dtype)  # type: ignore[arg-type]  # hidden by a decorator
    (tmp_path / "model/model.safetensors").unlink()
    theirs.save_pretrained(tmp_path / "model", max_shard_size="100KB")
    notes = convert(tmp_path / "model", tmp_path / "megatron", "megatron", verify=True)
    assert any("padded the vocabulary" in note for note in notes)
    shutil.move(tmp_path / "model", tmp_path / "moved")  # the Megatron folder does not depend on it
    notes = convert(tmp_path / "megatron", tmp_path / "hf", "hf", verify=True)
    assert any("padding" in note for note in notes)
    assert_same(tmp_path / "moved", tmp_path / "hf")
    for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "hf" / name).read_bytes() == (tmp_path / "moved" / name).read_bytes()
    tokens = torch.arange(6, 60)[None]
    with torch.no_grad():
        before, after = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("moved", "hf"))
        assert torch.equal(before(tokens).logits, after(tokens).logits)
    assert AutoTokenizer.from_pretrained(tmp_path / "hf").eos_token == "<eos>"
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 1
    assert {path.name for path in tmp_path.iterdir()} == {"moved", "megatron", "hf"}


def test_bits_that_are_no_numbers_come_back(tmp_path: Path, model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    noise = torch.randint(-(2**31), 2**31, tensors["lm_head.weight"].shape, dtype=torch.int32)
    tensors["lm_head.weight"] = noise.view(torch.float32)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    convert(model, tmp_path / "megatron", "megatron", verify=True)
    convert(tmp_path / "megatron", tmp_path / "hf", "hf", verify=True)
    assert_same(model, tmp_path / "hf")


@pytest.mark.usefixtures("cut_small")
def test_goes_on_after_a_kill(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[str] = []
    write = TorchDist.write

    def killed(self: TorchDist, path: Path, items: list[Any]) -> dict[str, Any]:
        written.append(path.name)
        if len(written) == 3:
            path.write_bytes(b"half of it")
            raise KeyboardInterrupt
        return write(self, path, items)

    monkeypatch.setattr(TorchDist, "write", killed)
    with pytest.raises(KeyboardInterrupt):
        convert(model, tmp_path / "megatron", "megatron")
    assert not (tmp_path / "megatron").exists()
    convert(model, tmp_path / "megatron", "megatron", verify=True)
    files = {path.name for path in (tmp_path / "megatron").glob("*.distcp")}
    assert len(files) > 3
    assert len(written) == len(files) + 1  # only the incomplete file was written twice
    convert(tmp_path / "megatron", tmp_path / "hf", "hf")
    assert_same(model, tmp_path / "hf")


@pytest.mark.usefixtures("cut_small")
def test_begins_anew_for_another_source(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    convert(model, tmp_path / "megatron", "megatron")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(HuggingFace, "finish", interrupted)
        convert(tmp_path / "megatron", tmp_path / "hf", "hf")
    tiny_model(tmp_path / "other", seed=1)
    convert(tmp_path / "other", tmp_path / "megatron-other", "megatron")
    convert(tmp_path / "megatron-other", tmp_path / "hf", "hf", verify=True)
    assert_same(tmp_path / "other", tmp_path / "hf")


def interrupted(*_: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.slow
def test_several_processes_write_the_same(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hf_files, "SHARD_BYTES", 60_000)
    for to, source in (("megatron", "model"), ("hf", "megatron-1")):
        for workers in (1, 2):
            convert(tmp_path / source, tmp_path / f"{to}-{workers}", to, workers=workers)
        names = {path.name for path in (tmp_path / f"{to}-1").iterdir()}
        assert names == {path.name for path in (tmp_path / f"{to}-2").iterdir()}
        for name in names - {".metadata", "common.pt", "trainer.json"}:
            assert (tmp_path / f"{to}-1" / name).read_bytes() == (tmp_path / f"{to}-2" / name).read_bytes(), name
    (tmp_path / "megatron-2" / "__1_0.distcp").write_bytes(b"")
    with pytest.raises(UserError, match="__1_0.distcp has 0 bytes"):
        convert(tmp_path / "megatron-2", tmp_path / "hf-3", "hf", workers=2)


@pytest.mark.slow
def test_what_ends_a_worker_is_told(tmp_path: Path, model: Path) -> None:
    opened = work.open_model(model)
    (model / "config.json").unlink()  # the workers open the model by themselves
    with pytest.raises(UserError, match="neither a run directory"):
        work.write_shards(work.Conversion(model, "megatron", tmp_path / "out", 60_000), opened, 2)


def test_verify_finds_a_changed_bit(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = TorchDist.write

    def faulty(self: TorchDist, path: Path, items: list[Any]) -> dict[str, Any]:
        write(self, path, items)
        content = bytearray(path.read_bytes())
        content[-20_000] ^= 1  # in the last tensor, above its padding
        path.write_bytes(content)
        return write(self, path.with_name("sums-of-what-was-meant"), items) | {"sum": list(checksum_of(bytes(content)))}

    monkeypatch.setattr(TorchDist, "write", faulty)
    with pytest.raises(UserError, match="lm_head.weight differs from the source"):
        convert(model, tmp_path / "megatron", "megatron", verify=True)
    assert not (tmp_path / "megatron").exists()


def checksum_of(content: bytes) -> tuple[int, str]:
    return len(content), xxhash.xxh3_128(content).hexdigest()


def test_a_changed_file_is_named(tmp_path: Path, model: Path) -> None:
    convert(model, tmp_path / "megatron", "megatron")
    convert(tmp_path / "megatron", tmp_path / "hf", "hf")
    for path, to in ((tmp_path / "megatron/__0_0.distcp", "hf"), (tmp_path / "hf/model.safetensors", "megatron")):
        content = bytearray(path.read_bytes())
        content[-3000] ^= 1
        path.write_bytes(content)
        with pytest.raises(UserError, match=f"{path.name} does not match its checksum"):
            convert(path.parent, tmp_path / "out", to, verify=True)


def edited(model: Path, change: dict[str, torch.Tensor | None], **config: Any) -> None:
    tensors = load_file(model / "model.safetensors")
    for name, tensor in change.items():
        tensors.pop(name, None)
        if tensor is not None:
            tensors[name] = tensor
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    raw = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(raw | config))


QUERY, HEAD = "model.layers.1.self_attn.q_proj.weight", "lm_head.weight"


@pytest.mark.parametrize(
    ("change", "config", "message"),
    [
        ({QUERY: None}, {}, f"lacks the tensor {QUERY}"),
        ({"model.layers.4.mlp.up_proj.weight": torch.ones(2)}, {}, "holds model.layers.4.mlp.up_proj.weight"),
        ({QUERY: torch.ones(32, 31)}, {}, r"q_proj.weight has shape \(32, 31\)"),
        ({QUERY: torch.ones(32, 32).bfloat16()}, {}, "q_proj.weight has dtype torch.bfloat16 and .*v_proj"),
        ({"model.layers.1.self_attn.o_proj.weight": torch.ones(32, 32).bfloat16()}, {}, "linear_proj.weight"),
        (
            {QUERY: torch.ones(32, 32).to(torch.float8_e4m3fn)},
            {},
            "q_proj.weight has data type F8_E4M3, which is not supported",
        ),
        ({}, {"tie_word_embeddings": True}, "lm_head.weight differs from model.embed_tokens.weight"),
        ({}, {"model_type": "gpt2"}, "'gpt2' is not supported"),
    ],
)
def test_refuses(
    tmp_path: Path, model: Path, change: dict[str, torch.Tensor | None], config: dict[str, Any], message: str
) -> None:
    edited(model, change, **config)
    with pytest.raises(UserError, match=message):
        convert(model, tmp_path / "out", "megatron")
    assert not (tmp_path / "out").exists()


def test_says_what_is_left_out(tmp_path: Path, model: Path) -> None:
    embedding = load_file(model / "model.safetensors")["model.embed_tokens.weight"]
    edited(
        model,
        {HEAD: embedding.clone(), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)},
        tie_word_embeddings=True,
    )
    notes = convert(model, tmp_path / "megatron", "megatron", verify=True)
    assert [note for note in notes if "dropped" in note] == [
        "dropped lm_head.weight, which the model computes from other tensors",
        "dropped model.layers.0.self_attn.rotary_emb.inv_freq, which the model computes from other tensors",
    ]


@pytest.mark.parametrize(("size", "message"), [(-1, "has .* bytes instead of"), (50, "is damaged"), (4, "is damaged")])
def test_names_a_torn_file(tmp_path: Path, model: Path, size: int, message: str) -> None:
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(UserError, match=f"model.safetensors {message}"):
        convert(model, tmp_path / "out", "megatron")


def test_refuses_by_name(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def error(*arguments: str) -> str:
        assert main(["convert", *arguments]) == 2
        return capsys.readouterr().err

    out = str(tmp_path / "out")
    convert(model, tmp_path / "megatron", "megatron")
    assert "already in the format 'megatron'" in error(str(tmp_path / "megatron"), out, "--to", "megatron")
    assert "not an empty folder" in error(str(model), str(model), "--to", "megatron")
    assert "no adapters" in error(str(tmp_path / "megatron"), out, "--to", "peft")
    assert "--workers 0" in error(str(model), out, "--to", "megatron", "--workers", "0")
    assert "NeMo 1" in error("model.nemo", out, "--to", "hf")
    assert "neither a run directory" in error(str(tmp_path), out, "--to", "hf")
    assert main(["convert", str(tmp_path / "megatron"), out, "--to", "hf", "--verify"]) == 0
    assert "39 tensors" in capsys.readouterr().out


def test_the_same_conversion_again_is_complete(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    again = ["convert", str(model), str(tmp_path / "out"), "--to", "megatron"]
    assert main(again) == 0
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    for more in ([], ["--verify"]):
        capsys.readouterr()
        assert main([*again, *more]) == 0
        said = capsys.readouterr().out
        assert "out: complete, converted by an earlier call" in said and ("verified" in said) == bool(more)
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    assert main([*again[:-1], "nemo"]) == 2
    assert "holds another conversion" in capsys.readouterr().err
    tensors = load_file(model / "model.safetensors")
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, model / "model.safetensors")
    assert main(again) == 2
    assert "holds another conversion than that of" in capsys.readouterr().err


@pytest.mark.usefixtures("cut_small")
def test_megatron_loads_it(tmp_path: Path) -> None:
    """Megatron's own reader gives the model the same weights as our loader of the Hugging Face folder."""
    from megatron.core.dist_checkpointing import load

    for family in ("qwen2", "qwen3_moe"):
        tiny_model(tmp_path / family, family, vocab_size=301)
        convert(tmp_path / family, tmp_path / f"{family}-megatron", "megatron")
        model = load_model(tmp_path / family)
        expected = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(7)
        loaded = load({"model": model.sharded_state_dict()}, str(tmp_path / f"{family}-megatron"))
        model.load_state_dict(loaded["model"])
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter, expected[name]), name


def test_others_than_training_name_the_remedy(tmp_path: Path, model: Path) -> None:
    convert(model, tmp_path / "megatron", "megatron")
    with pytest.raises(UserError, match="is a Megatron model folder, .* --to hf"):
        shard_files(tmp_path / "megatron")


@pytest.mark.parametrize("more", [[], ["lora.rank=2"]], ids=["whole", "lora"])
def test_training_from_a_megatron_folder_is_the_same(tmp_path: Path, more: list[str]) -> None:
    """Bit for bit, also of the exported model."""
    config = tiny_run(tmp_path, pairs=8, held_out=4, shape={"vocab_size": 301}, reference=None, loss={"name": "simpo"})
    convert(tmp_path / "model", tmp_path / "megatron", "megatron")
    for name in ("model", "megatron"):
        overrides = [f"model.path={tmp_path}/{name}", f"output={tmp_path}/from-{name}", *more]
        assert main(["train", str(config), *overrides]) == 0
        assert main(["convert", f"{tmp_path}/from-{name}", f"{tmp_path}/hf-{name}", "--to", "hf"]) == 0
    assert largest_difference(tmp_path / "from-megatron", tmp_path / "from-model")[0] == 0
    one, other = (load_file(tmp_path / f"hf-{name}/model.safetensors") for name in ("model", "megatron"))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert (tmp_path / "hf-megatron/tokenizer.json").exists()
