"""`megatron-spo train`: trains with a configuration, or resumes a run."""

import argparse

from megatron_spo.commands.configuration import add_configuration, read_configuration

add_options = add_configuration


def run(options: argparse.Namespace) -> None:
    """Trains. Raises the errors of `megatron_spo.train.run.train`."""
    config = read_configuration(options)
    from megatron_spo.train.run import train  # after the configuration is checked: importing torch takes seconds

    train(config)
