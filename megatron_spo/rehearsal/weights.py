"""Rehearses a layout without its processes: builds every rank's model on the meta device, one after another.

Records what each rank would read from the Hugging Face folder instead of reading it, and compares what each would
contribute to a checkpoint with the others. This needs no GPU and no memory for weights or data.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.overrides import TorchFunctionMode

import megatron_spo.runtime.megatron_import  # noqa: F401  (before the modules that import Megatron)
from megatron_spo.config.model_shape import ModelShape
from megatron_spo.config.schema import Config
from megatron_spo.config.topology import Topology, make_topology, stages_of
from megatron_spo.data.loader import row_multiples
from megatron_spo.data.packing import Sampler, pair_costs, plan_rows
from megatron_spo.errors import UserError
from megatron_spo.meter import Meter
from megatron_spo.model.families import Mapping, mappings
from megatron_spo.planner.parameters import stage_parameters
from megatron_spo.planner.rows import Lengths
from megatron_spo.runtime import cpu_bridge
from megatron_spo.runtime.processes import lay_groups

Box = tuple[tuple[int, int], ...]
"""Start and end index (exclusive) of a part of a tensor, along each axis."""


@dataclass
class Reading:
    """The part of one Hugging Face tensor that a rank reads; `is_main`: it is the first replica of this part."""

    rank: int
    stage: int
    box: Box
    is_main: bool


@dataclass
class Rehearsal:
    """What all ranks together would read and hold.

    Attributes:
        shapes: shape of every Hugging Face tensor of the model, by name.
        readings: what the ranks read, by name of the Hugging Face tensor.
        shards: each rank's part of a checkpoint of the weights, without data.
        held: number of parameters of each rank.
    """

    shapes: dict[str, tuple[int, ...]]
    readings: dict[str, list[Reading]] = field(default_factory=lambda: defaultdict(list))
    shards: list[list[Any]] = field(default_factory=list)
    held: list[int] = field(default_factory=list)


class _OnMeta(TorchFunctionMode):
    """Allocates weights on the meta device. Megatron-Core 0.16.1 makes them with torch.empty. A device context would
    also affect the rotary frequencies, which are computed."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = {**(kwargs or {}), **({"device": "meta"} if func is torch.empty else {})}
        return func(*args, **kwargs)


class _Recorder:
    """Stands in for a tensor on disk and records which part of it is requested."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self._shape, self.boxes = shape, list[Box]()

    def get_shape(self) -> list[int]:
        return list(self._shape)

    def __getitem__(self, index: tuple[slice, ...]) -> Tensor:
        bounds = [one.indices(size)[:2] for one, size in zip(index, self._shape, strict=True)]
        self.boxes.append(tuple((start, max(start, stop)) for start, stop in bounds))
        return torch.empty([stop - start for start, stop in self.boxes[-1]], device="meta")


@contextmanager
def as_rank(rank: int, topology: Topology) -> Iterator[None]:
    """Makes this process `rank` of the layout within the context; its groups are complete, but have no other members
    running."""
    # From torch's own tests, available since torch 2.1: its collectives return at once.
    from torch.testing._internal.distributed.fake_pg import FakeStore

    cpu_bridge.install()
    from megatron.core import parallel_state  # after the bridge: importing it touches torch.cuda
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    if dist.is_initialized():
        raise RuntimeError("a rehearsal needs a process of its own: this one has process groups")
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=topology.world)
    try:
        lay_groups(topology, create_gloo_process_groups=False)
        model_parallel_cuda_manual_seed(0)
        yield
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def rehearse(config: Config, shape: ModelShape, world_size: int) -> Rehearsal:
    """Builds every rank's model and returns what it would read and hold."""
    topology = make_topology(config.parallel, world_size)
    result = Rehearsal({})
    with Meter("rehearsing", world_size, "ranks") as meter:
        for rank in range(world_size):
            with as_rank(rank, topology):
                _rehearse_rank(config, shape, rank, result)
            meter.advance()
    return result


