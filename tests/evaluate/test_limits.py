"""Every command refuses token ids outside a model's vocabulary and texts longer than its context, naming the line."""

from pathlib import Path

import pytest

from megatron_spo.cli import main
from tests.support.tiny import arithmetic_pairs, tiny_model, tiny_tokenizer, write_jsonl

CONTEXT = 64


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose tokenizer has a token more than its embedding, and another one with half the context."""
    folder = tmp_path_factory.mktemp("limits")
    for name, context in (("model", CONTEXT), ("short", CONTEXT // 2)):
        tiny_model(folder / name, num_hidden_layers=1, max_position_embeddings=context)
        tokenizer = tiny_tokenizer(folder / name)
        tokenizer.add_tokens(["[CALL]"])
        tokenizer.save_pretrained(folder / name)
    return folder


def error(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert main([str(argument) for argument in arguments]) == 2
    return capsys.readouterr().err


def config(folder: Path, pairs: Path) -> Path:
    path = folder / "config.yaml"
    path.write_text(
        f"output: {folder}/run\nmodel: {{path: {folder}/model}}\ndata: {{train: {pairs}}}\n"
        f"reference: {{cache: {folder}/cache}}\nprecision: {{dtype: fp32}}\n"
        "training: {global_batch_size: 1, steps: 1, threads: 1}\nlogging: {progress: false}\n"
    )
    return path


def test_a_token_beyond_the_embedding(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [*arithmetic_pairs(1), {"prompt": "a", "chosen": "[CALL] b", "rejected": "c"}]
    pairs = write_jsonl(folder / "call.jsonl", rows)
    prompts = write_jsonl(folder / "prompts.jsonl", [{"prompt": "a"}, {"prompt": "b [CALL]"}])
    for arguments in (
        ["evaluate", "--model", folder / "model", "--pairs", pairs],
        ["generate", folder / "model", "--prompts", prompts, "--out", folder / "out", "--max-new-tokens", 2],
        ["train", config(folder, pairs)],
        ["reference", config(folder, pairs)],
    ):
        said = error(capsys, *arguments)
        assert "line 2: token 262 exceeds the vocabulary of 262" in said


def test_generate_stays_within_the_context(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = write_jsonl(folder / "ten.jsonl", [{"prompt": "0123456789"}])
    options = ["generate", folder / "model", "--prompts", prompts, "--out", folder / "out", "--max-new-tokens"]
    assert "prompt of 10 tokens and 55 new tokens exceed" in (said := error(capsys, *options, CONTEXT - 9))
    assert "ten.jsonl line 1" in said and "context of 64" in said and "--max-new-tokens to 54 at most" in said
    assert main([str(option) for option in (*options, CONTEXT - 10)]) == 0
    assert main([str(option) for option in options[:-1]]) == 0
    assert "1 answers to 1 prompts; " in (said := capsys.readouterr().err) and "the limit of 54 tokens" in said
    write_jsonl(prompts, [{"prompt": "0" * CONTEXT}])
    assert "shorten the prompt" in error(capsys, *options, 1)


def test_pairs_stay_within_the_context_of_both_models(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pairs = write_jsonl(folder / "pairs.jsonl", [{"prompt": "0" * 40, "chosen": "1", "rejected": "2"}])
    options = ["evaluate", "--model", folder / "model", "--pairs", pairs]
    said = error(capsys, *options, "--max-length", CONTEXT + 1)
    assert "--max-length 65 exceeds the context of 64 tokens" in said
    assert main([str(option) for option in (*options, "--max-length", CONTEXT)]) == 0
    assert main(list(map(str, options))) == 0
    capsys.readouterr()
    assert "max_length allows 32" in error(capsys, *options, "--reference", folder / "short")
    write_jsonl(pairs, [{"prompt": "0" * CONTEXT, "chosen": "1", "rejected": "2"}])
    assert "max_length allows 64" in error(capsys, *options)
