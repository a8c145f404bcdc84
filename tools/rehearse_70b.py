"""Rehearses a configuration's layout without its GPUs: by default the 70B of examples/llama3_70b on 32 of them.

Every rank's model is built without memory, one after another. Checked: each number of each Hugging Face tensor is read
once by each replica and by the right ranks, the shards of a checkpoint make whole tensors, no rank holds more than
planned, and every pair is in one row of the epoch. Exit code 2 and what was found, where something is wrong.
"""

import argparse
import sys
from pathlib import Path

HERE = Path(__file__).parent


def main() -> None:
    from megatron_spo.config.load import load_config
    from megatron_spo.config.topology import make_topology
    from megatron_spo.data.reference_store import RECORD
    from megatron_spo.planner.gpus import GIB
    from megatron_spo.planner.presets import shape_of
    from megatron_spo.planner.rows import assumed_lengths
    from megatron_spo.rehearsal import check, rehearse, rehearse_rows, require, summary

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?", default=HERE.parent / "examples" / "llama3_70b" / "config.yaml")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--gpus", type=int, default=32, help="processes of the layout [%(default)s]")
    parser.add_argument("--pairs", type=int, default=60_000, help="pairs of the row plan [%(default)s]")
    options = parser.parse_args()
    config = load_config(options.config, options.overrides, world_size=options.gpus, elsewhere=True)
    shape = shape_of(config.model.path)
    found = rehearse(config, shape, options.gpus, progress=sys.stderr.isatty())
    require(check(found, config, shape))
    for name, value in summary(found, item=2).items():
        print(f"{name:32s}{value:>20,d}")
    print(f"{'bytes of the reference cache':32s}{options.pairs * RECORD.itemsize:>20,d}")
    whole = summary(found, item=2)["numbers in them"]
    print(f"{'GiB of a checkpoint':32s}{whole * 14 / GIB:>20,.0f}   (bf16 weights, fp32 main parameters and moments)")
    lengths = assumed_lengths(100, 200, options.pairs, config.data.max_length)
    for name, number in rehearse_rows(config, lengths, make_topology(config.parallel, options.gpus).data).items():
        print(f"{'row plan: ' + name:32s}{number:>20,.6g}")


if __name__ == "__main__":
    from megatron_spo.errors import UserError
    from megatron_spo.runtime.quiet import quiet_third_parties

    quiet_third_parties()
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.code)
