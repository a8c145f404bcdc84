"""Pairs and settings shared by the tests of the objective."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from megatron_spo.config.losses import LOSS_SPECS, LossTerm
from megatron_spo.config.spo import SpoConfig
from megatron_spo.objective.losses import PairLogprobs
from megatron_spo.objective.statistics import LossStatistics

STATISTICS = LossStatistics().update(total=2.0, total_of_squares=3.0, count=4)


def spo_config(**keys: Any) -> SpoConfig:
    """Returns section `spo` with these keys; lambda has its Python name."""
    return SpoConfig(**keys)


def make_pairs(
    chosen: list[float] | Tensor,
    rejected: list[float] | Tensor,
    tokens: tuple[list[int], list[int]],
    reference: tuple[list[float], list[float]] | None = None,
    dtype: torch.dtype = torch.float64,
) -> PairLogprobs:
    """Returns pairs whose policy log-probs are leaf tensors."""
    policy = [torch.as_tensor(x, dtype=dtype).clone().requires_grad_() for x in (chosen, rejected)]
    counts = [torch.tensor(n, dtype=dtype) for n in tokens]
    frozen = [torch.tensor(x, dtype=dtype) for x in reference] if reference else [None, None]
    return PairLogprobs(policy[0], policy[1], counts[0], counts[1], frozen[0], frozen[1])


def random_pairs(count: int, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> PairLogprobs:
    """Returns pairs of 1 to 12 tokens with log-probs of a few nats per token and a reference tenths of a nat away."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(1, 13, (2, count), generator=generator).double()
    reference = -tokens * (0.1 + 2 * torch.rand(2, count, generator=generator, dtype=torch.float64))
    moved = tokens.sqrt() * torch.randn(2, count, generator=generator, dtype=torch.float64)
    policy = torch.minimum(reference + moved, -0.05 * tokens)
    lists = (reference[0].tolist(), reference[1].tolist())
    sizes = (tokens[0].int().tolist(), tokens[1].int().tolist())
    return make_pairs(policy[0], policy[1], sizes, lists, dtype)


def defaults(name: str, **changes: float | bool) -> dict[str, float | bool]:
    """Returns the default parameters of a loss, with changes."""
    return {**LOSS_SPECS[name].parameters, **changes}


def only(name: str, parameters: Mapping[str, float | bool] | None = None, *, weight: float = 1.0) -> tuple[LossTerm]:
    """Returns one loss as the upper level, with its default parameters if none are given."""
    return (LossTerm(LOSS_SPECS[name], weight, defaults(name) if parameters is None else parameters),)
