"""The arguments of every command that reads a configuration: a file, and keys that replace those of the file."""

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING

from megatron_spo.runtime.env import world_size

if TYPE_CHECKING:
    from megatron_spo.config.schema import Config


class CommandParser(argparse.ArgumentParser):
    """A parser whose epilog is made only when its help is shown."""

    make_epilog: Callable[[], str] | None = None

    def format_help(self) -> str:
        """As argparse does, with the epilog."""
        if self.make_epilog is not None:
            self.epilog = self.make_epilog()
        return super().format_help()


def add_configuration(parser: argparse.ArgumentParser) -> None:
    """Add CONFIG.yaml and the overrides; the help lists every key."""
    parser.add_argument("config", metavar="CONFIG.yaml")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="replaces a key of the file; the "
                        "value is YAML")  # fmt: skip
    if isinstance(parser, CommandParser):
        parser.make_epilog = _keys


def read_configuration(options: argparse.Namespace) -> "Config":
    """The configuration for the processes of this job.

    Raises:
        UserError: the file or an override is wrong.
    """
    from megatron_spo.config.load import load_config

    return load_config(options.config, options.overrides, world_size=world_size())


def _keys() -> str:
    from megatron_spo.config.document import help_text

    return help_text()
