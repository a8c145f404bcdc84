"""Runs the training step of one rank of a layout on fake tensors, without its GPU and without the other ranks.

The model, Megatron's data parallelism and optimizer, and the step are those of a training run (train/run.py). The
tensors have no data (watch.py), communication returns at once (exchange.py), and a few kernels are replaced
(kernels.py, experts.py, engine.py).
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING
from unittest.mock import patch

import numpy as np
import torch

import megatron_spo.runtime.megatron_import  # noqa: F401  (before the modules that import Megatron)
from megatron_spo.config.topology import Topology, make_topology
from megatron_spo.data.loader import Batch
from megatron_spo.data.rows import PackedRow
from megatron_spo.errors import UserError
from megatron_spo.model.build import PairModel
from megatron_spo.model.optimizer import Trainable
from megatron_spo.planner.layouts import PlannedRun
from megatron_spo.planner.rows import RowSize, segments_of
from megatron_spo.prepare import SFT, TRAIN, make_loader
from megatron_spo.reference.cache import RECORD, ReferenceStore
from megatron_spo.rehearsal.exchange import groups_by_name, lonely_objects, pipeline_messages
from megatron_spo.rehearsal.inputs import PairsOfLengths
from megatron_spo.rehearsal.kernels import compiled, converted
from megatron_spo.rehearsal.watch import Exchange, GpuBranches, Watch, watching_lists
from megatron_spo.rehearsal.weights import as_rank
from megatron_spo.runtime.clock import Clock
from megatron_spo.runtime.processes import Runtime
from megatron_spo.runtime.progress import Progress

if TYPE_CHECKING:
    from megatron_spo.train.step import DataInUse


@dataclass(frozen=True)
class StepReport:
    """What the step of one rank did.

    Attributes:
        rank, stage: the rank, and its pipeline stage.
        rows: sizes of the rank's rows.
        weights, gradients, optimizer: bytes before the step.
        peak, at_peak: most bytes at any time, and in which operator of which function.
        calls, sent: number of calls and bytes of each exchange of the step.
        waits: number of times that the process waited for the GPU in the step, by (what, where).
    """

    rank: int
    stage: int
    rows: Sequence[RowSize]
    weights: int
    gradients: int
    optimizer: int
    peak: int
    at_peak: str
    calls: Mapping[Exchange, int]
    sent: Mapping[Exchange, int]
    waits: Mapping[tuple[str, str], int]

    @property
    def static(self) -> int:
        """Bytes of weights, gradients and optimizer."""
        return self.weights + self.gradients + self.optimizer


def rehearse_step(job: PlannedRun, rank: int) -> StepReport:
    """Builds the model and optimizer of a rank and runs its first step; needs a process without process groups.

    Raises:
        UserError: this version of torch cannot rehearse a step.
    """
    if not hasattr(torch._C._distributed_c10d, "FakeWork"):
        raise UserError(f"the rehearsal of a step requires torch 2.13 or newer, this is {torch.__version__}")
    topology, experts = make_topology(job.config.parallel, job.gpus), job.shape.experts
    with as_rank(rank, topology):
        from megatron.core import parallel_state

        from megatron_spo.rehearsal.experts import dispatch_evenly

        watch = Watch(groups_by_name(), selected=experts.per_token if experts else 0)
        runtime = _runtime(topology, rank)
        data = _data(job, runtime)
        rows = [row for _, batch in data for row in batch.rows]
        with _on_fake_gpu(watch, job):
            chunks = _build(job)
            for chunk in chunks:
                dispatch_evenly(chunk, watch)
            weights = watch.memory.now
            trainable = _make_trainable(job, chunks)
            buffers = [one for chunk in trainable.wrapped for one in (*chunk.buffers, *chunk.expert_parallel_buffers)]
            gradients = sum(buffer.grad_data.nbytes for buffer in buffers)
            static = watch.memory.now
            watch.start_step()
            _step(job, trainable, runtime, data)
        return StepReport(
            rank=rank,
            stage=parallel_state.get_pipeline_model_parallel_rank(),
            rows=[as_planned(row) for row in rows],
            weights=weights,
            gradients=gradients,
            optimizer=static - weights - gradients,
            peak=watch.memory.peak,
            at_peak=watch.memory.at_peak,
            calls=dict(watch.calls),
            sent=dict(watch.sent),
            waits=dict(watch.waits),
        )


@contextmanager
def _on_fake_gpu(watch: Watch, job: PlannedRun) -> Iterator[None]:
    """Makes tensors without data, and takes the branches of a GPU, within the context."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with ExitStack() as stack:
        stack.enter_context(compiled())
        if job.shape.experts is not None:
            from megatron.core.transformer.moe import token_dispatcher

            from megatron_spo.rehearsal.experts import sort_chunks

            stack.enter_context(patch.object(token_dispatcher, "sort_chunks_by_idxs", sort_chunks))
        if job.kernels == "engine":
            from megatron_spo.rehearsal.engine import engine

            stack.enter_context(engine())
        stack.enter_context(pipeline_messages(watch))
        stack.enter_context(lonely_objects())
        stack.enter_context(patch.object(torch.cuda, "synchronize", lambda *_: watch.wait("torch.cuda.synchronize")))
        stack.enter_context(patch.object(torch.nn.Module, "bfloat16", converted))
        stack.enter_context(watching_lists(watch))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(watch)
        stack.enter_context(GpuBranches(watch))
        yield


