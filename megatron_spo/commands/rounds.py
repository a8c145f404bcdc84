"""`megatron-spo rounds`: samples answers, makes pairs, trains and evaluates, round after round."""

import argparse
import shlex
from pathlib import Path


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the command."""
    parser.add_argument("rounds", metavar="ROUNDS.yaml", type=Path, help="file of the rounds (docs/on_policy.md); "
                        "repeat the command to resume")  # fmt: skip
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="value (YAML) that replaces a key of "
                        "the base configuration")  # fmt: skip
    parser.add_argument("--out", type=Path, help="folder to write, instead of `out` in the file")
    parser.add_argument("--processes", type=int, default=1, metavar="N", help="processes for training and reference "
                        "pass, started by torchrun on this machine [%(default)s]")  # fmt: skip
    parser.add_argument("--launch", metavar="WORDS", help="words that start training and reference pass, such as 'srun "
                        "... bash slurm/launch.sh', instead of --processes")  # fmt: skip
    parser.add_argument("--launch-one", metavar="WORDS", help="words that start the other commands, on one node "
                        "[python -m megatron_spo]")  # fmt: skip
    parser.add_argument("--at-once", type=int, default=1, metavar="N", help="parts that are sampled, and answers that "
                        "are evaluated, at the same time [%(default)s]")  # fmt: skip
    does = parser.add_mutually_exclusive_group()
    does.add_argument("--list", action="store_true", help="only check the file and list the commands of all rounds")
    does.add_argument("--table", action="store_true", help="only write the table and the report of the rounds so far")


def run(options: argparse.Namespace) -> None:
    """Runs what is not done, and prints the table. Raises the errors of `run_rounds`."""
    from megatron_spo.rounds.run import launch_of, run_rounds
    from megatron_spo.rounds.spec import read_rounds
    from megatron_spo.rounds.stages import groups_of

    rounds = read_rounds(options.rounds, options.overrides, options.out)
    launch = launch_of(options.processes, options.launch, options.launch_one, options.at_once)
    if options.list:
        stages = [(number, one) for number in range(rounds.spec.rounds + 1)
                  for group in groups_of(rounds, number) for one in group]  # fmt: skip
        for number, stage in stages:
            state = "done" if stage.is_done else "-"
            print(f"{number:3d}  {stage.name:14s} {state:5s} megatron-spo {shlex.join(stage.words)}")
        return
    if not options.table:
        run_rounds(rounds, launch)

    from megatron_spo.rounds.results import write_results

    print(write_results(rounds))
    print(f"{rounds.out / 'table.csv'}, {rounds.out / 'report.html'}")
