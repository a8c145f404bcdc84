"""`megatron-spo reference`: fills the cache with log-probs of the reference model."""

import argparse

from megatron_spo.commands.configuration import add_configuration, read_configuration

add_options = add_configuration


def run(options: argparse.Namespace) -> None:
    """Fills the cache. Raises the errors of `megatron_spo.reference.fill.fill`."""
    config = read_configuration(options)
    from megatron_spo.reference.fill import fill

    fill(config)
