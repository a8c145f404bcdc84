"""The commands: parse, call one function, print. What a command needs is imported when it runs."""

import argparse
import contextlib
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

from megatron_spo import __version__
from megatron_spo.errors import Anomaly, LostRank, NotSaved, Stopped, UserError
from megatron_spo.evaluate.command import add_options as add_evaluate_options
from megatron_spo.planner.options import add_options, read_options
from megatron_spo.runtime.env import rank, world_size
from megatron_spo.runtime.quiet import quiet_third_parties
from megatron_spo.runtime.signals import signals
from megatron_spo.runtime.watch_thread import watch
from megatron_spo.scaling.options import add_options as add_scaling_options


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code.

    0 done, 2 the input is wrong, 3 an anomaly in training, 4 another process died or hangs, 5 the last checkpoint could
    not be written, 75 stopped by a signal or the time limit: the same command goes on; 128 + number: a second signal,
    1: a bug. Under torchrun the caller sees the agent's code, 1 for all but 0: read status.json.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = _parser(with_keys=bool({"-h", "--help"} & set(given[1:]))).parse_args(given)
    quiet_third_parties()
    with signals.handled() if options.command in (_train, _reference) else contextlib.nullcontext():
        try:
            options.command(options)
        except KeyboardInterrupt:
            return 130
        except (UserError, Anomaly, LostRank, NotSaved, Stopped) as error:
            return _ended(error)
        except BaseException as error:  # some of PyTorch's are no Exception
            if world_size() > 1 and not isinstance(error, SystemExit):
                _broke(error)
            raise
    return 0


def _ended(error: UserError | Anomaly | LostRank | NotSaved | Stopped) -> int:
    stopped_at_once = isinstance(error, Stopped) and not signals.is_over
    watch().explain(error, ours=not stopped_at_once)  # torchrun sends a signal to those whose peer has died
    signals.over(error.code)
    message = f"stopped by {error}; the same command goes on from here" if stopped_at_once else str(error)
    if rank() == 0 or stopped_at_once or isinstance(error, LostRank):  # in other cases all ranks found the same
        print(message if isinstance(error, Stopped) else f"error: {message}", file=sys.stderr, flush=True)
    watch().leave(error.code, message)
    return error.code


def _broke(error: BaseException) -> None:
    """A bug, or the trace of another process's end: the other processes must not wait for this one."""
    watch().explain(error, ours=False)
    traceback.print_exc()
    watch().leave(1, f"{type(error).__name__}: {str(error)[:300]}")
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)  # what runs at exit could wait for the others


def _parser(*, with_keys: bool) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="megatron-spo",
        description="Stable Preference Optimization on Megatron-Core.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def add(name: str, command: Callable[[argparse.Namespace], None], text: str) -> argparse.ArgumentParser:
        form = argparse.RawDescriptionHelpFormatter
        sub = commands.add_parser(name, help=text, description=text, formatter_class=form, allow_abbrev=False)
        sub.set_defaults(command=command)
        return sub

    for name, command, text in (
        ("train", _train, "train, or resume where `output` holds a checkpoint; writes the run directory"),
        ("reference", _reference, "fill reference.cache for every data set of the configuration; resumes"),
    ):
        sub = add(name, command, text)
        sub.epilog = _keys() if with_keys else None
        sub.add_argument("config", metavar="CONFIG.yaml")
        sub.add_argument(
            "overrides",
            nargs="*",
            metavar="section.key=value",
            help="replaces a key of the file; the value is YAML",
        )
    _add_file_commands(add)
    add("doctor", _doctor, "show what is installed, what is missing, what follows")
    return parser


