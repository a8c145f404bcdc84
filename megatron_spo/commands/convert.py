"""`megatron-spo convert`: checkpoints and models from one format to another."""

import argparse
from pathlib import Path


def add_options(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("source", metavar="SRC", type=Path, help="model folder (Hugging Face, Megatron, NeMo 2), run "
                        "directory, or a checkpoint in it")  # fmt: skip
    parser.add_argument("target", metavar="DST", type=Path, help="folder to write; a second call resumes")
    parser.add_argument("--to", choices=["hf", "megatron", "nemo", "peft"], required=True, help="format to write; "
                        "peft: the adapters of a LoRA run alone")  # fmt: skip
    parser.add_argument("--verify", action="store_true", help="read the result and compare every tensor")
    parser.add_argument("--workers", type=int, default=1, help="processes that write [%(default)s]")


def run(options: argparse.Namespace) -> None:
    """Convert, and print what the reader should know of it."""
    from megatron_spo.convert.export import convert

    notes = convert(options.source, options.target, options.to, verify=options.verify, workers=options.workers)
    print("\n".join(notes))
