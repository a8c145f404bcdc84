"""Formats the rehearsal of a step as text."""

from collections.abc import Sequence

from tabulate import tabulate

from megatron_spo.config.topology import make_topology, stages_of
from megatron_spo.planner.gpus import GIB
from megatron_spo.planner.layouts import PlannedRun
from megatron_spo.planner.memory import Memory, Setting, stage_memory
from megatron_spo.planner.tables import describe
from megatron_spo.rehearsal.step import StepReport
from megatron_spo.rehearsal.waits import reason

MIB = 2**20
LAYERS = {
    "torch": "layers of torch; stand-ins for the GPU kernels of norm and SwiGLU",
    "engine": "layers of Transformer Engine, by a stand-in that keeps the same tensors",
}


def planned_memory(job: PlannedRun, report: StepReport) -> Memory:
    """Returns the plan for the rehearsed rank and rows."""
    setting = Setting(job.config, job.shape, make_topology(job.config.parallel, job.gpus), job.kernels)
    return stage_memory(setting, report.stage, max(report.rows, key=lambda row: row.tokens), len(report.rows))


def as_text(job: PlannedRun, report: StepReport, notes: Sequence[str]) -> str:
    """Returns memory next to the plan, communication and waits."""
    return "\n\n".join([_heading(job, report, notes), _memory(job, report), _communication(report), _waits(report)])


def _heading(job: PlannedRun, report: StepReport, notes: Sequence[str]) -> str:
    parallel = job.config.parallel
    layers = sum(stages_of(job.shape, parallel)[report.stage :: parallel.pipeline])
    tokens = [row.tokens for row in report.rows]
    fp8 = f" in fp8 ({job.config.precision.fp8})" if job.config.precision.fp8 else ""
    return "\n".join(
        [
            f"one step of rank {report.rank} of {job.gpus}, {describe(parallel)}: stage {report.stage}, {layers} of "
            f"{job.shape.layers} layers, {len(tokens)} rows of {min(tokens)} to {max(tokens)} tokens",
            f"{LAYERS[job.kernels]}{fp8}",
            f"lengths {notes[0]}",
        ]
    )


def _memory(job: PlannedRun, report: StepReport) -> str:
    planned = planned_memory(job, report)
    static = planned.weights + planned.gradients + planned.optimizer
    rows = [
        ("weights", planned.weights, report.weights),
        ("gradients", planned.gradients, report.gradients),
        ("optimizer", planned.optimizer, report.optimizer),
        ("in the step", planned.total - planned.reserved - static, report.peak - report.static),
        ("peak of the tensors", planned.total - planned.reserved, report.peak),
    ]
    unit, size = ("GiB", GIB) if report.peak > GIB else ("MiB", MIB)
    cells = [(name, f"{a / size:.2f}", f"{b / size:.2f}", f"{b / a:.3f}") for name, a, b in rows]
    table = tabulate(cells, ["memory", f"planned {unit}", f"rehearsed {unit}", "ratio"], disable_numparse=True,
                     colalign=("left", "right", "right", "right"))  # fmt: skip
    return (
        f"{table}\nthe peak is in {report.at_peak}\n"
        f"not included: {planned.reserved / GIB:.0f} GiB assumed for CUDA, NCCL and fragmentation"
    )


def _communication(report: StepReport) -> str:
    if not report.calls:
        return "no communication"
    cells = [
        (exchange.kind, exchange.group, calls, f"{report.sent[exchange] / MIB:,.1f}")
        for exchange, calls in sorted(report.calls.items(), key=lambda one: -report.sent[one[0]])
    ]
    return tabulate(cells, ["communication in the step", "group", "calls", "MiB"], disable_numparse=True,
                    colalign=("left", "left", "right", "right"))  # fmt: skip


def _waits(report: StepReport) -> str:
    if not report.waits:
        return "the process never waits for the GPU"
    cells = [
        (calls, f"{what} in {where}", reason(where) or ("REASON UNKNOWN" if calls >= len(report.rows) else ""))
        for (what, where), calls in sorted(report.waits.items(), key=lambda one: -one[1])
    ]
    return tabulate(cells, ["waits", "for the GPU in the step", "because"], disable_numparse=True,
                    colalign=("right", "left", "left"), maxcolwidths=[None, None, 60])  # fmt: skip
