"""What a model can take: token ids of its embedding, and so many tokens as it has positions."""

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


@dataclass(frozen=True)
class ModelLimits:
    """Of the model in `folder`: rows of its embedding, and tokens of its context (NO_LIMIT where none is known)."""

    folder: Path
    vocab: int
    positions: int

    def check_prompts(self, prompts: Sequence[Sequence[int]], new_tokens: int, where: Sequence[str]) -> None:
        """Refuse prompts (token ids) that the model cannot continue by `new_tokens`; `where` names each in the message.

        Raises:
            UserError
        """
        for prompt, place in zip(prompts, where, strict=True):
            self._check_ids(max(prompt), place)
            if len(prompt) + new_tokens > self.positions:
                room = self.positions - len(prompt)
                remedy = f"set --max-new-tokens to {room} at most, or shorten" if room > 0 else "shorten"
                raise UserError(f"{place}: the prompt has {len(prompt)} tokens, which with {new_tokens} new ones "
                                f"exceed the context of {self.positions} of the model in {self.folder}; {remedy} "
                                "the prompt")  # fmt: skip

    def check_pairs(self, dataset: "TokenizedSet") -> None:
        """Refuse a data set with a token that the embedding lacks.

        Raises:
            UserError
        """
        for index in range(len(dataset)):
            example = dataset.get(index)
            highest = max(example.chosen_ids.max(), example.rejected_ids.max(initial=0))
            self._check_ids(int(highest), dataset.describe(index))

    def _check_ids(self, highest: int, where: str) -> None:
        if highest >= self.vocab:
            raise UserError(f"{where}: token {highest} is beyond the vocabulary of {self.vocab} of the model in "
                            f"{self.folder}; the tokenizer belongs to another model")  # fmt: skip


def limits_of(folder: Path) -> ModelLimits:
    """The limits of the model in a Hugging Face folder, whose files are checked.

    Raises:
        UserError: the folder is damaged, or transformers refuses its config.json.
    """
    check_folder(folder)
    text = config_of(folder).get_text_config()
    return ModelLimits(folder, text.vocab_size, getattr(text, "max_position_embeddings", None) or NO_LIMIT)


def config_of(folder: Path) -> Any:
    """config.json as transformers reads it.

    Raises:
        UserError: transformers refuses it.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder)
    except Exception as error:  # whatever its validation raises
        raise does_not_load(folder, error) from error


def does_not_load(folder: Path, error: Exception) -> UserError:
    """The error for a folder that transformers refuses, with its reason on one line."""
    reason = " ".join(str(error).split())[:300] or type(error).__name__
    return UserError(f"{folder} does not load as a Hugging Face model: {reason}")
