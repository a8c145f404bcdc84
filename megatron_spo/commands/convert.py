"""`megatron-spo convert`: converts checkpoints and models to another format."""

import argparse
from pathlib import Path

from megatron_spo.errors import UserError


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the command."""
    parser.add_argument("source", metavar="SRC", type=Path, help="model folder (Hugging Face, Megatron, NeMo 2), run "
                        "directory, or checkpoint of a run")  # fmt: skip
    parser.add_argument("target", metavar="DST", type=Path, help="folder to write; repeat the command to resume")
    parser.add_argument("--to", choices=["hf", "megatron", "nemo", "peft"], required=True, help="output format; "
                        "peft: only the adapters of a LoRA run")  # fmt: skip
    parser.add_argument("--verify", action="store_true", help="read the result back and compare all tensors")
    parser.add_argument("--push", metavar="REPO", help="upload the result (hf or peft) to this repository on the hub, "
                        "such as me/my-model; it is created as a private one")  # fmt: skip
    parser.add_argument("--workers", type=int, default=1, help="number of processes that write [%(default)s]")


def run(options: argparse.Namespace) -> None:
    """Converts, and prints notes about the result."""
    from megatron_spo.convert.export import convert
    from megatron_spo.data import hub

    if options.push:
        if options.to not in ("hf", "peft"):
            raise UserError(f"--push {options.push}: --to {options.to} is not a format of the hub; use --to hf or peft")
        hub.check_login(options.push)
    notes = convert(options.source, options.target, options.to, verify=options.verify, workers=options.workers)
    print("\n".join(notes), flush=True)
    if options.push:
        print(f"uploaded to {hub.push(options.push, options.target)}")
