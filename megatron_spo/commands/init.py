"""`megatron-spo init`: prints a configuration to start from."""

import argparse

from megatron_spo.commands.configuration import add_overrides
from megatron_spo.commands.plan import positive_integer
from megatron_spo.planner.gpus import GPUS


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the command."""
    parser.add_argument("model", metavar="MODEL", help="Hugging Face folder or hub id of the model to train")
    parser.add_argument("pairs", metavar="PAIRS", help="JSONL or Parquet file, or hub id, of the preference pairs")
    add_overrides(parser)
    parser.add_argument("--gpus", type=positive_integer, help="number of GPUs [the smallest number that suffices]")
    parser.add_argument("--gpu", default="h100", choices=GPUS, help="type of the GPUs [%(default)s]")


def run(options: argparse.Namespace) -> None:
    """Prints the configuration."""
    from megatron_spo.planner.initial import Request, initial_configuration

    request = Request(options.model, options.pairs, options.overrides, options.gpus, options.gpu)
    print(initial_configuration(request), end="")
