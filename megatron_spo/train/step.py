"""Runs the step that a schedule planned: the gradients of each pass, then one optimizer step."""

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from numpy.typing import NDArray
from torch import Tensor

from megatron_spo.config.losses import BF16_ROUNDING, ROUNDING
from megatron_spo.config.schema import LossConfig
from megatron_spo.config.spo import SpoConfig
from megatron_spo.data.loader import Batch, Loader
from megatron_spo.data.rows import PackedRow
from megatron_spo.model.experts import Load, balance, balancing
from megatron_spo.model.forward import run_rows
from megatron_spo.model.optimizer import Trainable
from megatron_spo.objective.losses import TRACKED, PairLogprobs, preference_losses, rewards, statistic_values
from megatron_spo.objective.schedules import ScheduleState, optimal_value
from megatron_spo.objective.statistics import LossStatistics
from megatron_spo.objective.step_plan import Add, Barrier, Pass, Role, StepPlan
from megatron_spo.objective.terms import GlobalCounts, objective
from megatron_spo.reference.sources import ReferenceSums
from megatron_spo.runtime.device import to_device
from megatron_spo.runtime.processes import Runtime
from megatron_spo.train import gradients
from megatron_spo.train.anomalies import BadStep
from megatron_spo.train.gradients import Gradient
from megatron_spo.train.metrics import SUMS, Measured, PairValues, named_metrics, reduce_sums, row_sums
from megatron_spo.train.state import TrainState


@dataclass(frozen=True)
class DataInUse:
    """A data set's loader, and the reference's log-probs of its pairs if they are available."""

    name: str
    loader: Loader
    reference: ReferenceSums | None


@dataclass(frozen=True)
class Share:
    """A batch of a data set as part of an objective: the terms it feeds (`role`) are divided by `counts`."""

    data: DataInUse
    batch: Batch
    role: Role
    counts: GlobalCounts

    @classmethod
    def of(cls, data: DataInUse, batch: Batch, role: Role) -> "Share":
        """Returns the share of a whole global batch, which is divided by its own counts."""
        return cls(data, batch, role, GlobalCounts(batch.pairs, batch.chosen_tokens))

    def prepare(self) -> None:
        """Makes the reference's log-probs available; call it before the first pass over the batch."""
        if self.data.reference is not None:
            self.data.reference.prepare(self.batch.rows)


@dataclass(frozen=True)
class Outcome:
    """Result of a step: the pairs' global sums (train/metrics.py), the step's metrics by name, and the load of the
    routers if they are balanced."""

    sums: dict[str, float]
    metrics: dict[str, float]
    router_load: Load | None