def _rehearse_rank(config: Config, shape: ModelShape, rank: int, result: Rehearsal) -> None:
    from megatron.core import parallel_state
    from megatron.core.dist_checkpointing.mapping import is_main_replica

    from megatron_spo.model.build import build_model
    from megatron_spo.model.settings import transformer_config
    from megatron_spo.model.weights import local_tensors

    settings = transformer_config(shape, config.parallel, config.precision)
    settings.use_cpu_initialization = True  # nothing may be allocated on a GPU, even if there is one
    with _OnMeta():
        # Rotary frequencies are not weights, and scaled ones would import transformers.
        chunks = build_model(replace(shape, rope_scaling=None), settings)
    stage = parallel_state.get_pipeline_model_parallel_rank()
    result.held.append(sum(p.numel() for chunk in chunks for p in chunk.parameters()))
    shards = []
    for chunk in chunks:
        for row, tensor, index in local_tensors(chunk, shape):
            shards.append(tensor.without_data())
            full = tuple(int(size) for size in tensor.global_shape[tensor.prepend_axis_num :])
            sources = [_Recorder(one) for one in row.transform.shapes(full)]
            row.transform.read(sources, index)
            for name, source in zip(row.sources, sources, strict=True):
                result.shapes[name] = tuple(source.get_shape())
                for box in source.boxes:
                    result.readings[name].append(Reading(rank, stage, box, is_main_replica(tensor.replica_id)))
    result.shards.append(shards)


def check(result: Rehearsal, config: Config, shape: ModelShape) -> list[str]:
    """Returns the faults as sentences. It returns [] if each replica reads every element of every tensor once, on the
    right ranks, the shards form whole tensors, and every rank holds the planned number of parameters."""
    return [
        *_check_readings(result, config, shape),
        *_check_shards(result),
        *_check_parameters(result, config, shape),
    ]


def _check_readings(result: Rehearsal, config: Config, shape: ModelShape) -> Iterator[str]:
    ranks = len(result.held) // config.parallel.pipeline
    for row in mappings(shape):
        stages = _stages_of_row(row, config, shape)
        copies = ranks // (config.parallel.expert if len(row.at) > 1 else 1)
        for name in row.sources:
            readings = result.readings.get(name, [])
            main = [reading.box for reading in readings if reading.is_main and _volume(reading.box)]
            if fault := _not_a_partition(main, result.shapes.get(name)):
                yield f"{name}: {fault}"
            elif any(reading.box not in main for reading in readings if _volume(reading.box)):
                yield f"{name}: one replica reads a different part than the first replica"
            by_stage = Counter(reading.stage for reading in readings)
            if by_stage != dict.fromkeys(stages, copies):
                yield (
                    f"{name}: number of ranks that read it, by pipeline stage: {dict(by_stage)}; expected are {copies} "
                    f"ranks on each of the stages {stages}"
                )


def _stages_of_row(row: Mapping, config: Config, shape: ModelShape) -> set[int]:
    """Returns the pipeline stages that hold a tensor."""
    last = config.parallel.pipeline - 1
    if row.at:
        return {_stage_of_layer(config, shape)[row.at[0]]}
    if row.key.startswith("embedding"):
        return {0, last} if shape.tied else {0}
    return {last}


def _stage_of_layer(config: Config, shape: ModelShape) -> list[int]:
    counts = stages_of(shape, config.parallel)
    return [i % config.parallel.pipeline for i, count in enumerate(counts) for _ in range(count)]


def _volume(box: Box) -> int:
    return prod(stop - start for start, stop in box)


def _not_a_partition(boxes: list[Box], shape: tuple[int, ...] | None) -> str | None:
    """Returns why the boxes do not cover a tensor of this shape exactly once, or None if they do."""
    if shape is None:
        return "no rank reads it"
    overlaps = _overlap(boxes)
    if overlaps is not None:
        return f"{overlaps} is read twice"
    read = sum(_volume(box) for box in boxes)
    return None if read == prod(shape) else f"only {read} of its {prod(shape)} numbers are read"


