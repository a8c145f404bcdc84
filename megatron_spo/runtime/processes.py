"""Process groups, device and seeds of one job."""

import atexit
import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from megatron_spo.config.topology import Topology
from megatron_spo.errors import UserError
from megatron_spo.runtime import cpu_bridge, env


@dataclass(frozen=True)
class Runtime:
    """What this process is: its device and its coordinates in the layout."""

    topology: Topology
    device: torch.device
    rank: int
    data_rank: int
    tensor_rank: int
    context_rank: int
    is_last_stage: bool

    @property
    def is_main(self) -> bool:
        """Whether this process writes the files and the screen of the job."""
        return self.rank == 0

    @property
    def holds_results(self) -> bool:
        """Whether this process reports the values of its rows: one per data-parallel rank, on the last stage."""
        return self.is_last_stage and self.tensor_rank == 0 and self.context_rank == 0


def start(topology: Topology, *, seed: int, threads: int = 0, timeout_minutes: int = 30) -> Runtime:
    """Join the job's processes, lay the parallel groups over them and seed Megatron's generators.

    The processes stay joined until they exit; a further call lays another layout over them.

    Args:
        topology: the layout; its world size must be the number of launched processes.
        seed: seed of the random-number trackers.
        threads: CPU threads per process; 0 takes the node's cores divided by its processes.
    """
    on_gpu = not cpu_bridge.install()
    device = torch.device("cuda", env.local_rank()) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    torch.set_num_threads(threads or max(1, (os.cpu_count() or 1) // env.local_world_size()))
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
        timeout = timedelta(minutes=timeout_minutes)
        if env.launched():
            dist.init_process_group(backend, timeout=timeout)
        else:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
        atexit.register(dist.destroy_process_group)
    from megatron.core import parallel_state  # after the bridge: importing it touches torch.cuda
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    if parallel_state.model_parallel_is_initialized():  # an earlier command of this process
        parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=topology.tensor,
        pipeline_model_parallel_size=topology.pipeline,
        virtual_pipeline_model_parallel_size=topology.virtual if topology.virtual > 1 else None,
        context_parallel_size=topology.context,
        expert_model_parallel_size=topology.expert,
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
    )


def agree(error: UserError | None) -> None:
    """Make every process raise when one has an error, with the message of the lowest rank that has one.

    Raises:
        UserError: on all ranks alike, so that no rank waits for one that has left.
    """
    messages: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(messages, None if error is None else str(error))
    first = next((message for message in messages if message is not None), None)
    if first is not None:
        raise UserError(first)