def _runtime(topology: Topology, rank: int) -> Runtime:
    from megatron.core import parallel_state

    return Runtime(
        topology=topology,
        device=torch.device("cuda"),
        rank=rank,
        data_rank=parallel_state.get_data_parallel_rank(),
        tensor_rank=parallel_state.get_tensor_model_parallel_rank(),
        context_rank=parallel_state.get_context_parallel_rank(),
        is_last_stage=parallel_state.is_pipeline_last_stage(ignore_virtual=True),
        progress=Progress(),
        clock=Clock(torch.device("cpu")),
    )


def _build(job: PlannedRun) -> list[PairModel]:
    """Builds the rank's chunks as prepare.py and train/run.py do, without reading weights."""
    from megatron_spo.model import settings
    from megatron_spo.model.build import build_model
    from megatron_spo.model.experts import freeze_routers
    from megatron_spo.model.lora import add_adapters

    config = job.config
    with patch.object(torch.cuda, "is_available", lambda: True), patch.object(settings, "can_compile", lambda: True):
        made = settings.transformer_config(job.shape, config.parallel, config.precision)
    made.use_cpu_initialization = True
    chunks = build_model(job.shape, made)
    if config.model.router_aux_loss is None:
        freeze_routers(chunks)
    add_adapters(chunks, job.shape, config.lora, config.training.seed)
    return chunks


def _make_trainable(job: PlannedRun, chunks: list[PairModel]) -> Trainable:
    from megatron_spo.model.optimizer import make_trainable

    topology = make_topology(job.config.parallel, job.gpus)
    overlap = topology.data * topology.context > 1
    return make_trainable(chunks, chunks[0].config, job.config.optimizer, overlap=overlap)


def _data(job: PlannedRun, runtime: Runtime) -> "list[tuple[DataInUse, Batch]]":
    """Returns the training pairs, and the separate SFT set if there is one, each with the batch of the first step and
    a reference cache if configured."""
    from megatron_spo.reference.sources import CachedSums
    from megatron_spo.train.step import DataInUse

    config = job.config
    found = []
    for name, lengths in ((TRAIN, job.lengths), (SFT, job.sft)):
        if lengths is None:
            continue
        dataset = PairsOfLengths(lengths)
        loader = make_loader(config, name, dataset, runtime)
        store = ReferenceStore(np.zeros(len(dataset), RECORD), dataset, Path("reference"))
        cached = CachedSums(store, runtime.device) if config.reference.cache else None
        found.append((DataInUse(name, loader, cached), loader.batch_of(loader.sampler.indices_of_step(0))))
    return found


def _step(job: PlannedRun, trainable: Trainable, runtime: Runtime, sets: "Sequence[tuple[DataInUse, Batch]]") -> None:
    from megatron_spo.objective.schedules import initial_state, plan_step
    from megatron_spo.objective.statistics import LossStatistics
    from megatron_spo.objective.step_plan import Role
    from megatron_spo.reference.sources import AdaptersOff
    from megatron_spo.train.state import TrainState
    from megatron_spo.train.step import Engine, Share

    config = job.config
    router_aux_loss = config.model.router_aux_loss or 0.0
    engine = Engine(trainable, runtime, loss=config.loss, spo=config.spo, router_aux_loss=router_aux_loss)
    if config.runs_reference:
        sets = [(replace(data, reference=AdaptersOff(trainable, runtime)), batch) for data, batch in sets]
    roles = [Role.BOTH] if len(sets) == 1 else [Role.PREFERENCE, Role.SFT]
    shares = [Share.of(data, batch, role) for (data, batch), role in zip(sets, roles, strict=True)]
    state = TrainState(0, initial_state(config.spo), LossStatistics())
    plan = plan_step(config.spo, 0, state.schedule)
    engine.train_step(plan, shares[0], shares[1] if len(shares) > 1 else None, state=state, lr=config.optimizer.lr)


def as_planned(row: PackedRow) -> RowSize:
    """Returns the planner's sizes of a row, without those that only affect its time."""
    _, shared, chosen, rejected = row.segments.T
    segments = segments_of(shared, chosen, rejected, len(row.tokens) - row.real_tokens)
    return RowSize(len(row.tokens), row.real_tokens, len(row.targets), 0, segments)