class Engine:
    """Runs passes over global batches, in any layout."""

    def __init__(
        self, trainable: Trainable, runtime: Runtime, *, loss: LossConfig, spo: SpoConfig, router_aux_loss: float
    ) -> None:
        self._trainable, self._runtime, self._router_aux_loss = trainable, runtime, router_aux_loss
        self._losses, self._spo = loss.terms(), spo
        self._rounding = BF16_ROUNDING if trainable.config.bf16 else ROUNDING
        self._needs_reference = bool(loss.needing_reference)
        self.keeps_statistics = any(name in TRACKED for name in loss.names)
        reduce_gradients = trainable.config.finalize_model_grads_func

        def finalize(*arguments: Any, **keywords: Any) -> None:
            with runtime.clock.phase("communication"):
                reduce_gradients(*arguments, **keywords)

        trainable.config.finalize_model_grads_func = finalize

    def train_step(
        self,
        plan: StepPlan,
        pairs: Share,
        sft: Share | None,
        *,
        state: TrainState,
        lr: float,
        largest_norm: float = math.inf,
    ) -> Outcome:
        """Runs one optimizer step as planned. The metrics are measured at the weights before the step.

        Args:
            plan: the passes of the step and how their gradients are combined.
            pairs: the global batch of training pairs.
            sft: the global batch of the separate SFT set, if there is one. A pass runs only the rows that it weighs; a
                set that no pass at the current weights weighs is measured by an extra forward pass.
            state: the training state before the step.
            lr: the learning rate.
            largest_norm: the largest gradient norm with which the step is taken.

        Raises:
            BadStep: on every rank, before weights or optimizer are changed: a number is not finite, or the gradient
                norm exceeds `largest_norm`.
        """
        shares, clock = [pairs] if sft is None else [pairs, sft], self._runtime.clock
        for share in shares:
            share.prepare()
        sums = self._measure_idle(plan, shares, state.statistics)
        taken: dict[str, Gradient] = {}
        for pass_ in plan.passes:
            gradients.clear(self._trainable)
            weighed = [share for share in shares if pass_.weighs(share.role)]
            balanced = self._balancing(weighed, state) if pass_ is plan.upper else nullcontext()
            with self._weights_of(pass_, taken), balanced:
                swept = self._sweep(pass_, weighed, statistics=state.statistics, backward=True)
            with clock.phase("optimizer"):
                self._trainable.optimizer.prepare_grads()
                if plan.combine is not None:
                    taken[pass_.slot] = gradients.take(self._trainable)
            if pass_.shift is None:
                sums = swept | sums
        with clock.phase("optimizer"):
            lambda_ = self._combine(plan, taken)
        measured = [self._measured(share, sums[share.data.name]) for share in shares]
        metrics = self._named(measured[0], measured[-1], state.schedule.saw(measured[-1].sft_loss))
        if len(plan.passes) > 1:
            metrics["loss"] = metrics["loss/preference"] + lambda_ * metrics["loss/sft"]
        with clock.phase("optimizer"):
            metrics["grad_norm"] = self._apply(lr, shares, largest_norm)
        metrics |= {"learning_rate": lr, "spo/lambda": lambda_}
        if not self._router_aux_loss:
            return Outcome(measured[0].sums, metrics, None)
        load, metrics["loss/router_aux"] = balance(self._trainable.chunks, self._trainable.config.num_layers)
        return Outcome(measured[0].sums, metrics, load)

    def _measure_idle(
        self, plan: StepPlan, shares: Sequence[Share], statistics: LossStatistics
    ) -> dict[str, dict[str, float]]:
        """Returns the sums of the sets that no pass at the current weights weighs, by name of the set."""
        present = [pass_ for pass_ in plan.passes if pass_.shift is None]
        idle = [share for share in shares if not any(pass_.weighs(share.role) for pass_ in present)]
        return self._sweep(present[0], idle, statistics=statistics, backward=False) if idle else {}

    def _weights_of(self, pass_: Pass, taken: dict[str, Gradient]) -> AbstractContextManager[None]:
        """Sets the weights for a pass: the current ones, or shifted along an earlier pass's gradient."""
        if pass_.shift is None:
            return nullcontext()
        return gradients.shifted(self._trainable, taken[pass_.shift.slot], pass_.shift.step)

    def _balancing(self, shares: Sequence[Share], state: TrainState) -> AbstractContextManager[None]:
        """Adds the load-balancing loss of all shares' rows to the objective of a pass."""
        if not self._router_aux_loss:
            return nullcontext()
        tokens = sum(share.batch.tokens for share in shares)
        rows = sum(len(share.batch.rows) for share in shares)
        # Megatron divides this loss like the objective, see run_rows.
        scale = self._router_aux_loss / tokens * rows * self._runtime.topology.data
        return balancing(self._trainable.chunks, state.router_load, scale)

    def _combine(self, plan: StepPlan, taken: dict[str, Gradient]) -> float:
        """Combines the passes' gradients into the optimizer's gradient; returns the weight of the SFT term."""
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

    def evaluate(self, pass_: Pass, data: DataInUse, *, state: TrainState) -> tuple[dict[str, float], Tensor | None]:
        """Evaluates a whole set with the current weights; its chosen responses are the lower level.

        Returns:
            The metrics by name, and each pair's shifts: fp64 [rows, 2], log-probs of chosen and rejected minus the
            reference's (nats); None without a reference.

        Raises:
            BadStep: on every rank, if a number is not finite.
        """
        dataset = data.loader.dataset
        counts = GlobalCounts(len(dataset), int(dataset.chosen_tokens.sum()))
        totals = dict.fromkeys(SUMS, 0.0)
        shifts = None
        if data.reference is not None:
            shifts = torch.zeros(len(dataset), 2, dtype=torch.float64, device=self._runtime.device)
        for batch in data.loader.eval_batches():
            share = Share(data, batch, Role.BOTH, counts)
            share.prepare()
            sums = self._sweep(pass_, [share], statistics=state.statistics, backward=False, per_pair=shifts)[data.name]
            totals = {name: totals[name] + sums[name] for name in SUMS}
        if shifts is not None:
            dist.all_reduce(shifts)
        measured = self._measured(share, totals)
        return self._named(measured, measured, state.schedule), shifts

    def _sweep(
        self,
        pass_: Pass,
        shares: Sequence[Share],
        *,
        statistics: LossStatistics,
        backward: bool,
        per_pair: Tensor | None = None,
    ) -> dict[str, dict[str, float]]:
        """Runs one pass over the rows of all shares in one run of the pipeline; returns global sums by name of the set.

        `per_pair` [rows of the set, 2] receives the shifts of the pairs that this rank reports.
        """
        owners = {id(row): share for share in shares for row in share.batch.rows}

        def row_objective(row: PackedRow, sums: Tensor) -> tuple[Tensor, Tensor]:
            share = owners[id(row)]
            pairs = _pair_logprobs(row, sums[..., 0], share.data.reference)
            if per_pair is not None and self._runtime.holds_results:
                shifts = torch.stack([pairs.chosen_ratio, pairs.rejected_ratio], 1).detach().double()
                per_pair.index_copy_(0, to_device(row.pairs, per_pair.device), shifts)
            value, _ = objective(
                pairs,
                pass_,
                losses=self._losses,
                spo=self._spo,
                counts=share.counts,
                statistics=statistics,
                role=share.role,
            )
            values = self._values(pairs, sums[..., 1].detach(), share.data, statistics)
            return value, row_sums(value, values, self._rounding)

        rows = [row for share in shares for row in share.batch.rows]
        per_row = run_rows(self._trainable.wrapped, rows, row_objective, runtime=self._runtime, backward=backward)
        swept, suspects = {}, []
        for share in shares:
            own, per_row = per_row[: len(share.batch.rows)], per_row[len(share.batch.rows) :]
            sums = reduce_sums(own, runtime=self._runtime)
            swept[share.data.name] = sums
            if not all(math.isfinite(value) for value in sums.values()):
                bad = [row for row, values in zip(share.batch.rows, own, strict=False) if not values.isfinite().all()]
                suspects.append((share, [int(i) for row in bad for i in row.pairs]))
        if suspects:
            raise self._non_finite(suspects)
        return swept

    def _values(
        self, pairs: PairLogprobs, entropies: Tensor, data: DataInUse, statistics: LossStatistics
    ) -> PairValues:
        """Returns the values of a row that are measured in every pass: preference loss and rewards, if they exist."""
        if not data.loader.dataset.has_rejected or (self._needs_reference and data.reference is None):
            return PairValues(pairs, entropies, None, None, None, rewards_are_ratios=False)
        with torch.no_grad():
            return PairValues(
                pairs,
                entropies,
                preference_losses(self._losses, pairs, statistics),
                rewards(self._losses, pairs),
                statistic_values(self._losses, pairs),
                rewards_are_ratios=all(term.spec.needs_reference for term in self._losses),
            )

    def _apply(self, lr: float, shares: Sequence[Share], largest_norm: float) -> float:
        """Clips the gradient and steps the optimizer; returns the gradient norm before clipping."""
        optimizer = self._trainable.optimizer
        norm = gradients.norm(self._trainable)
        if not norm <= largest_norm or math.isinf(norm):  # the same norm on all ranks; NaN compares false
            spike = f"the gradient's norm {norm:.4g} exceeds {largest_norm:.4g} (training.spike_factor)"
            reason = spike if math.isfinite(norm) else "the gradient is not a finite number"
            rows = [share.data.loader.dataset.describe(int(i)) for share in shares for i in share.batch.indices]
            raise BadStep(_names(shares), reason, rows)
        for inner in optimizer.chained_optimizers:
            for group in inner.optimizer.param_groups:
                group["lr"] = lr
            if inner.config.clip_grad > 0 and inner.get_parameters():
                clip_grad_by_total_norm_fp32(inner.get_parameters(), max_norm=inner.config.clip_grad, total_norm=norm)
        optimizer.step_with_ready_grads()
        return norm

    def _non_finite(self, suspects: Sequence[tuple[Share, Sequence[int]]]) -> BadStep:
        """Returns the error that names the bad rows of all ranks; every rank must call it, with its own rows."""
        gathered: list[list[list[int]]] = [[] for _ in range(dist.get_world_size())]
        mine = [list(rows) if self._runtime.holds_results else [] for _, rows in suspects]
        dist.all_gather_object(gathered, mine)
        named = [
            share.data.loader.dataset.describe(index)
            for (share, _), parts in zip(suspects, zip(*gathered, strict=True), strict=True)
            for index in sorted({index for part in parts for index in part})
        ]
        return BadStep(_names([share for share, _ in suspects]), "the loss is not a finite number", named)

    def _measured(self, share: Share, sums: dict[str, float]) -> Measured:
        reference = share.data.reference is not None
        return Measured(
            sums,
            share.counts,
            reference=reference,
            rejected=share.data.loader.dataset.has_rejected,
            rewarded=reference or not self._needs_reference,
        )

    def _named(self, pairs: Measured, lower: Measured, schedule: ScheduleState) -> dict[str, float]:
        return named_metrics(pairs, lower, v=optimal_value(self._spo, schedule, lower.reference_sft_loss))


def _pair_logprobs(row: PackedRow, sums: Tensor, reference: ReferenceSums | None) -> PairLogprobs:
    """Returns the row's pairs with the policy's sums [pairs, 2] and the reference's sums, if available."""

    def put(array: NDArray[np.generic]) -> Tensor:
        return to_device(array, sums.device, torch.float32)

    chosen, rejected = (None, None) if reference is None else reference.of(row).unbind(1)
    return PairLogprobs(
        chosen=sums[:, 0],
        rejected=sums[:, 1],
        chosen_tokens=put(row.chosen_tokens),
        rejected_tokens=put(row.rejected_tokens),
        reference_chosen=chosen,
        reference_rejected=rejected,
    )


def _names(shares: Sequence[Share]) -> str:
    return " and ".join(share.data.name for share in shares)
