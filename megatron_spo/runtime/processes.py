"""Sets up the process groups, device and seeds of a job."""

import atexit
import contextlib
import gc
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from megatron_spo.config.topology import Topology
from megatron_spo.errors import LostRank, UserError
from megatron_spo.runtime import cpu_bridge, env
from megatron_spo.runtime.clock import Clock
from megatron_spo.runtime.progress import DAY, Progress
from megatron_spo.runtime.signals import signals
from megatron_spo.runtime.watchdog import watch

T = TypeVar("T")
COLLECTIVES = timedelta(seconds=DAY)
"""How long a collective may wait. The watchdog, which knows which rank is late, ends the job long before."""


@dataclass(frozen=True)
class Runtime:
    """The device of this process and its coordinates in the layout."""

    topology: Topology
    device: torch.device
    rank: int
    data_rank: int
    tensor_rank: int
    context_rank: int
    is_last_stage: bool
    progress: Progress
    clock: Clock

    @property
    def is_main(self) -> bool:
        """Whether this process writes the job's files and its output on screen."""
        return self.rank == 0

    @property
    def holds_results(self) -> bool:
        """Whether this process reports the values of its rows: one per data-parallel rank, on the last stage."""
        return self.is_last_stage and self.tensor_rank == 0 and self.context_rank == 0


def start(topology: Topology, *, seed: int, threads: int = 0, hang_minutes: float = 30) -> Runtime:
    """Connects the job's processes, creates the parallel groups and seeds Megatron's generators.

    The processes stay connected until they exit; another call creates the groups of another layout.

    Args:
        topology: the layout; its world size must be the number of launched processes.
        seed: seed of the random-number trackers.
        threads: CPU threads per process; 0 means OMP_NUM_THREADS, or the node's cores divided by its processes.
        hang_minutes: minutes without progress after which the job ends.

    Raises:
        LostRank: not all of the job's processes connected.
    """
    if topology.tensor > 1:
        env.one_queue_per_gpu()
    on_gpu = not cpu_bridge.install()
    device = torch.device("cuda", env.local_rank()) if on_gpu else torch.device("cpu")
    if on_gpu:
        env.use_fp32()
        torch.set_float32_matmul_precision("highest")  # NVIDIA's images set TORCH_ALLOW_TF32_CUBLAS_OVERRIDE
        torch.backends.cudnn.allow_tf32 = False
        torch.cuda.set_device(device)
    torch.set_num_threads(threads or env.cpu_threads())
    store = _store(hang_minutes)
    watch().progress.start_up(hang_minutes * 60)
    from megatron.core import parallel_state  # after the bridge: importing it touches torch.cuda
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    if dist.is_initialized():  # by an earlier command in this process; its groups would keep their threads
        dist.barrier()
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
        gc.collect()  # the groups, some fifty threads, are part of reference cycles
    else:
        gc.freeze()  # what was imported stays: the collector need not look through it again
    backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
    dist.init_process_group(backend, store=store, rank=env.rank(), world_size=env.world_size(), timeout=COLLECTIVES)
    with _groups_of("nccl" if on_gpu else "gloo"):
        lay_groups(
            topology,
            distributed_timeout_minutes=round(COLLECTIVES.total_seconds() / 60),
            create_gloo_process_groups=False,
        )
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed)
    return Runtime(
        topology=topology,
        device=device,
        rank=dist.get_rank(),
        data_rank=parallel_state.get_data_parallel_rank(),
        tensor_rank=parallel_state.get_tensor_model_parallel_rank(),
        context_rank=parallel_state.get_context_parallel_rank(),
        is_last_stage=parallel_state.is_pipeline_last_stage(ignore_virtual=True),
        progress=watch().progress,
        clock=Clock(device),
    )


@contextlib.contextmanager
def _groups_of(backend: str) -> Iterator[None]:
    """Gives new process groups one backend only within the context.

    On a GPU the default group also has gloo, for objects. Megatron's groups, about 15 per rank, exchange tensors on the
    GPU only, but would inherit gloo and connect all of their members by it.
    """
    new_group = dist.new_group
    dist.new_group = lambda *ranks, **options: new_group(*ranks, **{**options, "backend": backend})
    try:
        yield
    finally:
        dist.new_group = new_group


def lay_groups(topology: Topology, **more: Any) -> None:
    """Creates Megatron's parallel groups; `more` is passed to Megatron."""
    from megatron.core import parallel_state  # after the bridge: importing it touches torch.cuda

    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=topology.tensor,
        pipeline_model_parallel_size=topology.pipeline,
        virtual_pipeline_model_parallel_size=topology.virtual if topology.virtual > 1 else None,
        context_parallel_size=topology.context,
        expert_model_parallel_size=topology.expert,
        expert_tensor_parallel_size=topology.expert_tensor,
        **more,
    )


_meetings: list[dist.Store] = []
"""The store through which the processes connect, followed by one view with its own prefix per set of groups."""


def _store(minutes: float) -> dist.Store:
    """Returns the store for one set of groups."""
    if not _meetings:
        _meetings.append(_meet(minutes) if env.launched() else dist.HashStore())
        atexit.register(dist.destroy_process_group)
    _meetings.append(dist.PrefixStore(f"groups {len(_meetings)}", _meetings[0]))
    return _meetings[-1]


def _meet(minutes: float) -> dist.Store:
    """Waits for all processes and starts the watchdog; returns the store that they share."""
    try:
        store, rank, world_size = next(rendezvous("env://", timeout=timedelta(minutes=minutes)))
        if world_size > 1 and rank == 0:
            port, token = watch().start_hub()
            store.set("watch", f"{port} {token}")
        elif world_size > 1:
            port, token = store.get("watch").decode().split()
            watch().join_hub(env.main_address(), int(port), token)
    except (dist.DistError, OSError) as error:
        raise LostRank(
            f"not all of the {env.world_size()} processes connected to {env.main_address()} within {minutes:g} minutes "
            f"(training.hang_timeout): {str(error).splitlines()[0]}. Check that every process was started and can "
            "reach this address"
        ) from error
    signals.tell_others = watch().leave
    atexit.register(_say_goodbye)
    return store


def _say_goodbye() -> None:
    """Tells the watchdog, when the interpreter exits, whether an uncaught exception ended this process."""
    error = getattr(sys, "last_value", None)
    watch().leave(0 if error is None else 1, f"{type(error).__name__}: {error}")


def on_main(action: Callable[[], T], failure: type[Exception]) -> T:
    """Runs `action` on the main process and returns its result on all processes.

    Raises:
        failure: on all ranks alike, if `action` raised an OSError.
    """
    outcome: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            outcome[0] = action()
        except OSError as error:
            outcome[1] = str(error)
    dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise failure(outcome[1])
    result: T = outcome[0]
    return result


@contextlib.contextmanager
def agreed() -> Iterator[None]:
    """Raises a UserError on every process if any process raised one within the context.

    All ranks must enter the context together, and nothing in it may wait for another rank.

    Raises:
        UserError: on all ranks alike, with the message of the lowest rank that raised one, so that no rank waits for
            one that has left.
    """
    error: UserError | None = None
    try:
        yield
    except UserError as raised:
        error = raised
    messages: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(messages, None if error is None else str(error))
    first = next((message for message in messages if message is not None), None)
    if first is not None:
        raise UserError(first)