def _overlap(boxes: list[Box]) -> Box | None:
    """Returns a box that overlaps another, or None. In sorted order, only neighbours along the cut axis can overlap."""
    ordered = sorted(boxes)
    for first, second in zip(ordered, ordered[1:], strict=False):
        if all(a[0] < b[1] and b[0] < a[1] for a, b in zip(first, second, strict=True)):
            return second
    return None


def _check_shards(result: Rehearsal) -> Iterator[str]:
    """Runs Megatron's own check of a checkpoint before it is written."""
    from megatron.core.dist_checkpointing.core import CheckpointingException
    from megatron.core.dist_checkpointing.validation import validate_sharding_integrity

    with as_rank(0, Topology(1, 1, 1, 1, 1, 1, 1, 1)):
        try:
            validate_sharding_integrity(result.shards)
        except (CheckpointingException, AssertionError) as error:
            yield f"checkpoint: {error}"


def _check_parameters(result: Rehearsal, config: Config, shape: ModelShape) -> Iterator[str]:
    topology = make_topology(config.parallel, len(result.held))
    per_stage = topology.world // topology.pipeline
    for rank, held in enumerate(result.held):
        planned = stage_parameters(config, shape, rank // per_stage).held
        if held != planned:
            yield f"rank {rank} holds {held} parameters, but the plan gives it {planned}"


def summary(result: Rehearsal, item: int) -> dict[str, int]:
    """Returns counts to print; `item`: bytes per element on disk."""
    read: Counter[int] = Counter()
    for readings in result.readings.values():
        for reading in readings:
            read[reading.rank] += _volume(reading.box) * item
    return {
        "ranks": len(result.held),
        "Hugging Face tensors": len(result.shapes),
        "numbers in them": sum(prod(shape) for shape in result.shapes.values()),
        "keys of a checkpoint's weights": len({shard.key for shards in result.shards for shard in shards}),
        "shards of all ranks": sum(len(shards) for shards in result.shards),
        "most parameters of a rank": max(result.held),
        "most bytes that a rank reads": max(read.values()),
    }


def rehearse_rows(config: Config, lengths: Lengths, ranks: int) -> dict[str, float]:
    """Packs every batch of the first epoch for `ranks` data-parallel ranks and returns statistics.

    Raises:
        UserError: a pair is missing or appears twice, a row is too long, or the ranks have different numbers of rows.
    """
    size, tokens, most = config.training.global_batch_size, lengths.tokens, config.data.longest_row
    sampler = Sampler([len(lengths)], [1.0], seed=config.training.seed, global_batch_size=size)
    seen, rows, imbalance, faults = np.zeros(len(lengths), dtype=np.int64), 0, [], []
    for step in range(sampler.steps_per_epoch):
        batch = sampler.indices_of_step(step)
        plan = plan_rows(tokens[batch], row_length=most, ranks=ranks, rows_multiple=row_multiples(config).rows)
        by_rank = [[batch[row] for row in rank] for rank in plan]
        if len({len(rank) for rank in by_rank}) > 1:
            faults.append(f"step {step}: the ranks have different numbers of rows")
        faults += [f"step {step}: a row has {tokens[row].sum()} tokens, more than {most}" for rank in by_rank
                   for row in rank if tokens[row].sum() > most]  # fmt: skip
        work = [sum(pair_costs(tokens[row]).sum() for row in rank) for rank in by_rank]
        imbalance.append(max(work) / (sum(work) / ranks))
        np.add.at(seen, np.concatenate([row for rank in by_rank for row in rank]), 1)
        rows += ranks * len(plan[0])
    require(faults + [f"pair {int(i)} appears {seen[i]} times in an epoch" for i in np.flatnonzero(seen != 1)])
    return {
        "steps": sampler.steps_per_epoch,
        "rows": rows,
        "fill": float(tokens.sum()) / (rows * most),
        "most over mean work of a rank": float(np.mean(imbalance)),
    }


def require(faults: list[str]) -> None:
    """Raises a UserError with the faults, if there are any."""
    if faults:
        raise UserError("the rehearsal found:\n" + "\n".join(faults[:20]))
