import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_spo.errors import UserError
from megatron_spo.evaluate import generate, pretrained
from megatron_spo.evaluate.generate import generate_file
from megatron_spo.evaluate.pretrained import placement
from tests.support.tiny import tiny_model, tiny_tokenizer, write_jsonl

PROMPTS = ["a", "what is 12+30?", "", "second", "a rather longer prompt than the others have", "x y"]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny_model(folder, scale=0.3)
    return folder


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": p, "id": i} for i, p in enumerate(PROMPTS) if p])


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(params=[generate.SEGMENT, 2], autouse=True)
def segment(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Finished responses leave the batch after all tokens of these tests, or in between."""
    monkeypatch.setattr(generate, "SEGMENT", request.param)


@pytest.mark.parametrize("tokens", [generate.CPU_PREFILL, 20])
def test_greedy_equals_one_by_one(
    tokens: int, model_dir: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where prompts are computed in parts, here of 5 tokens."""
    monkeypatch.setattr(generate, "CPU_PREFILL", tokens)
    out = tmp_path / "deep" / "out.jsonl"
    generate_file(model_dir, prompts, out, max_new_tokens=12, batch_size=4)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(model_dir), AutoTokenizer.from_pretrained(model_dir)
    for row, given in zip(rows_of(out), rows_of(prompts), strict=True):
        assert row["prompt"] == given["prompt"] and row["id"] == given["id"]
        ids = torch.tensor([tokenizer(row["prompt"])["input_ids"]])
        new = model.generate(ids, do_sample=False, max_new_tokens=12)[0, ids.shape[1] :].tolist()
        finished = tokenizer.eos_token_id in new
        text = tokenizer.decode(new[: new.index(tokenizer.eos_token_id)] if finished else new, skip_special_tokens=True)
        assert row["responses"] == [text] and row["finished"] == [finished]


def test_samples_do_not_depend_on_batching_or_on_other_rows(model_dir: Path, prompts: Path, tmp_path: Path) -> None:
    written = []
    for name, batch_size, rows, samples in (("a", 2, 5, 3), ("b", 64, 5, 3), ("c", 64, 3, 3), ("d", 64, 5, 1)):
        some = write_jsonl(tmp_path / f"{name}.in", rows_of(prompts)[:rows])
        options: dict[str, Any] = {"samples": samples, "temperature": 1.0, "max_new_tokens": 6, "seed": 5}
        generate_file(model_dir, some, tmp_path / name, batch_size=batch_size, **options)
        written.append(rows_of(tmp_path / name))
    assert written[0] == written[1]
    assert written[1][:3] == written[2]
    assert [row["responses"][:1] for row in written[0]] == [row["responses"] for row in written[3]]
    assert len(set(written[0][0]["responses"])) > 1


def test_sampling_follows_the_model(model_dir: Path, tmp_path: Path) -> None:
    count, temperature = 4000, 0.7
    prompts = write_jsonl(tmp_path / "p", [{"prompt": "seven"}])
    options: dict[str, Any] = {"samples": count, "temperature": temperature, "max_new_tokens": 1, "batch_size": count}
    generate_file(model_dir, prompts, tmp_path / "out", **options)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(model_dir), AutoTokenizer.from_pretrained(model_dir)
    logits = model(torch.tensor([tokenizer("seven")["input_ids"]])).logits[0, -1].detach().double()
    expected = (logits / temperature).softmax(-1).numpy()
    texts = [tokenizer.decode([token], skip_special_tokens=True) for token in range(len(tokenizer))]
    responses = rows_of(tmp_path / "out")[0]["responses"]
    for token in expected.argsort()[-5:]:
        if sum(text == texts[token] for text in texts) == 1:
            error = 4 * np.sqrt(expected[token] / count)
            assert abs(responses.count(texts[token]) / count - expected[token]) < error


@pytest.mark.parametrize("size", [7, 512, 1300])
def test_a_token_is_drawn_from_the_cumulative_distribution(size: int) -> None:
    torch.manual_seed(size)
    scores, noise = 3 * torch.randn(40, size), torch.rand(40, 3, dtype=torch.float64)
    scores[:, ::3] = -torch.inf
    noise[:, 1], noise[:, 2] = 0, 1 - 2**-53
    draw = generate.TemperatureSampler(noise, 0.7, prompt_width=5)
    drawn = [draw(torch.zeros(40, 5 + i, dtype=torch.long), scores.clone()).argmax(-1, keepdim=True) for i in range(3)]
    assert all(torch.isfinite(scores.gather(1, token)).all() for token in drawn)
    cumulative = (scores.double() / 0.7).softmax(-1).cumsum(-1)
    wanted = torch.searchsorted(cumulative, noise[:, :1], right=True)
    near = (cumulative.gather(1, wanted) - noise[:, :1]).abs() < 1e-6
    assert bool(((drawn[0] == wanted) | near).all())
    assert int(drawn[1].max()) == 1 and float(1 - cumulative.gather(1, drawn[2]).min()) < 1e-6


def test_where_the_weights_go(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = 80 * 2**30
    assert placement(140 * 2**30, []) is None  # the CPU
    assert placement(140 * 2**30, [gpu]) is None
    assert placement(16 * 2**30, [gpu] * 8) is None
    assert placement(140 * 2**30, [gpu] * 8) == "auto"
    monkeypatch.setattr(pretrained.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="140 GiB of weights do not fit on one GPU of 80 GiB.*pip install accel"):
        placement(140 * 2**30, [gpu] * 8)


def test_a_model_that_accelerate_places_answers_the_same(
    model_dir: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"max_new_tokens": 6, "samples": 2, "temperature": 1.0}
    generate_file(model_dir, prompts, tmp_path / "whole", **options)
    monkeypatch.setattr(pretrained, "placement", lambda weights, gpus: "auto")
    generate_file(model_dir, prompts, tmp_path / "placed", **options)
    assert rows_of(tmp_path / "placed") == rows_of(tmp_path / "whole")


@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
def test_vllm_answers_the_same(prompts: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    tiny_model(model, scale=0.3, hidden_size=128)  # vLLM has no kernels for heads of fewer than 32 features
    for engine in ("transformers", "vllm"):
        generate_file(model, prompts, tmp_path / engine, max_new_tokens=6, engine=engine)
    assert rows_of(tmp_path / "vllm") == rows_of(tmp_path / "transformers")


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed")
def test_vllm_that_is_not_there(model_dir: Path, prompts: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--engine vllm requires vLLM .*omit --engine"):
        generate_file(model_dir, prompts, tmp_path / "out", engine="vllm")


def test_messages_go_through_the_chat_template(model_dir: Path, tmp_path: Path) -> None:
    chat = tmp_path / "chat"
    tiny_model(chat, scale=0.3)
    tiny_tokenizer(chat, chat=True)
    message = [{"role": "user", "content": "hello"}]
    rows: list[dict] = [{"prompt": message}, {"prompt": "<|user|>hello<|end|><|assistant|>"}]
    generate_file(chat, write_jsonl(tmp_path / "p", rows), tmp_path / "out", max_new_tokens=5)
    from_messages, from_text = rows_of(tmp_path / "out")
    assert from_messages["responses"] == from_text["responses"]
    with pytest.raises(UserError, match="no chat template; set data.chat_template"):
        generate_file(model_dir, tmp_path / "p", tmp_path / "out")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "a"', "line 2: field 'line' is not valid JSON"),
        ("[1]", "line 2: field 'line' is a list; must be a JSON object"),
        ('{"text": "a"}', "line 2: field 'prompt' is missing"),
        ('{"prompt": null}', "line 2: field 'prompt' is null; must be a string or a list of messages"),
        ('{"prompt": ""}', "line 2: field 'prompt' is empty"),
        ('{"prompt": 3}', "line 2: field 'prompt' is a number; must be a string or a list of messages"),
        ('{"prompt": [{"role": "user"}]}', r"line 2: field 'prompt\[0\].content' is missing"),
        ('{"prompt": [{"role": "assistant", "content": "a"}]}', "line 2: field 'prompt' ends with an assistant"),
        ('{"prompt": "a", "tools": [{"name": "f"}]}', "line 2: field 'tools' requires a chat template"),
        ('{"prompt": "a", "id": {"\\ud800": 1}}', "line 2: field 'id' contains an unpaired surrogate"),
        (
            '{"prompt": "a", "id": ' + "[" * 101 + "]" * 101 + "}",
            "line 2: field 'id' is nested more than 100 levels deep",
        ),
    ],
)
def test_malformed_prompts(model_dir: Path, tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "p").write_text('{"prompt": "fine"}\n' + line + "\n")
    with pytest.raises(UserError, match=message):
        generate_file(model_dir, tmp_path / "p", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_wrong_folders_and_options(model_dir: Path, prompts: Path, tmp_path: Path) -> None:
    out, run = tmp_path / "out", tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    damaged = tmp_path / "damaged"
    tiny_model(damaged)
    (damaged / "model.safetensors").write_bytes(b"\x00" * 100)
    for folder, message in (
        (tmp_path / "nowhere", "does not exist"),
        (tmp_path, "not a Hugging Face model folder"),
        (run, "convert it first"),
        (damaged, "is damaged"),
    ):
        with pytest.raises(UserError, match=message):
            generate_file(folder, prompts, out)
    with pytest.raises(UserError, match="nothing.jsonl does not exist"):
        generate_file(model_dir, tmp_path / "nothing.jsonl", out)
    options: list[tuple[dict, str]] = [
        ({"temperature": -1.0}, "temperature"),
        ({"samples": 0}, "at least 1"),
        ({"samples": 2}, "set a temperature"),
        ({"batch_size": 0}, "batch_size"),
    ]
    for wrong, message in options:
        with pytest.raises(UserError, match=message):
            generate_file(model_dir, prompts, out, **wrong)
