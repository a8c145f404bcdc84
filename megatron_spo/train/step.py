"""Runs what a schedule planned: gradients of each pass, then one optimizer step."""

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from numpy.typing import NDArray
from torch import Tensor

from megatron_spo.config.schema import LossConfig, SpoConfig
from megatron_spo.data.loader import Batch, Loader
from megatron_spo.data.reference_store import ReferenceStore
from megatron_spo.data.rows import PackedRow
from megatron_spo.model.wrap import Trainable
from megatron_spo.objective.losses import TRACKED, PairLogprobs, preference_losses, rewards, statistic_values
from megatron_spo.objective.plan import Add, Barrier, Pass, StepPlan
from megatron_spo.objective.statistics import LossStatistics
from megatron_spo.objective.terms import GlobalCounts, objective
from megatron_spo.runtime.processes import Runtime
from megatron_spo.train import gradients
from megatron_spo.train.anomalies import BadStep
from megatron_spo.train.forward import run_rows
from megatron_spo.train.gradients import Gradient
from megatron_spo.train.metrics import SUMS, PairValues, named_metrics, reduce_sums, row_sums


@dataclass(frozen=True)
class DataInUse:
    """A loader with what is needed to score its pairs: the reference's log-probs, where there is a cache."""

    name: str
    loader: Loader
    reference: ReferenceStore | None


@dataclass(frozen=True)
class Outcome:
    """What one sweep over a global batch gave: global sums (train/metrics.py) and the named metrics made of them."""

    sums: dict[str, float]
    metrics: dict[str, float]


