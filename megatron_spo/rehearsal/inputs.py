"""Makes pairs of given lengths, for a step whose data is not read."""

import numpy as np
from numpy.typing import NDArray

from megatron_spo.data.dataset import TokenizedSet
from megatron_spo.data.rows import Example
from megatron_spo.planner.rows import Lengths


class PairsOfLengths(TokenizedSet):
    """A data set of pairs with these lengths and arbitrary tokens."""

    def __init__(self, lengths: Lengths) -> None:
        self._lengths = lengths
        self.weights, self.source_sizes = (1.0,), (len(lengths),)
        self.prompt_tokens, self.shared_tokens, self.tokens = lengths.prompt, lengths.shared, lengths.tokens
        common = lengths.shared - lengths.prompt
        self.has_rejected = bool(lengths.rejected_tail.any())
        self.chosen_tokens = common + lengths.chosen_tail
        self.rejected_tokens = (common + lengths.rejected_tail) * self.has_rejected
        self.row_hashes = np.zeros(len(lengths), np.uint64)

    def __len__(self) -> int:
        return len(self._lengths)

    def get(self, index: int) -> Example:
        """Returns a pair whose answers differ in every token after the shared prefix."""
        one = self._lengths
        shared = int(one.shared[index])

        def sequence(tail: int, token: int) -> NDArray[np.int32]:
            return np.concatenate([np.zeros(shared, np.int32), np.full(tail, token, np.int32)])

        chosen = sequence(int(one.chosen_tail[index]), 1)
        rejected = sequence(int(one.rejected_tail[index]), 2) if self.has_rejected else np.zeros(0, np.int32)
        return Example(chosen, rejected, int(one.prompt[index]), shared)

    def describe(self, index: int) -> str:
        return f"pair {index}"
