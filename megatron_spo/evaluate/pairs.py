"""How a Hugging Face model ranks the pairs of a preference set: transformers' forward over the trainer's tokens."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from megatron_spo.config.losses import ROUNDING
from megatron_spo.data.dataset import TokenizedSet
from megatron_spo.evaluate.answers import aligned, show
from megatron_spo.evaluate.scores import Estimate, estimate

SIDES = ("chosen", "rejected")


@dataclass(frozen=True)
class PairScores:
    """Log-probs of a set of pairs, summed over response tokens: fp64 [pairs, 2], chosen and rejected.

    logps: under the model.  reference: under the reference, None without one.  tokens: int64, how many were summed.
    where: file and line of each pair.
    """

    logps: NDArray[np.float64]
    reference: NDArray[np.float64] | None
    tokens: NDArray[np.int64]
    where: list[str]

    def values(self) -> dict[str, NDArray[np.float64]]:
        """[pairs] values whose means are the metrics.

        The trainer's names mean what they mean in held-out lines. `accuracy/sum` and `accuracy/mean` need no reference:
        the chosen response's summed, or mean, log-prob is the higher one.
        """
        noise = ROUNDING * np.abs(self.logps)
        means = self.logps / self.tokens
        found = {f"logps/{side}": self.logps[:, i] for i, side in enumerate(SIDES)}
        found["accuracy/sum"] = _higher(self.logps[:, 0] - self.logps[:, 1], np.zeros(1))
        found["accuracy/mean"] = _higher(means[:, 0] - means[:, 1], np.zeros(1))
        if self.reference is not None:
            shift = self.logps - self.reference
            found["rewards/accuracies"] = _higher(shift[:, 0] - shift[:, 1], noise[:, 0] + noise[:, 1])
            found |= {f"spo/{side}_shift": shift[:, i] for i, side in enumerate(SIDES)}
            found["spo/both_down"] = np.all(shift < -noise, axis=1).astype(np.float64)
        return found

    def estimates(self) -> dict[str, Estimate]:
        """Means with intervals over the pairs."""
        return {name: one for name, values in self.values().items() if (one := estimate(values)) is not None}

    def as_json(self) -> dict[str, Any]:
        """Everything that was found, as plain data."""
        rows = []
        for i, where in enumerate(self.where):
            row: dict[str, Any] = {"where": where}
            for j, side in enumerate(SIDES):
                row |= {f"{side}_logp": self.logps[i, j], f"{side}_tokens": int(self.tokens[i, j])}
                if self.reference is not None:
                    row[f"{side}_reference_logp"] = self.reference[i, j]
            rows.append(row)
        return {"scores": {name: asdict(one) for name, one in self.estimates().items()}, "rows": rows}

    def table(self) -> str:
        """What a screen shows: a metric a line, with its interval."""
        lines = [[name, show(one, None)] for name, one in self.estimates().items()]
        return aligned([*lines, ["pairs", str(len(self.where))]])


def _higher(gap: NDArray[np.float64], noise: NDArray[np.float64]) -> NDArray[np.float64]:
    """1 where a gap is positive, 0 where negative, one half within the noise."""
    return np.where(np.abs(gap) <= noise, 0.5, (gap > 0).astype(np.float64))


def score_pairs(model: Any, reference: Any | None, dataset: TokenizedSet, batch_size: int) -> PairScores:
    """Both sides of every pair under the model, and under the reference where there is one (transformers models)."""
    tokens = np.stack([dataset.chosen_tokens, dataset.rejected_tokens], axis=1)
    return PairScores(
        logps=response_logps(model, dataset, batch_size),
        reference=None if reference is None else response_logps(reference, dataset, batch_size),
        tokens=tokens,
        where=[dataset.describe(i) for i in range(len(dataset))],
    )


@torch.inference_mode()
def response_logps(model: Any, dataset: TokenizedSet, batch_size: int) -> NDArray[np.float64]:
    """fp64 [pairs, 2]: log p of the chosen and rejected responses, summed over their tokens."""
    lengths = dataset.prompt_tokens[:, None] + np.stack([dataset.chosen_tokens, dataset.rejected_tokens], axis=1)
    order = np.argsort(
        -lengths, axis=None, kind="stable"
    )  # similar lengths together; the longest first shows its memory
    found = np.zeros(lengths.size)
    for start in tqdm(range(0, lengths.size, batch_size), desc="pairs", unit="batch", disable=None):
        jobs = order[start : start + batch_size]
        sequences = [_sequence(dataset, int(job)) for job in jobs]
        found[jobs] = _batch_logps(model, *zip(*sequences, strict=True))
    return found.reshape(lengths.shape)


def _sequence(dataset: TokenizedSet, job: int) -> tuple[NDArray[np.int32], int]:
    """Token ids of prompt and response, and the prompt's length; jobs go chosen, rejected, chosen, ..."""
    example = dataset.get(job // 2)
    return (example.rejected_ids if job % 2 else example.chosen_ids), example.prompt_length


def _batch_logps(model: Any, sequences: Sequence[NDArray[np.int32]], prompts: Sequence[int]) -> list[float]:
    """Sums over the responses; logits are only made from the shortest prompt's end on."""
    width, first = max(map(len, sequences)), min(prompts) - 1
    ids = torch.zeros(len(sequences), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence)] = torch.from_numpy(sequence.astype(np.int64))
        mask[row, : len(sequence)] = 1
    ids, mask = ids.to(model.device), mask.to(model.device)
    logits = model(input_ids=ids, attention_mask=mask, logits_to_keep=width - first, use_cache=False).logits
    sums = []
    for row, (sequence, prompt) in enumerate(zip(sequences, prompts, strict=True)):
        scored = logits[row, prompt - 1 - first : len(sequence) - 1 - first].float()
        targets = ids[row, prompt : len(sequence), None]
        logps = scored.gather(-1, targets).squeeze(-1) - scored.logsumexp(-1)
        sums.append(float(logps.double().sum()))
    return sums