class Engine:
    """Carries out passes over global batches, in any layout."""

    def __init__(self, trainable: Trainable, runtime: Runtime, *, loss: LossConfig, spo: SpoConfig) -> None:
        self._trainable, self._runtime = trainable, runtime
        self._loss, self._spo = loss, spo
        self._parameters = loss.parameters()
        self.keeps_statistics = loss.name in TRACKED

    def train_step(
        self,
        plan: StepPlan,
        data: DataInUse,
        batch: Batch,
        *,
        statistics: LossStatistics,
        lr: float,
        largest_norm: float = math.inf,
    ) -> Outcome:
        """One optimizer step as planned; the metrics are measured in its first pass, at the present weights.

        Raises:
            BadStep: on every rank, before weights or optimizer are changed: a number is not finite, or the gradient's
                norm exceeds `largest_norm`.
        """
        counts = GlobalCounts(batch.pairs, batch.chosen_tokens)
        sums: dict[str, float] = {}
        taken: dict[str, Gradient] = {}
        for pass_ in plan.passes:
            gradients.clear(self._trainable)
            with self._weights_of(pass_, taken):
                swept = self._sweep(pass_, data, batch, counts=counts, statistics=statistics, backward=True)
            self._trainable.optimizer.prepare_grads()
            if plan.combine is not None:
                taken[pass_.slot] = gradients.take(self._trainable)
            sums = sums or swept
        lambda_ = self._combine(plan, taken)
        metrics = self._named(sums, data, counts)
        if len(plan.passes) > 1:
            metrics["loss"] = metrics["loss/preference"] + lambda_ * metrics["loss/sft"]
        metrics |= {"grad_norm": self._apply(lr, data, batch, largest_norm), "learning_rate": lr, "spo/lambda": lambda_}
        return Outcome(sums, metrics)

    def _weights_of(self, pass_: Pass, taken: dict[str, Gradient]) -> AbstractContextManager[None]:
        """The weights at which a pass is taken: the present ones, or shifted along an earlier pass's gradient."""
        if pass_.shift is None:
            return nullcontext()
        return gradients.shifted(self._trainable, taken[pass_.shift.slot], pass_.shift.step)

    def _combine(self, plan: StepPlan, taken: dict[str, Gradient]) -> float:
        """Give the optimizer the gradient that the plan makes of its passes; returns the weight of the SFT term."""
        if isinstance(plan.combine, Add):
            gradients.give(self._trainable, [(weight, taken[slot]) for slot, weight in plan.combine.parts])
        if isinstance(plan.combine, Barrier):
            f, g = taken[plan.combine.f], taken[plan.combine.g]
            squared = gradients.dot(self._trainable, g, g)
            lacking = plan.combine.rate - gradients.dot(self._trainable, f, g)
            lambda_ = max(0.0, lacking / squared) if squared > 0 else 0.0
            gradients.give(self._trainable, [(1.0, f), (lambda_, g)])
            return lambda_
        return plan.lambda_

    def evaluate(self, pass_: Pass, data: DataInUse, *, statistics: LossStatistics) -> dict[str, float]:
        """Metrics of a whole set under the present weights; nothing is changed.

        Raises:
            BadStep: on every rank.
        """
        dataset = data.loader.dataset
        counts = GlobalCounts(len(dataset), int(dataset.chosen_tokens.sum()))
        totals = dict.fromkeys(SUMS, 0.0)
        for batch in data.loader.eval_batches():
            sums = self._sweep(pass_, data, batch, counts=counts, statistics=statistics, backward=False)
            totals = {name: totals[name] + sums[name] for name in SUMS}
        return self._named(totals, data, counts)

    def _sweep(
        self,
        pass_: Pass,
        data: DataInUse,
        batch: Batch,
        *,
        counts: GlobalCounts,
        statistics: LossStatistics,
        backward: bool,
    ) -> dict[str, float]:
        """Global sums of one pass over one batch; `counts` are what the objective divides by."""

        def row_objective(row: PackedRow, sums: Tensor) -> tuple[Tensor, Tensor]:
            pairs = _pair_logprobs(row, sums, data.reference)
            value, _ = objective(
                pairs,
                pass_,
                loss_name=self._loss.name,
                parameters=self._parameters,
                spo=self._spo,
                counts=counts,
                statistics=statistics,
            )
            return value, row_sums(value, self._values(pairs, data, statistics))

        per_row = run_rows(self._trainable.wrapped, batch.rows, row_objective, runtime=self._runtime, backward=backward)
        sums = reduce_sums(per_row, device=self._runtime.device, contributes=self._runtime.holds_results)
        if not all(math.isfinite(value) for value in sums.values()):
            bad = [row for row, values in zip(batch.rows, per_row, strict=False) if not torch.isfinite(values).all()]
            raise self._non_finite(data, [int(i) for row in bad for i in row.pairs])
        return sums

    def _values(self, pairs: PairLogprobs, data: DataInUse, statistics: LossStatistics) -> PairValues:
        """What is measured of a row whatever the pass: the preference loss and the rewards, where they exist."""
        if not data.loader.dataset.has_rejected or (self._loss.spec.needs_reference and data.reference is None):
            return PairValues(pairs, None, None, None, rewards_are_ratios=False)
        with torch.no_grad():
            return PairValues(
                pairs,
                preference_losses(self._loss.name, pairs, self._parameters, statistics),
                rewards(self._loss.name, pairs, self._parameters),
                statistic_values(self._loss.name, pairs),
                rewards_are_ratios=self._loss.spec.needs_reference,
            )

    def _apply(self, lr: float, data: DataInUse, batch: Batch, largest_norm: float) -> float:
        """Clip and step the optimizer; returns the gradient's norm before clipping."""
        optimizer = self._trainable.optimizer
        norm = float(optimizer.get_grad_norm())
        if not norm <= largest_norm or math.isinf(norm):  # all ranks hold the same reduced norm; NaN compares false
            spike = f"the gradient's norm {norm:.4g} exceeds {largest_norm:.4g} (training.spike_factor)"
            reason = spike if math.isfinite(norm) else "the gradient is not a finite number"
            raise BadStep(data.name, reason, [data.loader.dataset.describe(int(i)) for i in batch.indices])
        for inner in optimizer.chained_optimizers:
            for group in inner.optimizer.param_groups:
                group["lr"] = lr
            if inner.config.clip_grad > 0 and inner.get_parameters():
                clip_grad_by_total_norm_fp32(inner.get_parameters(), max_norm=inner.config.clip_grad, total_norm=norm)
        optimizer.step_with_ready_grads()
        return norm

    def _non_finite(self, data: DataInUse, suspects: Sequence[int]) -> BadStep:
        """The error that names the pairs of all ranks; every rank must ask for it."""
        gathered: list[list[int]] = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(gathered, list(suspects) if self._runtime.holds_results else [])
        pairs = sorted({index for part in gathered for index in part})
        described = [data.loader.dataset.describe(index) for index in pairs]
        return BadStep(data.name, "the loss is not a finite number", described)

    def _named(self, sums: dict[str, float], data: DataInUse, counts: GlobalCounts) -> dict[str, float]:
        rewarded = data.reference is not None or not self._loss.spec.needs_reference
        return named_metrics(
            sums,
            counts=counts,
            v=self._spo.v,
            reference=data.reference is not None,
            rejected=data.loader.dataset.has_rejected,
            rewarded=rewarded,
        )


def _pair_logprobs(row: PackedRow, sums: Tensor, reference: ReferenceStore | None) -> PairLogprobs:
    """The row's pairs with policy sums [pairs, 2] and the reference's sums from the cache, where there is one."""

    def put(array: NDArray[np.generic]) -> Tensor:
        return torch.from_numpy(array.astype(np.float32)).to(sums.device)

    chosen, rejected = (None, None) if reference is None else map(put, reference.get(row.pairs))
    return PairLogprobs(
        chosen=sums[:, 0],
        rejected=sums[:, 1],
        chosen_tokens=put(row.chosen_tokens),
        rejected_tokens=put(row.rejected_tokens),
        reference_chosen=chosen,
        reference_rejected=rejected,
    )
