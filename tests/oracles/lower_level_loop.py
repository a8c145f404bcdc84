"""A training loop with the lower level in plain transformers and torch: a separate SFT set, the schedule `dual`,
several losses.

As in reference_loop.py, everything is computed directly, one response per forward pass, from formulas in this file.
Nothing of the tested package is imported.
"""

import copy
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import softplus
from transformers import AutoModelForCausalLM, PreTrainedModel

from tests.oracles.reference_loop import TokenisedPair, response_logprob

SftRow = tuple[Sequence[int], Sequence[int]]
EPSILON, DUAL_LR, SMOOTHING = 0.01, 3.0, 0.9
"""Parameters of the schedule `dual`."""


def lower_level_trajectory(
    model_dir: str | Path,
    batches: Sequence[Sequence[TokenisedPair]],
    sft_batches: Sequence[Sequence[SftRow]] | None,
    *,
    losses: Sequence[tuple[str, float, float]],
    schedule: str,
    lam: float,
    unit: str,
    running_min: bool = False,
) -> list[dict[str, float]]:
    """Takes one AdamW step (lr 1e-3, no clipping) per batch; the model of `model_dir` is also the reference.

    Args:
        batches, sft_batches: pairs (prompt, chosen, rejected) and SFT rows (prompt, response) of each step as token
            ids; None uses the chosen responses as SFT rows.
        losses: (dpo or simpo, weight, beta); simpo's margin is 0.3 beta.
        schedule, lam, unit: penalty with constant lambda, or dual starting at it; token or relative.
        running_min: v is the lowest SFT loss so far instead of the reference's.
    """
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32, attn_implementation="eager")
    frozen = copy.deepcopy(model).eval()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    average, best, lines = None, float("inf"), []
    for step, batch in enumerate(batches):
        rows = [(prompt, chosen) for prompt, chosen, _ in batch] if sft_batches is None else sft_batches[step]
        policy, reference, counts = _pairs(model, batch), _pairs(frozen, batch).detach(), _lengths(batch)
        preference, rewards = torch.zeros(()), torch.zeros(len(batch), 2)
        for name, weight, beta in losses:
            values = beta * (policy - reference if name == "dpo" else policy / counts)
            margin = values[:, 0] - values[:, 1] - (0.3 * beta if name == "simpo" else 0.0)
            preference = preference + weight * softplus(-margin).mean()
            rewards += weight * values.detach()
        sums, old = _sums(model, rows), _sums(frozen, rows).detach()
        lengths = torch.tensor([float(len(response)) for _, response in rows])
        g = -sums.sum() / lengths.sum()
        best = min(best, g.item())
        gap = g.item() - (best if running_min else -old.sum().item() / lengths.sum().item())
        term = g
        if unit == "relative":
            parts = [w * b * (sums if name == "dpo" else sums / lengths).mean() for name, w, b in losses]
            term = -torch.stack(parts).sum()
        objective = preference + lam * term
        optimizer.zero_grad()
        objective.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), float("inf"))
        optimizer.step()
        lines.append(
            {
                "loss": objective.item(),
                "loss/preference": preference.item(),
                "loss/sft": g.item(),
                "spo/gap": gap,
                "spo/lambda": lam,
                "grad_norm": norm.item(),
                "rewards/margins": (rewards[:, 0] - rewards[:, 1]).mean().item(),
                "spo/chosen_shift": (policy - reference)[:, 0].mean().item(),
                "logps/chosen": policy[:, 0].mean().item(),
            }
        )
        if schedule == "dual":
            average = gap if average is None else SMOOTHING * average + (1 - SMOOTHING) * gap
            lam = min(max(lam + DUAL_LR * (average - EPSILON), 0.0), 10.0)
    return lines


def _pairs(model: PreTrainedModel, batch: Sequence[TokenisedPair]) -> Tensor:
    """Returns log-probs [pairs, 2], chosen first."""
    return torch.stack([_sums(model, [(prompt, side) for side in both]) for prompt, *both in batch])


def _sums(model: PreTrainedModel, rows: Sequence[SftRow]) -> Tensor:
    return torch.stack([response_logprob(model, prompt, response) for prompt, response in rows])


def _lengths(batch: Sequence[TokenisedPair]) -> Tensor:
    return torch.tensor([[float(len(side)) for side in both] for _, *both in batch])
