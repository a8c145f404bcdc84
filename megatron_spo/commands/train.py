"""`megatron-spo train`: trains with a configuration, or resumes a run; with `--check`, only checks it."""

import argparse

from megatron_spo.commands.configuration import add_configuration, read_configuration
from megatron_spo.commands.plan import positive_integer
from megatron_spo.errors import UserError
from megatron_spo.planner.gpus import GPUS
from megatron_spo.runtime.env import world_size


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the command."""
    add_configuration(parser)
    parser.add_argument("--check", action="store_true", help="do not train; check configuration, model, data, disk "
                        "and memory, without a GPU")  # fmt: skip
    parser.add_argument("--gpus", type=positive_integer, help="with --check: number of GPUs [one replica]")
    parser.add_argument("--gpu", choices=GPUS, help="with --check: type of the GPUs [h100]")


def run(options: argparse.Namespace) -> None:
    """Trains. Raises the errors of `megatron_spo.train.run.train`, or of `check`."""
    if options.check:
        check(options.config, options.overrides, options.gpus, options.gpu or "h100")
        return
    if options.gpus or options.gpu:
        raise UserError("--gpus and --gpu are only used with --check; the launcher sets the number of processes: "
                        "torchrun --nproc-per-node GPUS -m megatron_spo train ...")  # fmt: skip
    config = read_configuration(options)
    if world_size() == 1:  # several processes connect first, so that all end if one of them misses a file
        from megatron_spo.train.before import check_paths, finished

        check_paths(config)
        if message := finished(config):
            print(message)
            return
    from megatron_spo.train.run import train  # after the checks: importing torch takes seconds

    train(config)


def check(config: str, overrides: list[str], gpus: int | None, gpu: str) -> None:
    """Prints the result of each check.

    Raises:
        UserError: something is wrong.
    """
    from megatron_spo.planner.check import check_run
    from megatron_spo.planner.gpus import find_gpu

    wrong = 0
    for finding in check_run(config, overrides, gpus, find_gpu(gpu, {})):
        print(finding, flush=True)
        wrong += finding.state == "wrong"
    if wrong:
        raise UserError(f"{config}: {wrong} of the checks above found something wrong")
