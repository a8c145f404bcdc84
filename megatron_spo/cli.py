"""The command line: finds and runs a command, and turns errors into messages and exit codes."""

import argparse
import contextlib
import logging
import os
import select
import sys
import traceback
from collections.abc import Sequence
from importlib import import_module

from megatron_spo import __version__
from megatron_spo.commands.configuration import CommandParser
from megatron_spo.errors import Anomaly, LostRank, NotSaved, StageFailed, Stopped, UserError
from megatron_spo.runtime.env import rank, world_size, yield_soon
from megatron_spo.runtime.logs import log_to_stderr
from megatron_spo.runtime.quiet import quiet_third_parties
from megatron_spo.runtime.signals import signals
from megatron_spo.runtime.watchdog import watch

LOG = logging.getLogger(__name__)

COMMANDS = {
    "init": "print a configuration for a model and a file of pairs, with a layout that fits",
    "train": "train, or resume if `output` holds a checkpoint; writes the run directory",
    "reference": "compute the reference's log-probs of every data set into reference.cache; resumes if interrupted",
    "convert": "convert a checkpoint or a model to another format",
    "generate": "generate a model's answers to the prompts in a file",
    "pairs": "score sampled answers and choose preference pairs from them",
    "rounds": "sample, make pairs, train and evaluate, round after round",
    "evaluate": "score answers, or a model on preference pairs or benchmark tasks",
    "plan": "estimate memory, time and cost of a run and list the layouts that fit, without a GPU",
    "rehearse": "build a layout rank by rank without its GPUs, and check it",
    "slurm": "check a configuration and submit it as a SLURM job",
    "scaling": "fit scaling laws and run scaling studies",
    "status": "show where a run, a job or a study stands: step, time left, speed, alarms, what it waits for",
    "report": "plot one or more runs into one HTML page",
    "doctor": "show what is installed, what is missing, and what that affects",
}
"""Name of a command -> help text; the module of the same name in commands/ defines its options."""
STOPPABLE = ("train", "reference")
"""Commands with several processes, which stop in an orderly way on a signal."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code.

    Exit codes: 0 done; 1 a bug; 2 the input is wrong; 3 an anomaly in training; 4 another process died or hangs; 5 the
    last checkpoint could not be written; 75 stopped by a signal or the time limit (the same command resumes); 128 +
    number a second signal; 141 the reader of the output has ended, such as `head`. Under torchrun the caller sees the
    agent's code, which is 1 for every code but 0; then read status.json.
    """
    try:
        try:
            return _run(arguments)
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        if not _output_is_closed():
            raise
        return 141  # as a shell reports it for other programs


def _output_is_closed() -> bool:
    """Returns whether nobody reads stdout any more; then discards what is left, which would fail again at the exit."""
    output = select.poll()
    output.register(sys.stdout.fileno(), 0)
    closed = any(events & select.POLLERR for _, events in output.poll(0))
    if closed:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return closed


def _run(arguments: Sequence[str] | None) -> int:
    yield_soon()
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = _parse(given)
    quiet_third_parties()
    log_to_stderr()
    with signals.handled() if options.command in STOPPABLE else contextlib.nullcontext():
        try:
            options.run(options)
        except KeyboardInterrupt:
            return 130
        except (UserError, Anomaly, LostRank, NotSaved, StageFailed, Stopped) as error:
            return _ended(error)
        except BaseException as error:  # some of PyTorch's errors are not an Exception
            if world_size() > 1 and not isinstance(error, SystemExit):
                _broke(error)
            raise
    return 0


def _ended(error: UserError | Anomaly | LostRank | NotSaved | StageFailed | Stopped) -> int:
    stopped_at_once = isinstance(error, Stopped) and not signals.is_over
    watch().explain(error, ours=not stopped_at_once)  # torchrun sends a signal to the processes whose peer has died
    signals.over(error.code)
    message = f"stopped by {error}; the same command resumes from here" if stopped_at_once else str(error)
    if rank() == 0 or stopped_at_once or isinstance(error, LostRank):  # otherwise all ranks have the same error
        (LOG.info if isinstance(error, Stopped) else LOG.error)(message)
    watch().leave(error.code, message)
    return error.code


def _broke(error: BaseException) -> None:
    """Ends this process after a bug, or an error caused by another process's death, so that no process waits for it."""
    watch().explain(error, ours=False)
    traceback.print_exc()
    watch().leave(1, f"{type(error).__name__}: {str(error)[:300]}")
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)  # exit handlers could wait for the others


def _parse(given: Sequence[str]) -> argparse.Namespace:
    """Parses the arguments; overrides may also follow an option, which argparse does not support."""
    parser = _parser(next((word for word in given if word in COMMANDS), None))
    options, rest = parser.parse_known_args(given)
    late = [word for word in rest if "=" in word and not word.startswith("-")] if hasattr(options, "overrides") else []
    if late != rest:
        parser.error(f"unrecognized arguments: {' '.join(word for word in rest if word not in late)}")
    if late:
        options.overrides += late
    return options


def _parser(command: str | None) -> argparse.ArgumentParser:
    """Returns the parser with the options of `command` only; the modules of other commands are not imported."""
    parser = argparse.ArgumentParser(
        prog="megatron-spo",
        description="Stable Preference Optimization on Megatron-Core.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(
        title="commands", metavar="COMMAND", dest="command", required=True, parser_class=CommandParser
    )
    for name, text in COMMANDS.items():
        form = argparse.RawDescriptionHelpFormatter
        sub = commands.add_parser(name, help=text, description=text, formatter_class=form, allow_abbrev=False,
                                  conflict_handler="resolve")  # fmt: skip  # SectionHelp replaces --help
        if name == command:
            module = import_module(f"megatron_spo.commands.{name}")
            module.add_options(sub)
            sub.set_defaults(run=module.run)
    return parser
