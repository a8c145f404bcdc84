"""`megatron-spo reference`: fill the cache of the reference model's log-probs."""

import argparse

from megatron_spo.commands.configuration import add_configuration, read_configuration

add_options = add_configuration


def run(options: argparse.Namespace) -> None:
    """Fill the cache. Raises what `megatron_spo.reference.fill.fill` does."""
    config = read_configuration(options)
    from megatron_spo.reference.fill import fill

    fill(config)
