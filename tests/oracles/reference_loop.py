"""A training loop in plain transformers and torch, with which trajectories are compared.

It uses one process, fp32 and one response per forward pass, without packing, padding, shared prefixes or a cache.
Everything is computed directly from formulas in this file. It imports nothing of the tested package.
"""

import copy
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, PreTrainedModel

TokenisedPair = tuple[Sequence[int], Sequence[int], Sequence[int]]


def response_logprob(model: torch.nn.Module, prompt: Sequence[int], response: Sequence[int]) -> Tensor:
    """Returns the log-prob of `response` after `prompt`, summed over its tokens (nats, scalar)."""
    tokens = torch.tensor([[*prompt, *response]])
    logits = model(input_ids=tokens, use_cache=False).logits[0, len(prompt) - 1 : -1]
    return -cross_entropy(logits.float(), tokens[0, len(prompt) :], reduction="sum")


def _softplus(x: Tensor) -> Tensor:
    """log(1 + exp(x))."""
    return torch.logaddexp(x, torch.zeros_like(x))


def _preference(
    loss: str,
    policy: Tensor,
    reference: Tensor,
    counts: Tensor,
    beta: float,
    gamma_beta_ratio: float,
    average: bool,
) -> Tensor:
    """Returns the loss of each pair; the tensors are [pairs, 2], chosen first."""
    ratio = policy - reference
    if loss == "dpo":
        return _softplus(-beta * (ratio[:, 0] - ratio[:, 1]))
    if loss == "simpo":
        mean = policy / counts
        return _softplus(beta * gamma_beta_ratio - beta * (mean[:, 0] - mean[:, 1]))
    if loss == "ipo":
        scaled = ratio / counts if average else ratio
        return torch.square(scaled[:, 0] - scaled[:, 1] - 0.5 / beta)
    raise ValueError(f"no formula for {loss}")


def _penalty(loss: str, policy: Tensor, counts: Tensor, beta: float, unit: str) -> Tensor:
    """Returns the term that lambda multiplies: g per chosen token, or beta times the loss's chosen statistic."""
    if unit == "token":
        return -policy[:, 0].sum() / counts[:, 0].sum()
    if unit == "relative" and loss == "dpo":
        return -beta * policy[:, 0].mean()
    if unit == "relative" and loss == "simpo":
        return -beta * (policy[:, 0] / counts[:, 0]).mean()
    raise ValueError(f"no unit {unit} for {loss}")


def _metrics(loss: str, policy: Tensor, reference: Tensor, counts: Tensor, beta: float) -> dict[str, float]:
    ratio = policy - reference
    rewards = beta * (policy / counts if loss == "simpo" else ratio)
    margin = rewards[:, 0] - rewards[:, 1]
    sft = -policy[:, 0].sum() / counts[:, 0].sum()
    values = {
        "loss/sft": sft,
        "spo/gap": sft + reference[:, 0].sum() / counts[:, 0].sum(),
        "spo/chosen_shift": ratio[:, 0].mean(),
        "spo/rejected_shift": ratio[:, 1].mean(),
        "spo/both_down": (ratio < 0).all(dim=1).float().mean(),
        "logps/chosen": policy[:, 0].mean(),
        "logps/rejected": policy[:, 1].mean(),
        "rewards/chosen": rewards[:, 0].mean(),
        "rewards/rejected": rewards[:, 1].mean(),
        "rewards/margins": margin.mean(),
        "rewards/accuracies": ((1 + margin.sign()) / 2).mean(),
    }
    return {name: value.item() for name, value in values.items()}


def _logprobs(model: PreTrainedModel, batch: Sequence[TokenisedPair]) -> Tensor:
    pairs = [[response_logprob(model, prompt, response) for response in both] for prompt, *both in batch]
    return torch.stack([torch.stack(pair) for pair in pairs])


def reference_trajectory(
    model_dir: str | Path,
    batches: Sequence[Sequence[TokenisedPair]],
    *,
    loss: str = "dpo",
    beta: float = 0.1,
    gamma_beta_ratio: float = 0.0,
    average: bool = True,
    schedule: str = "none",
    lam: float = 0.0,
    lambda_unit: str = "token",
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    clip: float = 1.0,
    final_weights: dict[str, Tensor] | None = None,
    adapter: Path | None = None,
) -> list[dict[str, float]]:
    """Trains the model of `model_dir`, which is also the reference, with one optimizer step per batch.

    Args:
        model_dir: a Hugging Face folder; it is not changed.
        batches: the pairs of each step as token ids (prompt, chosen, rejected), the responses with their
            end-of-turn token. The whole batch is one step, whatever its size.
        loss, beta, gamma_beta_ratio, average: dpo, simpo (`gamma_beta_ratio`) or ipo (`average` per token).
        schedule: none, sft (g alone) or penalty (f + `lam` times g, or the term of `lambda_unit` relative).
        lr, betas, eps: AdamW, constant rate, no weight decay.
        clip: largest gradient norm; 0 switches clipping off.
        final_weights: filled with the trained parameters if given.
        adapter: a PEFT folder; its adapters are then trained instead of the model.

    Returns:
        One dict per step with the metric names of metrics.jsonl. `loss` is the optimised value (v not
        subtracted), `grad_norm` is taken before clipping; everything is measured before the step's update.
        Under `sft` there is no `loss/preference`.
    """
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32, attn_implementation="eager")
    reference_model = copy.deepcopy(model).eval()
    if adapter is not None:
        model = PeftModel.from_pretrained(model, str(adapter), is_trainable=True)
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr, betas=betas, eps=eps, weight_decay=0.0)
    trajectory = []
    for batch in batches:
        counts = torch.tensor([[float(len(chosen)), float(len(rejected))] for _, chosen, rejected in batch])
        policy = _logprobs(model, batch)
        with torch.no_grad():
            reference = _logprobs(reference_model, batch)
        metrics = _metrics(loss, policy.detach(), reference, counts, beta)
        if schedule == "sft":
            objective = _penalty(loss, policy, counts, beta, "token")
        else:
            objective = _preference(loss, policy, reference, counts, beta, gamma_beta_ratio, average).mean()
            metrics["loss/preference"] = objective.item()
        if schedule == "penalty":
            objective = objective + lam * _penalty(loss, policy, counts, beta, lambda_unit)
        optimizer.zero_grad()
        objective.backward()
        norm = torch.nn.utils.clip_grad_norm_(trained, clip or math.inf)
        optimizer.step()
        trajectory.append({"loss": objective.item(), "grad_norm": norm.item(), **metrics})
    if final_weights is not None:
        final_weights.update({name: value.detach().clone() for name, value in model.state_dict().items()})
    return trajectory
