"""`megatron-spo rehearse`: build a layout rank by rank without its GPUs, and check it.

Every rank's model is built without memory, one after another. Checked: each number of each Hugging Face tensor is read
once by each replica and by the right ranks, the shards of a checkpoint make whole tensors, no rank holds more than
planned, and every pair is in one row of the epoch. Exit code 2, and what was found, if something is wrong.
"""

import argparse
import sys

from megatron_spo.commands.configuration import add_configuration


def add_options(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    add_configuration(parser)
    parser.add_argument("--gpus", type=int, required=True, help="number of processes of the layout")
    parser.add_argument("--pairs", type=int, default=60_000, help="pairs of the row plan [%(default)s]")


def run(options: argparse.Namespace) -> None:
    """Rehearse and print the numbers found.

    Raises:
        UserError: the configuration is wrong, or the layout does not do what it must.
    """
    from megatron_spo.config.load import load_config
    from megatron_spo.config.topology import make_topology
    from megatron_spo.planner.gpus import GIB
    from megatron_spo.planner.presets import shape_of
    from megatron_spo.planner.rows import assumed_lengths
    from megatron_spo.reference.cache import RECORD
    from megatron_spo.train.rehearsal import check, rehearse, rehearse_rows, require, summary

    config = load_config(options.config, options.overrides, world_size=options.gpus, elsewhere=True)
    shape = shape_of(config.model.path)
    found = rehearse(config, shape, options.gpus, progress=sys.stderr.isatty())
    require(check(found, config, shape))
    numbers = summary(found, item=2)
    for name, value in numbers.items():
        print(f"{name:32s}{value:>20,d}")
    print(f"{'bytes of the reference cache':32s}{options.pairs * RECORD.itemsize:>20,d}")
    whole = numbers["numbers in them"]
    print(f"{'GiB of a checkpoint':32s}{whole * 14 / GIB:>20,.0f}   (bf16 weights, fp32 main parameters and moments)")
    lengths = assumed_lengths(100, 200, options.pairs, config.data.max_length)
    for name, number in rehearse_rows(config, lengths, make_topology(config.parallel, options.gpus).data).items():
        print(f"{'row plan: ' + name:32s}{number:>20,.6g}")
