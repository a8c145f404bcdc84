"""Logs at the start of a run how much memory and disk space it needs."""

import logging

from megatron_spo.config.schema import Config
from megatron_spo.planner.at_start import memory_at_start, memory_line, shortage
from megatron_spo.planner.disk import disk_line
from megatron_spo.planner.memory import Kernels, Setting
from megatron_spo.planner.rows import lengths_of, steps_in
from megatron_spo.prepare import SFT, TRAIN, Inputs
from megatron_spo.runtime import env
from megatron_spo.runtime.device import memory_of, uses_transformer_engine
from megatron_spo.runtime.processes import Runtime

LOG = logging.getLogger(__name__)


def announce_memory(config: Config, inputs: Inputs, runtime: Runtime) -> None:
    """Logs the planned memory of the run and the size of its checkpoints; warns if the memory exceeds what there is."""
    if not runtime.is_main:
        return
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
    available = memory_of(runtime.device)
    LOG.info(memory_line(memory, processes=sharing, available=available))
    if warning := shortage(memory, processes=sharing, available=available):
        LOG.warning(warning)
    LOG.info(disk_line(config, inputs.shape, steps_in(config, len(inputs.train))))
