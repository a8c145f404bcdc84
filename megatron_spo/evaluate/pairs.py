"""Scores the pairs of a preference set under a Hugging Face model, on the same tokens as in training."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from megatron_spo.config.data_source import DataSource
from megatron_spo.config.losses import ROUNDING
from megatron_spo.config.schema import DataConfig
from megatron_spo.data.dataset import Dropped, TokenizedSet, build_dataset
from megatron_spo.data.tokenize import load_tokenizer
from megatron_spo.errors import UserError
from megatron_spo.evaluate.answers import aligned, show
from megatron_spo.evaluate.limits import ModelLimits, limits_of
from megatron_spo.evaluate.pretrained import load_model
from megatron_spo.evaluate.scores import Estimate, estimate
from megatron_spo.meter import Meter

SIDES = ("chosen", "rejected")


@dataclass(frozen=True)
class PairScores:
    """Log-probs in nats of a set of pairs, summed over response tokens; arrays are [pairs, 2], chosen and rejected.

    Attributes:
        logps: Under the model, fp64.
        reference: Under the reference, fp64; None without one.
        tokens: Number of summed tokens, int64.
        where: File and line of each pair.
        dropped: The rows that were left out.
    """

    logps: NDArray[np.float64]
    reference: NDArray[np.float64] | None
    tokens: NDArray[np.int64]
    where: list[str]
    dropped: list[Dropped] = field(default_factory=list)

    def values(self) -> dict[str, NDArray[np.float64]]:
        """Returns [pairs] values, the means of which are the metrics.

        The names are those of held-out lines in metrics.jsonl. `accuracy/sum` and `accuracy/mean` need no reference:
        they count pairs whose chosen response has the higher summed or mean log-prob.
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
        """Returns the means over the pairs, with intervals."""
        return {name: one for name, values in self.values().items() if (one := estimate(values)) is not None}

    def as_json(self) -> dict[str, Any]:
        """Returns all scores as JSON-serializable data."""
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
        """Returns a table for the terminal, one metric per line with its interval."""
        lines = [[name, show(one, None)] for name, one in self.estimates().items()]
        return aligned([*lines, ["pairs", str(len(self.where))]])


def _higher(gap: NDArray[np.float64], noise: NDArray[np.float64]) -> NDArray[np.float64]:
    """Returns 1 for each positive gap, 0 for each negative one and 0.5 for each within the noise."""
    return np.where(np.abs(gap) <= noise, 0.5, (gap > 0).astype(np.float64))


def evaluate_pairs(
    model: str | Path,
    pairs: str | Path,
    *,
    reference: str | Path | None = None,
    batch_size: int = 8,
    max_length: int | None = None,
    truncation: Literal["error", "drop", "left", "right"] = "error",
    bad_rows: Literal["error", "drop"] = "error",
) -> PairScores:
    """How a model ranks preference pairs: log-probs of both responses, with transformers on one process.

    The tokens are those that training computes with, so that the metrics equal those of a training's held-out pairs.

    Args:
        model: folder in Hugging Face format; its tokenizer is used.
        pairs: JSONL or Parquet file, or id on the Hugging Face hub, with rows as in `data.train`.
        reference: Hugging Face folder of the reference model; adds implicit rewards and shifts (nats).
        batch_size: sequences at a time, >= 1.
        max_length: tokens of prompt and longer response; None for 2048, or the model's context where that is shorter.
        truncation: what to do with a longer pair: an error, leave it out, or cut the prompt at its left or right end.
        bad_rows: what to do with a row that is not a pair.

    Returns:
        Log-probs in nats, [pairs, 2]; `estimates()` has the means with their intervals, `table()` a text of them.

    Raises:
        UserError: no such file or model, a row that is wrong or too long, a token that the model does not have.
    """
    folders = [Path(folder) for folder in (model, reference) if folder is not None]
    limits = [limits_of(folder) for folder in folders]
    source = DataSource(path=str(pairs))
    limit = _max_length(max_length, limits)
    data = DataConfig(train=[source], max_length=limit, truncation=truncation, bad_rows=bad_rows)
    dataset = build_dataset([source], data, load_tokenizer(str(model)))
    for one in limits:
        one.check_pairs(dataset)
    models = [load_model(folder) for folder in folders]
    return score_pairs(models[0], models[1] if reference is not None else None, dataset, batch_size)


def _max_length(asked: int | None, limits: Sequence[ModelLimits]) -> int:
    """Tokens of a pair's longer side: what was asked for, or what all models have positions for."""
    shortest = min(limits, key=lambda one: one.positions)
    if asked is None:
        return min(2048, shortest.positions)
    if asked < 2:
        raise UserError(f"evaluate: --max-length is {asked}, it must be at least 2")
    if asked > shortest.positions:
        raise UserError(f"evaluate: --max-length {asked} exceeds the context of {shortest.positions} tokens of the "
                        f"model in {shortest.folder}; set --max-length to {shortest.positions} at most")  # fmt: skip
    return asked


def score_pairs(model: Any, reference: Any | None, dataset: TokenizedSet, batch_size: int) -> PairScores:
    """Scores both sides of every pair under a transformers model, and under the reference if there is one."""
    tokens = np.stack([dataset.chosen_tokens, dataset.rejected_tokens], axis=1)
    return PairScores(
        logps=response_logps(model, dataset, batch_size),
        reference=None if reference is None else response_logps(reference, dataset, batch_size),
        tokens=tokens,
        where=[dataset.describe(i) for i in range(len(dataset))],
        dropped=list(dataset.dropped),
    )


@torch.inference_mode()
def response_logps(model: Any, dataset: TokenizedSet, batch_size: int) -> NDArray[np.float64]:
    """Returns the log-probs of the chosen and rejected responses in nats, summed over their tokens: fp64 [pairs, 2]."""
    lengths = dataset.prompt_tokens[:, None] + np.stack([dataset.chosen_tokens, dataset.rejected_tokens], axis=1)
    # batches of similar lengths, the longest first, so that too little memory shows at once
    order = np.argsort(-lengths, axis=None, kind="stable")
    found = np.zeros(lengths.size)
    with Meter("scoring pairs", lengths.size, "answers") as meter:
        for start in range(0, lengths.size, batch_size):
            jobs = order[start : start + batch_size]
            sequences = [_sequence(dataset, int(job)) for job in jobs]
            found[jobs] = _batch_logps(model, *zip(*sequences, strict=True))
            meter.advance(len(jobs))
    return found.reshape(lengths.shape)


def _sequence(dataset: TokenizedSet, job: int) -> tuple[NDArray[np.int32], int]:
    """Returns the token ids of prompt and response, and the prompt's length; jobs alternate chosen and rejected."""
    example = dataset.get(job // 2)
    return (example.rejected_ids if job % 2 else example.chosen_ids), example.prompt_length


def _batch_logps(model: Any, sequences: Sequence[NDArray[np.int32]], prompts: Sequence[int]) -> list[float]:
    """Returns the summed log-prob of each response; logits are computed only from the end of the shortest prompt on."""
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
