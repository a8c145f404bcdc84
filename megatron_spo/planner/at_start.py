"""The memory estimate that `train` logs before it builds the model and, on GPUs, compares with the run at its end."""

from collections.abc import Sequence

from megatron_spo.planner.gpus import GIB
from megatron_spo.planner.memory import Memory, Setting, worst_memory
from megatron_spo.planner.rows import Lengths, fullest, planned_batches

NEGLIGIBLE = 0.005
"""Fraction of the total below which a part is not shown."""


def memory_at_start(setting: Setting, sets: Sequence[tuple[Lengths, int]]) -> Memory:
    """Returns the memory of the rank that needs the most, for the fullest row of a sample of the batches.

    Args:
        setting: configuration, model and layout.
        sets: lengths of each training set, and its number of rows in a global batch.
    """
    found = [
        fullest(planned_batches(setting.config, setting.shape, lengths, size, setting.topology.data))
        for lengths, size in sets
    ]
    row = max((row for row, _ in found), key=lambda row: row.tokens)
    return worst_memory(setting, row, sum(rows for _, rows in found))[1]


def memory_line(memory: Memory, *, processes: int, free: float) -> str:
    """Returns one line: the memory of the worst rank by part, and the free memory for `processes` ranks."""
    parts = [(name, size) for name, size in vars(memory).items() if size > NEGLIGIBLE * memory.total]
    named = ", ".join(f"{name} {_gib(size)}" for name, size in sorted(parts, key=lambda part: -part[1]))
    each = f"{processes} processes with {_gib(memory.total)} GiB each" if processes > 1 else f"{_gib(memory.total)} GiB"
    return f"estimated memory: {each} ({named}), of {_gib(free)} GiB free"


def shortage(memory: Memory, *, processes: int, free: float) -> str | None:
    """Returns a warning if the estimate exceeds the free memory, else None."""
    needed = processes * memory.total
    if needed <= free:
        return None
    return (
        f"estimated memory of {_gib(needed)} GiB exceeds the free memory by {_gib(needed - free)} GiB, so "
        "this run will probably run out of memory; stop other programs that use it, find layouts that fit with "
        "`megatron-spo plan`, or set parallel.recompute=full, a shorter data.row_length or lora.rank"
    )


def peak_line(memory: Memory, *, allocated: float, reserved: float) -> str:
    """Returns one line: the largest memory of a GPU in a run, compared with the estimate.

    Args:
        memory: the estimate.
        allocated, reserved: bytes of tensors, and bytes that torch reserved for tensors.
    """
    tensors = memory.total - memory.reserved
    return (
        f"peak memory of a GPU: tensors {_gib(allocated)} GiB, {allocated / tensors - 1:+.1%} compared with the "
        f"estimate of {_gib(tensors)} GiB; {_gib(reserved)} GiB reserved by torch, the estimate with CUDA, NCCL and "
        f"fragmentation is {_gib(memory.total)} GiB"
    )


def _gib(size: float) -> str:
    return f"{size / GIB:.2f}" if size < 10 * GIB else f"{size / GIB:.1f}"
