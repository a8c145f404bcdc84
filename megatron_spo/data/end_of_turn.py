"""Finds the tokens that a model learns to end its answers with."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from megatron_spo.config.schema import DataConfig
    from megatron_spo.data.dataset import TokenizedSet


def end_tokens(datasets: Iterable[TokenizedSet], data: DataConfig, tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """Returns the special token ids, including eos, that end chosen responses of these data sets, sorted.

    Responses that `data.truncation: right` cuts off are ignored, because they can end with any token.
    """
    specials = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    specials |= {token for token in (tokenizer.eos_token_id,) if token is not None}
    found: set[int] = set()
    for dataset in datasets:
        cut = dataset.prompt_tokens + dataset.chosen_tokens >= data.max_length
        counts = ~cut if data.truncation == "right" else np.ones(len(dataset), dtype=bool)
        found |= set(np.unique(dataset.last_tokens[counts]).tolist())
    return sorted(found & specials)
