"""`megatron-spo train`: train as a configuration says, or resume."""

import argparse

from megatron_spo.commands.configuration import add_configuration, read_configuration

add_options = add_configuration


def run(options: argparse.Namespace) -> None:
    """Train. Raises what `megatron_spo.train.run.train` does."""
    config = read_configuration(options)
    from megatron_spo.train.run import train  # after the configuration: torch takes seconds to load

    train(config)
