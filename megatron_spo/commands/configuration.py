"""Arguments of the commands that read a configuration: a file, and overrides of its keys."""

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

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


class SectionHelp(argparse.Action):
    """`--help` shows the help of the command, `--help SECTION` the keys of a section of the configuration."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> None:
        """Prints the help and exits."""
        from megatron_spo.config.document import help_about, help_text

        if values is None:
            parser.print_help()
        elif text := help_about(values):
            print(text)
        else:
            parser.error(f"{option} {values}: not a section or a key\n{help_text()}")
        parser.exit()


def add_configuration(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments CONFIG.yaml and section.key=value, and `--help SECTION`."""
    parser.add_argument("config", metavar="CONFIG.yaml", help="configuration file")
    add_overrides(parser)


def add_overrides(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments section.key=value, and `--help SECTION`."""
    # the default keeps argparse from naming this argument among the required ones
    parser.add_argument("overrides", nargs="*", default=[], metavar="section.key=value", help="value (YAML) that "
                        "replaces a key of the file")  # fmt: skip
    parser.add_argument("-h", "--help", nargs="?", metavar="SECTION", action=SectionHelp, default=argparse.SUPPRESS,
                        help="show this help, or the keys of a section of the configuration")  # fmt: skip
    if isinstance(parser, CommandParser):
        parser.make_epilog = _sections


def read_configuration(options: argparse.Namespace) -> "Config":
    """Loads the configuration for the number of processes of this job.

    Raises:
        UserError: the file or an override is invalid.
    """
    from megatron_spo.config.load import load_config

    return load_config(options.config, options.overrides, world_size=world_size(), in_slurm=in_slurm())


def _sections() -> str:
    from megatron_spo.config.document import help_text

    return help_text()
