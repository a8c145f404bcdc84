"""Win rates of answers: by a reward model, or by a file of scores that a judge has written."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_spo.data.json_lines import read_rows
from megatron_spo.errors import UserError
from megatron_spo.evaluate.answers import Answers
from megatron_spo.evaluate.scores import Estimate, estimate
from megatron_spo.meter import Meter

Rewards = list[list[float]]
"""A number for each response of each row of a file of answers; higher is better."""


def read_scores(path: Path, answers: Answers) -> Rewards:
    """Reads a JSONL file with a field `scores` in each row: one number for each response of that row of the answers.

    A row may repeat the field `prompt`, which is then compared.

    Raises:
        UserError: If the file does not fit the answers; the message names the line.
    """
    found: Rewards = []
    rows = list(read_rows(path))
    if len(rows) != len(answers.rows):
        raise UserError(f"{path} has {len(rows)} rows, but {answers.path} has {len(answers.rows)}; give a row of "
                        "scores for each row of answers, in the same order")  # fmt: skip
    for (line, row), given in zip(rows, answers.rows, strict=True):
        scores, count = row.get("scores"), len(given["responses"])
        numbers = scores if isinstance(scores, list) else []
        if len(numbers) != count or not all(type(one) in (int, float) and np.isfinite(one) for one in numbers):
            raise UserError(f"{path} line {line}: field `scores` must be a list of {count} numbers, one for each "
                            f"response in {answers.path}")  # fmt: skip
        if "prompt" in row and row["prompt"] != given["prompt"]:
            raise UserError(f"{path} line {line}: the prompt differs from that of {answers.path}; judge these answers")
        found.append([float(one) for one in numbers])
    return found


def win_rate(before: Rewards, after: Rewards) -> Estimate:
    """Returns the share of comparisons that `after` wins against `before`, with a bootstrap interval over the rows.

    Each response of a row is compared with each response of the same row in the other file; equal scores count one
    half.
    """
    rates = []
    for old, new in zip(before, after, strict=True):
        gaps = np.subtract.outer(np.asarray(new), np.asarray(old))
        rates.append(float(np.mean((gaps > 0) + 0.5 * (gaps == 0))))
    found = estimate(np.asarray(rates))
    assert found is not None
    return found


def score_by_model(folder: Path, files: Sequence[Answers], batch_size: int) -> list[Rewards]:
    """Scores every response with a reward model: a Hugging Face sequence classifier with one output.

    The prompt is a conversation, or one message of the user; the response is the next message of the assistant. Without
    a chat template, prompts must be strings, and the response follows the prompt.

    Raises:
        UserError: If the folder is not a reward model, or a conversation is longer than its context.
    """
    import torch

    tokenizer, model = _load(folder)
    texts = [_ids(tokenizer, row["prompt"], response, f"{file.path} line {line}", folder)
             for file in files for line, row in zip(file.lines, file.rows, strict=True)
             for response in row["responses"]]  # fmt: skip
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit and max(map(len, texts)) > limit:
        raise UserError(f"--reward-model {folder}: a prompt with its response has {max(map(len, texts))} tokens, but "
                        f"the context of the model is {limit}; generate with a smaller --max-new-tokens")  # fmt: skip
    used = set().union(*texts)  # transformers reads the score at the last token that is not padding
    model.config.pad_token_id = next(token for token in range(len(used) + 1) if token not in used)
    flat = np.zeros(len(texts))
    order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))
    with Meter("scoring answers", len(texts), "answers") as meter, torch.inference_mode():
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            ids, mask = _padded([texts[i] for i in batch], model.config.pad_token_id)
            logits = model(input_ids=ids.to(model.device), attention_mask=mask.to(model.device)).logits
            flat[batch] = logits[:, 0].double().cpu().numpy()
            meter.advance(len(batch))
    if not np.isfinite(flat).all():
        raise UserError(f"--reward-model {folder}: a score is not a finite number; check the weights of the model")
    numbers = iter(flat.tolist())
    return [[[next(numbers) for _ in row["responses"]] for row in file.rows] for file in files]


def _load(folder: Path) -> tuple[Any, Any]:
    """Returns tokenizer and model of a reward model.

    Raises:
        UserError: If the folder is not one: transformers would give it a head with random weights.
    """
    import torch
    from transformers import AutoModelForSequenceClassification

    from megatron_spo.evaluate.limits import config_of, does_not_load
    from megatron_spo.evaluate.pretrained import load_tokenizer

    tokenizer: Any = load_tokenizer(folder)
    labels = config_of(folder).num_labels
    if labels != 1:
        raise UserError(f"--reward-model {folder} has {labels} outputs, but a reward model has one; choose a sequence "
                        "classifier with num_labels = 1")  # fmt: skip
    try:
        loaded: Any = AutoModelForSequenceClassification.from_pretrained(folder, dtype="auto", output_loading_info=True)
    except Exception as error:  # transformers raises many types
        raise does_not_load(folder, error) from error
    model, info = loaded
    if missing := sorted(info["missing_keys"]):
        raise UserError(f"--reward-model {folder} is not a sequence classifier: its weights lack {missing[0]}")
    return tokenizer, model.to("cuda" if torch.cuda.is_available() else "cpu").eval()


def _padded(sequences: list[list[int]], pad: int) -> Any:
    """Returns right-padded token ids [batch, longest] and the attention mask of the same shape."""
    import torch

    ids = torch.full((len(sequences), max(map(len, sequences))), pad)
    mask = torch.zeros_like(ids)
    for i, sequence in enumerate(sequences):
        ids[i, : len(sequence)], mask[i, : len(sequence)] = torch.tensor(sequence), 1
    return ids, mask


def _ids(tokenizer: Any, prompt: Any, response: str, where: str, folder: Path) -> list[int]:
    if tokenizer.chat_template is None:
        if not isinstance(prompt, str):
            raise UserError(f"{where}: the prompt is a list of messages, but the tokenizer of the reward model "
                            f"{folder} has no chat template")  # fmt: skip
        return list(tokenizer(prompt + response)["input_ids"])
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    conversation = [*messages, {"role": "assistant", "content": response}]
    try:
        text = tokenizer.apply_chat_template(conversation, tokenize=False)
    except Exception as error:  # a template can raise any
        raise UserError(f"{where}: the chat template of the reward model {folder} fails: {error}") from error
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])
