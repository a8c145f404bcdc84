"""`megatron-spo rehearse`: runs the training step of one rank of a layout without its GPUs.

The step is that of `train`, on tensors without data: model, data parallelism, optimizer and the branches for a GPU. The
command prints the memory next to the plan, the communication, and where the process waits for the GPU.

With --every-rank it first builds the model of every rank, one after another, and checks: every replica reads each
element of each Hugging Face tensor exactly once, on the right ranks; the shards of a checkpoint form complete tensors;
no rank holds more than planned; and every pair is in exactly one row of the epoch. If a check fails, the command prints
the findings and ends with exit code 2.
"""

import argparse
from typing import TYPE_CHECKING

from megatron_spo.commands.plan import add_run
from megatron_spo.errors import UserError
from megatron_spo.runtime.env import hide_gpus

if TYPE_CHECKING:
    from megatron_spo.planner.layouts import PlannedRun


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the command."""
    add_run(parser)
    parser.add_argument("--rank", type=int, help="rank to rehearse [the first one of the stage with the most memory]")
    parser.add_argument(
        "--every-rank", action="store_true", help="also build the model of every rank, and check weights and rows"
    )


def run(options: argparse.Namespace) -> None:
    """Rehearses and prints the results.

    Raises:
        UserError: options or configuration are invalid, or a check fails.
    """
    hide_gpus()  # the same result on a machine with a GPU
    from megatron_spo.config.rules import Facts, broken_rules
    from megatron_spo.planner.options import Options
    from megatron_spo.planner.plan import planned_run

    given = {name: getattr(options, name) for name in ("config", "overrides", "gpus", "model", "pairs", "prompt_tokens",
                                                       "response_tokens")}  # fmt: skip
    job, notes = planned_run(Options(**given, gpu="h100", gpu_changes={}, price=None, top=0, json=None))
    if broken := broken_rules(Facts(job.config, frozenset(), job.shape, job.gpus, elsewhere=True)):
        raise UserError("\n".join(broken))
    if options.rank is not None and not 0 <= options.rank < job.gpus:
        raise UserError(f"--rank {options.rank} does not exist; give a rank from 0 to {job.gpus - 1}")
    if options.every_rank:
        print(check_every_rank(job), end="\n\n")
    from megatron_spo.rehearsal.step import rehearse_step
    from megatron_spo.rehearsal.table import as_text

    rank = fullest_rank(job) if options.rank is None else options.rank
    print(as_text(job, rehearse_step(job, rank), notes))


def fullest_rank(job: "PlannedRun") -> int:
    """Returns the first rank of the pipeline stage with the most planned memory."""
    from megatron_spo.planner.layouts import plan_layout

    return plan_layout(job, job.config.parallel).stage * (job.gpus // job.config.parallel.pipeline)


def check_every_rank(job: "PlannedRun") -> str:
    """Builds and checks every rank and returns the results as text.

    Raises:
        UserError: a check fails.
    """
    from megatron_spo.config.topology import make_topology
    from megatron_spo.planner.gpus import GIB
    from megatron_spo.reference.cache import RECORD
    from megatron_spo.rehearsal.weights import check, rehearse, rehearse_rows, require, summary

    found = rehearse(job.config, job.shape, job.gpus)
    require(check(found, job.config, job.shape))
    numbers = summary(found, item=2)
    lines = [f"{name:32s}{value:>20,d}" for name, value in numbers.items()]
    lines.append(f"{'bytes of the reference cache':32s}{len(job.lengths) * RECORD.itemsize:>20,d}")
    size = numbers["numbers in them"] * 14 / GIB
    lines.append(f"{'GiB of a checkpoint':32s}{size:>20,.0f}   (bf16 weights, fp32 main parameters and moments)")
    ranks = make_topology(job.config.parallel, job.gpus).data
    lines += [f"{'row plan: ' + name:32s}{number:>20,.6g}"
              for name, number in rehearse_rows(job.config, job.lengths, ranks).items()]  # fmt: skip
    return "\n".join(lines)
