"""Arguments of the commands that read a configuration: a file, and overrides of its keys."""

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING

from megatron_spo.runtime.env import in_slurm, world_size

if TYPE_CHECKING:
    from megatron_spo.config.schema import Config


class CommandParser(argparse.ArgumentParser):
    """An argument parser that creates its epilog only when the help is shown."""

    make_epilog: Callable[[], str] | None = None

    def format_help(self) -> str:
        """Returns the help text with the epilog."""
        if self.make_epilog is not None:
            self.epilog = self.make_epilog()
        return super().format_help()


def add_configuration(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments CONFIG.yaml and section.key=value; the help lists all keys."""
    parser.add_argument("config", metavar="CONFIG.yaml", help="configuration file")
    # the default keeps argparse from naming this argument among the required ones
    parser.add_argument("overrides", nargs="*", default=[], metavar="section.key=value", help="value (YAML) that "
                        "replaces a key of the file")  # fmt: skip
    if isinstance(parser, CommandParser):
        parser.make_epilog = _keys


def read_configuration(options: argparse.Namespace) -> "Config":
    """Loads the configuration for the number of processes of this job.

    Raises:
        UserError: the file or an override is invalid.
    """
    from megatron_spo.config.load import load_config

    return load_config(options.config, options.overrides, world_size=world_size(), in_slurm=in_slurm())


def _keys() -> str:
    from megatron_spo.config.document import help_text

    return help_text()
