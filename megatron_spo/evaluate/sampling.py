"""How responses are sampled, and where they end, whatever library generates them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from megatron_spo.errors import UserError
from megatron_spo.evaluate.limits import NEW_TOKENS


@dataclass(frozen=True)
class Sampling:
    """How responses are sampled.

    Attributes:
        samples: Responses per prompt.
        temperature: 0 for greedy decoding.
        max_new_tokens: Most new tokens of a response, the end-of-text token included.
        seed: Seed of the noise.
    """

    samples: int = 1
    temperature: float = 0.0
    max_new_tokens: int = NEW_TOKENS
    seed: int = 0

    def __post_init__(self) -> None:
        if self.samples < 1 or self.max_new_tokens < 1:
            raise UserError("generate: samples and max_new_tokens must be at least 1")
        if self.temperature < 0:
            raise UserError(f"generate: temperature = {self.temperature} must be 0 (greedy) or positive")
        if self.samples > 1 and self.temperature == 0:
            raise UserError(f"generate: samples = {self.samples} with temperature = 0 gives identical responses; set a "
                            "temperature")  # fmt: skip


@dataclass(frozen=True)
class Response:
    """A response: `text` without special tokens; `finished` is False if the length limit cut it off."""

    text: str
    finished: bool


def end_tokens(config: Any, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Returns the tokens that end a response: those of the generation config (or config) and of the tokenizer."""
    of_model = config.eos_token_id if config else None
    listed = of_model if isinstance(of_model, list) else [of_model]
    return {token for token in [*listed, tokenizer.eos_token_id] if token is not None}


def cut(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int], stops: set[int]) -> Response:
    """Returns the response up to the first end token."""
    end = next((i for i, token in enumerate(tokens) if token in stops), None)
    text = tokenizer.decode(list(tokens[:end]), skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return Response(str(text), finished=end is not None)
