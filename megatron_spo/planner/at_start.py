"""What `train` says about memory before it builds anything."""

from collections.abc import Sequence

from megatron_spo.planner.gpus import GIB
from megatron_spo.planner.memory import Memory, Setting, worst_memory
from megatron_spo.planner.rows import Lengths, fullest, planned_batches

NEGLIGIBLE = 0.005
"""Share of the whole below which a part is not named."""


def memory_at_start(setting: Setting, sets: Sequence[tuple[Lengths, int]]) -> Memory:
    """Of the rank that needs the most, by the fullest row of some of the data's batches.

    sets: the training sets that are drawn from side by side, each with its rows of a global batch.
    """
    found = [
        fullest(planned_batches(setting.config, setting.shape, lengths, size, setting.topology.data))
        for lengths, size in sets
    ]
    row = max((row for row, _ in found), key=lambda row: row.tokens)
    return worst_memory(setting, row, sum(rows for _, rows in found))[1]


def memory_line(memory: Memory, *, processes: int, available: float) -> str:
    """One line: what the worst rank needs, by part, and what there is for `processes` ranks."""
    parts = [(name, size) for name, size in vars(memory).items() if size > NEGLIGIBLE * memory.total]
    named = ", ".join(f"{name} {_gib(size)}" for name, size in sorted(parts, key=lambda part: -part[1]))
    each = f"{processes} processes of {_gib(memory.total)} GiB" if processes > 1 else f"{_gib(memory.total)} GiB"
    return f"memory as planned: {each} ({named}), of {_gib(available)} GiB"


def shortage(memory: Memory, *, processes: int, available: float) -> str | None:
    """A warning where the plan exceeds what there is."""
    needed = processes * memory.total
    if needed <= available:
        return None
    return (
        f"the plan needs {_gib(needed)} GiB, {_gib(needed - available)} more than there is: this run will "
        "probably run out of memory; see which layouts fit with `megatron-spo plan`, or set parallel.recompute=full, a "
        "shorter data.row_length or lora.rank"
    )


def _gib(size: float) -> str:
    return f"{size / GIB:.2f}" if size < 10 * GIB else f"{size / GIB:.1f}"
