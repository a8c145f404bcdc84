"""`megatron-spo generate`: generates answers of a model to prompts."""

import argparse
from pathlib import Path

from megatron_spo.evaluate.limits import NEW_TOKENS


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the command."""
    parser.add_argument("model", metavar="MODEL", type=Path, help="model folder in Hugging Face format")
    parser.add_argument(
        "--prompts", type=Path, required=True, help="JSONL file with a prompt in each row, as in data.train"
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="JSONL file to write: the rows with a field `responses`"
    )
    parser.add_argument("--samples", type=int, default=1, help="number of answers per prompt [%(default)s]")
    parser.add_argument(
        "--temperature", type=float, default=0.0, help="sampling temperature; 0: greedy decoding [%(default)s]"
    )
    parser.add_argument("--max-new-tokens", type=int, help=f"maximum tokens of an answer [{NEW_TOKENS}, or as many as "
                        "the model's context leaves]")  # fmt: skip
    parser.add_argument("--batch-size", type=int, default=64, help="answers per batch [%(default)s]")
    parser.add_argument("--seed", type=int, default=0, help="random seed of the sampling [%(default)s]")
    parser.add_argument("--engine", choices=("transformers", "vllm"), default="transformers", help="library to "
                        "generate with [%(default)s]")  # fmt: skip


def run(options: argparse.Namespace) -> None:
    """Generates the answers. Raises the errors of `generate_file`."""
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
