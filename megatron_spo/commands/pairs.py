"""`megatron-spo pairs`: scores sampled answers and chooses preference pairs from them."""

import argparse
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from megatron_spo.on_policy.rules import SCORER_HELP, PairRules, read_rules


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the command: files, and the fields of PairRules. Options that are not given are None."""
    parser.add_argument(
        "answers", metavar="ANSWERS.jsonl", nargs="+", type=Path, help="output of `generate --samples N`"
    )
    parser.add_argument("--out", type=Path, required=True, help="JSONL file of pairs to write, as data.train reads it")
    parser.add_argument("--summary", type=Path, metavar="FILE", help="JSON file to write the summary to")
    parser.add_argument("--scorer", required=True, metavar="SCORER", help=" ".join(SCORER_HELP.split()))
    for name, field in PairRules.model_fields.items():
        if name != "scorer":
            shown = "" if field.default is None else f" [{field.default}]"
            of = _type(field.annotation)
            parser.add_argument(
                f"--{name.replace('_', '-')}",
                type=of,
                choices=get_args(field.annotation) if get_origin(field.annotation) is Literal else None,
                metavar=None if of is str else {int: "N", float: "X"}[of],
                help=f"{' '.join((field.description or '').split())}{shown}",
            )


def run(options: argparse.Namespace) -> None:
    """Writes the pairs and prints the summary. Raises the errors of `make_pairs`."""
    given = {name: value for name in PairRules.model_fields if (value := getattr(options, name)) is not None}
    rules = read_rules(given, lambda field: f"pairs: --{field.replace('_', '-')}")

    from megatron_spo.on_policy.make_pairs import make_pairs

    print(make_pairs(options.answers, options.out, rules, options.summary).table())


def _type(annotation: Any) -> type:
    """Returns int, float or str, the type of the words of an option."""
    named = [one for one in (annotation, *get_args(annotation)) if one in (int, float)]
    return named[0] if named else str
