"""Rewards by a Hugging Face sequence classifier with one output, in batches, on a GPU or the CPU.

The text is that of TRL's RewardTrainer: messages are rendered by the model's chat template; a string prompt is followed
by the answer and the end-of-text token.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerFast

from megatron_spo.config.model_folder import is_needless
from megatron_spo.data.chat_template import ChatTemplate
from megatron_spo.data.json_lines import RowProblem
from megatron_spo.data.pairs import parse_prompt
from megatron_spo.errors import UserError
from megatron_spo.evaluate.limits import NO_LIMIT, config_of
from megatron_spo.evaluate.pretrained import load_pretrained, load_tokenizer
from megatron_spo.on_policy.answered import Answered, completion


def rewards(folder: Path, answered: Sequence[Answered], batch_size: int) -> Iterator[list[float]]:
    """Yields the rewards of the answers of each row.

    Raises:
        UserError: the folder has no reward model, or a row does not suit it.
    """
    tokenizer = load_tokenizer(folder)
    longest = _context(folder)
    template = None if tokenizer.chat_template is None else ChatTemplate(tokenizer)
    ids = [_ids(one, text, tokenizer, template, longest) for one in answered for text in one.responses]
    model = load_reward_model(folder, tokenizer)
    found = score_ids(model, ids, batch_size)
    start = 0
    for one in answered:
        yield found[start : start + len(one.responses)]
        start += len(one.responses)


def load_reward_model(folder: Path, tokenizer: PreTrainedTokenizerFast) -> Any:
    """Loads a sequence classifier with one output.

    Raises:
        UserError: the folder has none; a causal language model is not one, because its head would be random.
    """
    config = config_of(folder)
    if config.num_labels != 1:
        raise UserError(f"{folder}: the classifier has {config.num_labels} outputs, but a reward model has one "
                        "(num_labels: 1 in its config.json)")  # fmt: skip
    model, info = load_pretrained(folder, AutoModelForSequenceClassification)
    wrong = sorted([*info["missing_keys"], *map(str, info["mismatched_keys"])])
    if wrong or any(not is_needless(name, tied=False) for name in info["unexpected_keys"]):
        name = (wrong or sorted(info["unexpected_keys"]))[0]
        raise UserError(f"{folder} is not a sequence classifier: {name} is missing or does not fit its config.json; "
                        "use a folder saved from AutoModelForSequenceClassification")  # fmt: skip
    text = model.config.get_text_config()
    if text.pad_token_id is None:  # the model finds the last token of a sequence by the padding
        text.pad_token_id = _padding(tokenizer)
    return model


@torch.inference_mode()
def score_ids(model: Any, ids: Sequence[Sequence[int]], batch_size: int) -> list[float]:
    """Returns the reward of each sequence of token ids; sequences of similar length share a batch."""
    order = sorted(range(len(ids)), key=lambda i: -len(ids[i]))
    found = [0.0] * len(ids)
    pad = model.config.get_text_config().pad_token_id
    for start in tqdm(range(0, len(order), batch_size), desc="rewards", unit="batch", disable=None):
        batch = order[start : start + batch_size]
        width = len(ids[batch[0]])
        tokens = torch.tensor([[*ids[i], *[pad] * (width - len(ids[i]))] for i in batch])
        mask = torch.tensor([[1] * len(ids[i]) + [0] * (width - len(ids[i])) for i in batch])
        logits = model(input_ids=tokens.to(model.device), attention_mask=mask.to(model.device)).logits
        for i, reward in zip(batch, logits[:, 0].float().tolist(), strict=True):
            found[i] = reward
    return found


def _context(folder: Path) -> int:
    return getattr(config_of(folder).get_text_config(), "max_position_embeddings", None) or NO_LIMIT


def _padding(tokenizer: PreTrainedTokenizerFast) -> int:
    found = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    if found is None:
        raise UserError("the reward model's tokenizer has neither pad_token nor eos_token; set one of them")
    return int(found)


def _ids(
    one: Answered, text: str, tokenizer: PreTrainedTokenizerFast, template: ChatTemplate | None, longest: int
) -> list[int]:
    prompt = one.row["prompt"]
    if isinstance(prompt, str):
        whole = prompt + text
        end = tokenizer.eos_token or ""
        ids = tokenizer(whole if whole.endswith(end) else whole + end)["input_ids"]
    elif template is None:
        raise UserError(f"{one.where}: the prompt is a list of messages, but the reward model has no chat template; "
                        "use one that has, or prompts of text")  # fmt: skip
    else:
        try:
            given = parse_prompt(one.row).template
            rendered = template.render([*prompt, *completion(prompt, text)], given, "responses", generation=False)
        except RowProblem as problem:
            raise UserError(f"{one.where}: field '{problem.field}' {problem.reason}") from problem
        ids = tokenizer(rendered, add_special_tokens=False)["input_ids"]
    if len(ids) > longest:
        raise UserError(f"{one.where}: prompt and response have {len(ids)} tokens, but the context of the reward model "
                        f"is {longest}; shorten the row, or use another model")  # fmt: skip
    return list(ids)
