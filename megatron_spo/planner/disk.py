"""Estimates the disk space of a run's checkpoints."""

from megatron_spo.config.model_shape import ModelShape
from megatron_spo.config.schema import Config, ParallelConfig
from megatron_spo.planner.parameters import stage_parameters

STATE_BYTES = 12
"""Bytes of optimizer state per trained parameter: main parameter and two moments in fp32."""


def checkpoint_bytes(config: Config, shape: ModelShape) -> int:
    """Returns the size of one checkpoint: the weights, or the adapters, and the state of the optimizer."""
    whole = config.model_copy(update={"parallel": ParallelConfig()})
    count = stage_parameters(whole, shape, 0)
    stored = count.trained if config.lora.rank else count.held
    return (2 if config.precision.dtype == "bf16" else 4) * stored + STATE_BYTES * count.trained


def most_checkpoints(config: Config, steps: int) -> int:
    """Returns the largest number of checkpoints on the disk at a time: those kept, the best, and one in writing."""
    if not config.checkpoint.every:
        return 1
    written = -(-steps // config.checkpoint.every)
    return min(config.checkpoint.keep + 1 + (config.checkpoint.best is not None), written)


def disk_line(config: Config, shape: ModelShape, steps: int) -> str:
    """Returns one line: the size of a checkpoint, and of all that are kept."""
    size, count = checkpoint_bytes(config, shape), most_checkpoints(config, steps)
    several = f", up to {count} at a time: {gigabytes(count * size)}" if count > 1 else ""
    return f"a checkpoint takes {gigabytes(size)} of disk space (with the optimizer's state){several}"


def gigabytes(size: float) -> str:
    """Returns a size with its unit, in two or three digits."""
    unit, factor = next((one for one in (("TB", 1e12), ("GB", 1e9)) if size >= one[1]), ("MB", 1e6))
    return f"{size / factor:.0f} {unit}" if size >= 100 * factor else f"{size / factor:.1f} {unit}"
