"""`megatron-spo train`: trains with a configuration, or resumes a run."""

import argparse

from megatron_spo.commands.configuration import add_configuration, read_configuration
from megatron_spo.runtime.env import world_size

add_options = add_configuration


def run(options: argparse.Namespace) -> None:
    """Trains. Raises the errors of `megatron_spo.train.run.train`."""
    config = read_configuration(options)
    if world_size() == 1:  # several processes connect first, so that all end if one of them misses a file
        from megatron_spo.train.before import check_paths, finished

        check_paths(config)
        if message := finished(config):
            print(message)
            return
    from megatron_spo.train.run import train  # after the checks: importing torch takes seconds

    train(config)
