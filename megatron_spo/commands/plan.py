"""`megatron-spo plan`: memory, time and cost of a run, before a GPU is used."""

import argparse
from pathlib import Path

from megatron_spo.commands.configuration import add_configuration
from megatron_spo.planner.gpus import GIB, GPUS
from megatron_spo.planner.options import Options
from megatron_spo.planner.presets import PRESETS

GPU_NUMBERS = {  # option -> (its unit in ours, text)
    "memory": (GIB, "its memory, GiB"),
    "bf16": (1e12, "dense bf16 products, TFLOP/s"),
    "fp8": (1e12, "dense fp8 products, TFLOP/s"),
    "hbm": (1e12, "bandwidth of its memory, TB/s"),
    "nvlink": (1e9, "bandwidth to GPUs of its node, one direction, GB/s"),
    "network": (1e9, "bandwidth to other nodes, one direction, GB/s"),
    "efficiency": (1, "share of the peak that matrix products get in training (the calibration)"),
}


def add_options(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    add_configuration(parser)
    parser.add_argument("--gpus", type=positive_integer, required=True, help="number of GPUs")
    parser.add_argument("--gpu", default="h100", help=f"{', '.join(GPUS)}, or a name of your own [%(default)s]")
    parser.add_argument("--json", type=Path, help="file to write everything to")
    parser.add_argument("--model", help=f"shape to plan for instead of model.path: a folder, or {', '.join(PRESETS)}")
    parser.add_argument("--prompt-tokens", type=positive_integer, help="assume prompts of this median length")
    parser.add_argument("--response-tokens", type=positive_integer, help="assume responses of this median length")
    parser.add_argument("--pairs", type=positive_integer, help="pairs of an epoch, where the data is not at hand")
    parser.add_argument("--price", type=float, help="of one GPU hour, in your currency")
    parser.add_argument("--top", type=positive_integer, default=8, help="layouts to show [%(default)s]")
    numbers = parser.add_argument_group("the GPU's numbers, each replaces what is known of --gpu")
    for name, (_, text) in GPU_NUMBERS.items():
        numbers.add_argument(f"--{name}", type=positive_number, help=text)
    numbers.add_argument("--per-node", type=positive_integer, help="GPUs of a node")


def run(options: argparse.Namespace) -> None:
    """Plan and print the table. Raises what `megatron_spo.planner.plan.plan` does."""
    from megatron_spo.planner.plan import plan

    print(plan(read_options(options)))


def read_options(given: argparse.Namespace) -> Options:
    """Typed options from parsed ones."""
    values = vars(given)
    changes = {name: values[name] * unit for name, (unit, _) in GPU_NUMBERS.items() if values[name] is not None}
    if given.per_node is not None:
        changes["per_node"] = given.per_node
    own = {name: values[name] for name in Options.__dataclass_fields__ if name != "gpu_changes"}
    return Options(**own, gpu_changes=changes)


def positive_integer(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError
    return value


def positive_number(text: str) -> float:
    value = float(text)
    if not value > 0:
        raise ValueError
    return value
