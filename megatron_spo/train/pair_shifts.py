"""Results of an evaluation for each pair, for the file RUN/held_out/<set>.json."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from megatron_spo.data.dataset import TokenizedSet

WORST = 20
"""Number of pairs that are listed with their texts."""
Decode = Callable[[Sequence[int]], str]


def held_out(dataset: TokenizedSet, shifts: Tensor, step: int, decode: Decode) -> dict[str, Any]:
    """Returns the shifts of every pair of the set, with full texts for the pairs whose chosen answer fell most.

    Args:
        dataset: the held-out set.
        shifts: [rows, 2] log-probs of chosen and rejected minus the reference's, nats.
        step: the step after which they were measured.
        decode: converts token ids to text.

    Returns:
        {"step", "pairs": [{"row", "chosen_shift", "rejected_shift", "chosen_tokens", "rejected_tokens"}], "worst":
        [{"row", "prompt", "chosen", "rejected", "chosen_shift", "rejected_shift"}]}; `row` is the line of the file,
        counted from 1.
    """
    values = shifts.cpu().numpy()
    pairs = [
        {**_row(dataset, i, values), "chosen_tokens": int(chosen), "rejected_tokens": int(rejected)}
        for i, (chosen, rejected) in enumerate(zip(dataset.chosen_tokens, dataset.rejected_tokens, strict=True))
    ]
    fallen = [int(i) for i in np.argsort(values[:, 0], kind="stable")[:WORST] if values[i, 0] < 0]
    worst = [{**_row(dataset, i, values), **_texts(dataset, i, decode)} for i in fallen]
    return {"step": step, "pairs": pairs, "worst": worst}


def _row(dataset: TokenizedSet, index: int, shifts: NDArray[np.float64]) -> dict[str, Any]:
    chosen, rejected = shifts[index].tolist()
    return {"row": dataset.line(index), "chosen_shift": chosen, "rejected_shift": rejected}


def _texts(dataset: TokenizedSet, index: int, decode: Decode) -> dict[str, str]:
    example = dataset.get(index)
    prompt = example.prompt_length
    return {
        "prompt": decode(example.chosen_ids[:prompt].tolist()),
        "chosen": decode(example.chosen_ids[prompt:].tolist()),
        "rejected": decode(example.rejected_ids[prompt:].tolist()),
    }
