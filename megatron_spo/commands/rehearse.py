"""`megatron-spo rehearse`: builds a layout rank by rank without its GPUs, and checks it.

The model of each rank is built on the meta device, one after another. The checks: every replica reads each element of
each Hugging Face tensor exactly once, on the right ranks; the shards of a checkpoint form complete tensors; no rank
holds more than planned; and every pair is in exactly one row of the epoch. If a check fails, the command prints the
findings and ends with exit code 2.
"""

import argparse

from megatron_spo.commands.configuration import add_configuration


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the command."""
    add_configuration(parser)
    parser.add_argument("--gpus", type=int, required=True, help="number of processes of the layout")
    parser.add_argument("--pairs", type=int, default=60_000, help="number of pairs to pack into rows [%(default)s]")


def run(options: argparse.Namespace) -> None:
    """Builds and checks the layout and prints the results.

    Raises:
        UserError: the configuration is invalid, or a check of the layout fails.
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
    found = rehearse(config, shape, options.gpus)
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
