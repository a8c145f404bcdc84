"""Limits of a model: the size of its vocabulary and the length of its context."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_spo.config.model_folder import check_folder
from megatron_spo.errors import UserError

if TYPE_CHECKING:
    from megatron_spo.data.dataset import TokenizedSet

NO_LIMIT = sys.maxsize
NEW_TOKENS = 256
"""Default for the maximum tokens of an answer, if the model's context leaves that many."""


@dataclass(frozen=True)
class ModelLimits:
    """The limits of the model in `folder`: its vocabulary size and context length (NO_LIMIT if unknown)."""

    folder: Path
    vocab: int
    positions: int

    def new_tokens(self, prompts: Sequence[Sequence[int]]) -> int:
        """Returns the maximum tokens of an answer to these prompts (token ids), if none is given."""
        return max(1, min(NEW_TOKENS, self.positions - max(map(len, prompts))))

    def check_prompts(self, prompts: Sequence[Sequence[int]], new_tokens: int, where: Sequence[str]) -> None:
        """Checks that the model can continue each prompt (token ids) by `new_tokens`.

        Raises:
            UserError: If it cannot; the message names the prompt by its entry in `where`.
        """
        for prompt, place in zip(prompts, where, strict=True):
            self._check_ids(max(prompt), place)
            if len(prompt) + new_tokens > self.positions:
                room = self.positions - len(prompt)
                remedy = f"set --max-new-tokens to {room} at most, or shorten" if room > 0 else "shorten"
                raise UserError(f"{place}: the prompt of {len(prompt)} tokens and {new_tokens} new tokens exceed the "
                                f"context of {self.positions} tokens of the model in {self.folder}; {remedy} the "
                                "prompt")  # fmt: skip

    def check_pairs(self, dataset: "TokenizedSet") -> None:
        """Checks that all tokens of a data set are in the model's vocabulary.

        Raises:
            UserError: If one is not; the message names the row.
        """
        for index in range(len(dataset)):
            example = dataset.get(index)
            highest = max(example.chosen_ids.max(), example.rejected_ids.max(initial=0))
            self._check_ids(int(highest), dataset.describe(index))

    def _check_ids(self, highest: int, where: str) -> None:
        if highest >= self.vocab:
            raise UserError(f"{where}: token {highest} exceeds the vocabulary of {self.vocab} of the model in "
                            f"{self.folder}; use the tokenizer of this model")  # fmt: skip


def limits_of(folder: Path) -> ModelLimits:
    """Checks the files of a Hugging Face folder and returns the limits of its model.

    Raises:
        UserError: If the folder is damaged, or transformers cannot read its config.json.
    """
    check_folder(folder)
    text = config_of(folder).get_text_config()
    return ModelLimits(folder, text.vocab_size, getattr(text, "max_position_embeddings", None) or NO_LIMIT)


def config_of(folder: Path) -> Any:
    """Returns the config.json of a folder as a transformers configuration.

    Raises:
        UserError: If transformers cannot read it.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder)
    except Exception as error:  # its validation raises many types
        raise does_not_load(folder, error) from error


def does_not_load(folder: Path, error: Exception) -> UserError:
    """Returns the error for a folder that transformers cannot load, with the reason on one line."""
    reason = " ".join(str(error).split())[:300] or type(error).__name__
    return UserError(f"{folder} cannot be loaded as a Hugging Face model: {reason}")
