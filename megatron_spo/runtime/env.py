"""The only place of environment variables: what the launcher (torchrun, or nothing) says about this process."""

import os
import time
from pathlib import Path

STARTED = time.monotonic()
"""When this process began, near enough: the commands import this module first."""


def _integer(name: str, default: int) -> int:
    return int(os.environ.get(name, default))


def launched() -> bool:
    """Whether a launcher such as torchrun started this process."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def has_agent() -> bool:
    """Whether torchrun's agent watches over this process: it hands on the signals that it gets."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def main_address() -> str:
    """Where the process of rank 0 runs."""
    return os.environ.get("MASTER_ADDR", "127.0.0.1")


def world_size() -> int:
    """Number of processes of the job."""
    return _integer("WORLD_SIZE", 1)


def rank() -> int:
    """Index of this process in the job."""
    return _integer("RANK", 0)


def local_rank() -> int:
    """Index of this process on its node."""
    return _integer("LOCAL_RANK", 0)


def one_queue_per_gpu() -> None:
    """Let a GPU begin its work in the order in which it was asked for, unless the user has said otherwise.

    Megatron's tensor parallelism counts on it to hide communication behind products (megatron-core 0.16.1,
    tensor_parallel/layers.py). Read when the GPU is first used.
    """
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")


def local_world_size() -> int:
    """Number of processes of the job on this node."""
    return _integer("LOCAL_WORLD_SIZE", 1)


def wandb_project() -> str:
    """Returns the project of Weights & Biases to log to: WANDB_PROJECT, or "megatron-spo" if that is not set."""
    return os.environ.get("WANDB_PROJECT") or "megatron-spo"


def datasets_cache() -> Path:
    """Where Hugging Face `datasets` keeps its files (its config.HF_DATASETS_CACHE), without importing it."""
    home = os.path.join(os.environ.get("XDG_CACHE_HOME", "~/.cache"), "huggingface")
    home = os.path.expanduser(os.environ.get("HF_HOME", home))
    return Path(os.environ.get("HF_DATASETS_CACHE", os.path.join(home, "datasets")))
