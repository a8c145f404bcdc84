"""Finds the layouts that fit on a number of GPUs, their speed, and why the others do not fit."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import cycle, product

from megatron_spo.config.model_shape import ModelShape
from megatron_spo.config.rules import Facts, broken_rules
from megatron_spo.config.schema import Config, ParallelConfig
from megatron_spo.config.topology import make_topology
from megatron_spo.data.loader import row_multiples
from megatron_spo.planner.flops import forward_flops, step_flops
from megatron_spo.planner.gpus import GIB, Gpu
from megatron_spo.planner.memory import Kernels, Memory, Setting, worst_memory
from megatron_spo.planner.rows import Batch, Lengths, RowSize, fullest, planned_batches
from megatron_spo.planner.speed import StepTime, reference_time, step_time

MOST_CHUNKS = 10
"""Maximum chunks per stage of an interleaved pipeline to try, because each chunk needs communication."""
RECOMPUTE = ("none", "selective", "full")


@dataclass(frozen=True)
class Speed:
    """Speed of an average step.

    Attributes:
        step: seconds of a step by part.
        pairs: pairs per second on all GPUs.
        tokens: tokens without padding per second and GPU.
        utilisation: necessary operations as a fraction of the bf16 peak of the GPUs.
        fill: tokens as a fraction of the maximum length of the rows.
        reference: seconds of a forward pass over the pairs of one step.
        flops: necessary operations of a step.
    """

    step: StepTime
    pairs: float
    tokens: float
    utilisation: float
    fill: float
    reference: float
    flops: float


@dataclass(frozen=True)
class Plan:
    """A layout with the memory of a rank and the time of a step, or the problems that prevent it."""

    parallel: ParallelConfig
    problems: tuple[str, ...] = ()
    stage: int = 0
    memory: Memory | None = None
    longest: RowSize | None = None
    rows: int = 0
    speed: Speed | None = None

    @property
    def fits(self) -> bool:
        return not self.problems


@dataclass(frozen=True)
class PlannedRun:
    """A configuration, model, number of GPUs, and the lengths of the pairs and of the rows of a separate SFT set."""

    config: Config
    shape: ModelShape
    gpu: Gpu
    gpus: int
    lengths: Lengths
    sft: Lengths | None = None
    _batches: dict[tuple[int, int, int], list[Batch]] = field(default_factory=dict, compare=False)

    @property
    def kernels(self) -> Kernels:
        """The library for the layers; `auto` uses Transformer Engine for bf16 without experts."""
        precision = self.config.precision
        plain = precision.layers == "torch" or precision.dtype == "fp32" or self.shape.experts is not None
        return "torch" if plain else "engine"

    def batches(self, config: Config, ranks: int) -> list[Batch]:
        """Returns global batches for the number of data-parallel ranks, with rows of pairs and of the SFT set. They are
        cached for layouts with equal batches."""
        multiples = row_multiples(config)
        key = (ranks, multiples.tokens, multiples.rows)
        if key not in self._batches:
            size = config.training.global_batch_size
            batches = planned_batches(config, self.shape, self.lengths, size, ranks)
            if self.sft is not None:
                more = cycle(planned_batches(config, self.shape, self.sft, config.spo.sft_batch_size or size, ranks))
                batches = [[a + b for a, b in zip(batch, next(more), strict=True)] for batch in batches]
            self._batches[key] = batches
        return self._batches[key]


def plan_layout(job: PlannedRun, parallel: ParallelConfig) -> Plan:
    """Returns the plan of one layout."""
    config = job.config.model_copy(update={"parallel": parallel})
    if broken := broken_rules(Facts(config, frozenset(), job.shape, job.gpus, elsewhere=True)):
        return Plan(parallel, tuple(broken))
    topology = make_topology(parallel, job.gpus)
    setting = Setting(config, job.shape, topology, job.kernels)
    batches = job.batches(config, topology.data)
    longest, rows = fullest(batches)
    stage, memory = worst_memory(setting, longest, rows)
    problems = (_too_much(memory, stage, job),) if memory.total > job.gpu.memory else ()
    return Plan(parallel, problems, stage, memory, longest, rows, _speed(job, setting, batches))


def _too_much(memory: Memory, stage: int, job: PlannedRun) -> str:
    parts = sorted(vars(memory).items(), key=lambda part: -part[1])[:2]
    most = ", ".join(f"{name} {size / GIB:.1f}" for name, size in parts)
    return f"requires {memory.total / GIB:.1f} of {job.gpu.memory / GIB:.1f} GiB on stage {stage} ({most} GiB)"


def _speed(job: PlannedRun, setting: Setting, batches: list[Batch]) -> Speed:
    """Returns the mean speed over the batches."""
    times = [step_time(setting, job.gpu, batch) for batch in batches]
    mean = StepTime(
        *(sum(values) / len(times) for values in zip(*(vars(time).values() for time in times), strict=True))
    )
    rows = [row for batch in batches for rank in batch for row in rank]
    real = sum(row.real for row in rows) / len(batches)
    pairs = min(job.config.training.global_batch_size, len(job.lengths))
    needed = sum(_necessary(setting, row) for row in rows) / len(batches)
    return Speed(
        step=mean,
        pairs=pairs / mean.total,
        tokens=real / mean.total / job.gpus,
        utilisation=needed / mean.total / job.gpus / job.gpu.bf16,
        fill=real * len(batches) / (len(rows) * job.config.data.longest_row),
        reference=sum(reference_time(setting, job.gpu, batch) for batch in batches) / len(batches),
        flops=needed,
    )


def _necessary(setting: Setting, row: RowSize) -> float:
    flops = step_flops(setting.config, forward_flops(setting.shape, row, necessary=True), necessary=True)
    return setting.shape.layers * (flops.linear + flops.attention) + flops.head


def ranked(job: PlannedRun) -> tuple[list[Plan], list[Plan]]:
    """Returns the layouts that fit, fastest first, each with the least recomputation that fits; and the layouts that do
    not fit even with full recomputation, those with the least memory first."""
    best: dict[tuple[int | None, ...], Plan] = {}
    for parallel in candidates(job):
        key = (parallel.tensor, parallel.pipeline, parallel.virtual_pipeline, parallel.context, parallel.expert)
        if key in best and best[key].fits:
            continue
        plan = plan_layout(job, parallel)
        if plan.memory is not None:  # None: a rule rejects the layout
            best[key] = plan
    fitting = [plan for plan in best.values() if plan.fits and plan.speed]
    others = [plan for plan in best.values() if not plan.fits and plan.memory]
    return (
        sorted(fitting, key=lambda plan: plan.speed.step.total if plan.speed else 0.0),
        sorted(others, key=lambda plan: plan.memory.total if plan.memory else 0.0),
    )


def candidates(job: PlannedRun) -> Iterator[ParallelConfig]:
    """Yields the layouts to try: each size is a divisor of what it splits; least recomputation first."""
    config, shape = job.config.parallel, job.shape
    tensors = [n for n in _divisors(job.gpu.per_node) if job.gpus % n == 0]
    contexts = sorted({1, config.context})
    experts = [1] if shape.experts is None else _divisors(shape.experts.count)
    for tensor, context, expert in product(tensors, contexts, experts):
        for pipeline in _divisors(job.gpus // (tensor * context)) if job.gpus % (tensor * context) == 0 else []:
            even = shape.layers % pipeline == 0 and pipeline > 1
            chunks = [n for n in _divisors(shape.layers // pipeline) if 1 < n <= MOST_CHUNKS] if even else []
            for virtual, recompute in product([None, *chunks], RECOMPUTE):
                yield config.model_copy(
                    update={
                        "tensor": tensor,
                        "pipeline": pipeline,
                        "virtual_pipeline": virtual,
                        "layers_per_stage": None,
                        "context": context,
                        "expert": expert,
                        "sequence": tensor > 1,
                        "recompute": recompute,
                    }
                )


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]