def _add_file_commands(add: Callable[..., argparse.ArgumentParser]) -> None:
    convert = add("convert", _convert, "convert a checkpoint or a model")
    convert.add_argument("source", metavar="SRC", type=Path, help="model folder (Hugging Face, Megatron, NeMo 2), run "
                         "directory, or a checkpoint in it")  # fmt: skip
    convert.add_argument("target", metavar="DST", type=Path, help="folder to write; a second call goes on")
    convert.add_argument("--to", choices=["hf", "megatron", "nemo", "peft"], required=True, help="a model, or the "
                         "adapters of a run alone (peft)")  # fmt: skip
    convert.add_argument("--verify", action="store_true", help="read it again and compare every tensor")
    convert.add_argument("--workers", type=int, default=1, help="processes that write [%(default)s]")

    generate = add("generate", _generate, "write a model's answers to the prompts of a file")
    generate.add_argument("model", metavar="MODEL", type=Path, help="folder in Hugging Face format")
    generate.add_argument("--prompts", type=Path, required=True, help="JSONL: rows with a prompt, as in data.train")
    generate.add_argument("--out", type=Path, required=True, help="JSONL to write: the rows with a field responses")
    generate.add_argument("--samples", type=int, default=1, help="answers per prompt [%(default)s]")
    generate.add_argument("--temperature", type=float, default=0.0, help="0: the likeliest token [%(default)s]")
    generate.add_argument("--max-new-tokens", type=int, default=256, help="tokens per answer [%(default)s]")
    generate.add_argument("--batch-size", type=int, default=64, help="answers at a time [%(default)s]")
    generate.add_argument("--seed", type=int, default=0, help="of the sampling [%(default)s]")
    generate.add_argument(
        "--engine", choices=("transformers", "vllm"), default="transformers", help="what computes [%(default)s]"
    )

    add_evaluate_options(add("evaluate", _evaluate, "scores of answers; how a model ranks pairs, or does on tasks"))
    add_options(add("plan", _plan, "memory, time and cost of a run, and the layouts that fit, before a GPU is touched"))

    add_scaling_options(add("scaling", _scaling, "fit scaling laws, run studies"))

    report = add("report", _report, "draw one or several runs into one HTML page")
    report.add_argument("runs", metavar="RUN", type=Path, nargs="+", help="run directory")
    report.add_argument("--out", type=Path, required=True, help="HTML file to write")


def _keys() -> str:
    from megatron_spo.config.document import help_text

    return help_text()


def _train(options: argparse.Namespace) -> None:
    from megatron_spo.config.load import load_config

    config = load_config(options.config, options.overrides, world_size=world_size())
    from megatron_spo.run import train  # after the configuration: torch takes seconds to load

    train(config)


def _reference(options: argparse.Namespace) -> None:
    from megatron_spo.config.load import load_config

    config = load_config(options.config, options.overrides, world_size=world_size())
    from megatron_spo.reference import fill

    fill(config)


def _convert(options: argparse.Namespace) -> None:
    from megatron_spo.convert.export import convert

    notes = convert(options.source, options.target, options.to, verify=options.verify, workers=options.workers)
    print("\n".join(notes))


def _generate(options: argparse.Namespace) -> None:
    from megatron_spo.evaluate.generate import generate_file

    generate_file(
        options.model,
        options.prompts,
        options.out,
        samples=options.samples,
        temperature=options.temperature,
        max_new_tokens=options.max_new_tokens,
        batch_size=options.batch_size,
        seed=options.seed,
        engine=options.engine,
    )


def _evaluate(options: argparse.Namespace) -> None:
    from megatron_spo.evaluate.command import evaluate

    print(evaluate(options))


def _plan(options: argparse.Namespace) -> None:
    from megatron_spo.planner.command import plan

    print(plan(read_options(options)))


def _scaling(options: argparse.Namespace) -> None:
    from megatron_spo.scaling import command

    if options.part == "fit":
        print(command.fit_points(options))
    elif not command.run_study(options):
        sys.exit(1)


def _report(options: argparse.Namespace) -> None:
    from megatron_spo.report import write_report

    write_report(options.runs, options.out)


def _doctor(options: argparse.Namespace) -> None:
    from megatron_spo.doctor import report

    print(report())
