"""Memory of a run: the estimate at the start, with the disk space, the GPUs' peaks in each step, and both compared at
the end."""

import logging

import torch
import torch.distributed as dist

from megatron_spo.config.schema import Config
from megatron_spo.planner.at_start import memory_at_start, memory_line, peak_line, shortage
from megatron_spo.planner.disk import disk_line
from megatron_spo.planner.gpus import GIB
from megatron_spo.planner.memory import Kernels, Memory, Setting
from megatron_spo.planner.rows import lengths_of, steps_in
from megatron_spo.prepare import SFT, TRAIN, Inputs
from megatron_spo.runtime import env
from megatron_spo.runtime.device import free_memory_of, uses_transformer_engine
from megatron_spo.runtime.processes import Runtime

LOG = logging.getLogger(__name__)


class PeakMemory:
    """The largest memory of any of the job's GPUs."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._allocated, self._reserved = device, 0.0, 0.0

    def read(self) -> dict[str, float]:
        """Returns the largest memory of any GPU since the last call, in GiB: of its tensors, and reserved by torch for
        tensors. {} without a GPU. All ranks must call it together.

        This waits for the GPU, as the clock does after every step.
        """
        if self._device.type != "cuda":
            return {}
        peaks = [torch.cuda.max_memory_allocated(self._device), torch.cuda.max_memory_reserved(self._device)]
        torch.cuda.reset_peak_memory_stats(self._device)
        largest = torch.tensor(peaks, dtype=torch.float64, device=self._device) / GIB
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        allocated, reserved = largest.tolist()
        self._allocated, self._reserved = max(self._allocated, allocated), max(self._reserved, reserved)
        return {"memory/allocated": allocated, "memory/reserved": reserved}

    def compare(self, planned: Memory | None) -> None:
        """Logs the largest memory of the whole run next to the estimate; does nothing without a GPU or an estimate."""
        if planned is not None and self._allocated:
            LOG.info(peak_line(planned, allocated=self._allocated * GIB, reserved=self._reserved * GIB))


def announce_memory(config: Config, inputs: Inputs, runtime: Runtime) -> Memory | None:
    """Logs the planned memory of the run and the size of its checkpoints; warns if the memory exceeds what is free.
    Returns the planned memory on the main process."""
    if not runtime.is_main:
        return None
    kernels: Kernels = "cpu"
    if runtime.device.type == "cuda":
        engine = uses_transformer_engine(config.precision, experts=inputs.shape.experts is not None)
        kernels = "engine" if engine else "torch"
    size = config.training.global_batch_size
    sets = [(lengths_of(inputs.train, TRAIN), size)]
    if inputs.sft is not None:
        sets.append((lengths_of(inputs.sft, SFT), config.spo.sft_batch_size or size))
    memory = memory_at_start(Setting(config, inputs.shape, runtime.topology, kernels), sets)
    sharing = env.local_world_size() if kernels == "cpu" else 1
    free = free_memory_of(runtime.device)
    LOG.info(memory_line(memory, processes=sharing, free=free))
    if warning := shortage(memory, processes=sharing, free=free):
        LOG.warning(warning)
    LOG.info(disk_line(config, inputs.shape, steps_in(config, len(inputs.train))))
    return memory
