"""`megatron-spo plan`: estimates memory, time and cost of a run without using a GPU."""

import argparse
from pathlib import Path

from megatron_spo.commands.configuration import add_configuration
from megatron_spo.planner.gpus import GIB, GPUS
from megatron_spo.planner.options import Options
from megatron_spo.planner.presets import PRESETS

GPU_NUMBERS = {  # option -> (factor to SI units or bytes, help text)
    "memory": (GIB, "memory of the GPU, GiB"),
    "bf16": (1e12, "peak rate of dense bf16 matrix products, TFLOP/s"),
    "fp8": (1e12, "peak rate of dense fp8 matrix products, TFLOP/s"),
    "hbm": (1e12, "memory bandwidth, TB/s"),
    "nvlink": (1e9, "bandwidth to GPUs of the same node, one direction, GB/s"),
    "network": (1e9, "bandwidth to other nodes, one direction, GB/s"),
    "efficiency": (1, "fraction of the peak rate that matrix products reach in training (calibration)"),
}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the command."""
    add_run(parser)
    parser.add_argument(
        "--gpu", default="h100", help=f"{', '.join(GPUS)}, or another name with --memory, --bf16, ... [%(default)s]"
    )
    parser.add_argument("--json", type=Path, help="JSON file to write all results to")
    parser.add_argument("--price", type=float, help="price of one GPU hour, in any currency")
    parser.add_argument("--top", type=positive_integer, default=8, help="number of layouts to show [%(default)s]")
    numbers = parser.add_argument_group("properties of the GPU (each replaces the known value of --gpu)")
    for name, (_, text) in GPU_NUMBERS.items():
        numbers.add_argument(f"--{name}", type=positive_number, help=text)
    numbers.add_argument("--per-node", type=positive_integer, help="number of GPUs per node")


def add_run(parser: argparse.ArgumentParser) -> None:
    """Adds the options that describe a run on GPUs that are not here."""
    add_configuration(parser)
    parser.add_argument("--gpus", type=positive_integer, required=True, help="number of GPUs")
    parser.add_argument("--model", help=f"model to use instead of model.path: a folder, or {', '.join(PRESETS)}")
    parser.add_argument("--prompt-tokens", type=positive_integer, help="assumed median length of prompts, tokens")
    parser.add_argument("--response-tokens", type=positive_integer, help="assumed median length of responses, tokens")
    parser.add_argument(
        "--pairs", type=positive_integer, help="assumed number of pairs of an epoch, if the data is not available"
    )


def run(options: argparse.Namespace) -> None:
    """Prints the plan. Raises the errors of `megatron_spo.planner.plan.plan`."""
    from megatron_spo.planner.plan import plan

    print(plan(read_options(options)))


def read_options(given: argparse.Namespace) -> Options:
    """Converts parsed arguments to `Options`."""
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
