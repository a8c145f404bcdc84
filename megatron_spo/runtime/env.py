"""Reads environment variables, such as those set by a launcher (torchrun, srun). No other module reads them."""

import os
import shutil
import time
from pathlib import Path

STARTED = time.monotonic()
"""Approximate start time of this process (monotonic seconds): commands import this module first."""


def _integer(name: str, default: int) -> int:
    return int(os.environ.get(name, default))


def launched() -> bool:
    """Returns whether a launcher such as torchrun started this process."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def has_agent() -> bool:
    """Returns whether torchrun's agent supervises this process; the agent forwards the signals it receives."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def main_address() -> str:
    """Returns the address of the machine that runs rank 0."""
    return os.environ.get("MASTER_ADDR", "127.0.0.1")


def world_size() -> int:
    """Returns the number of processes of the job."""
    return _integer("WORLD_SIZE", 1)


def rank() -> int:
    """Returns the index of this process in the job."""
    return _integer("RANK", 0)


def local_rank() -> int:
    """Returns the index of this process on its node."""
    return _integer("LOCAL_RANK", 0)


def one_queue_per_gpu() -> None:
    """Sets CUDA_DEVICE_MAX_CONNECTIONS=1 unless it is set, so that a GPU starts its work in the order of submission.

    Megatron's tensor parallelism relies on it to overlap communication with matrix products (megatron-core 0.16.1,
    tensor_parallel/layers.py). The variable is read when the GPU is first used.
    """
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")


def use_fp32() -> None:
    """Unsets NVIDIA_TF32_OVERRIDE=1, with which cuBLAS would compute fp32 products in TF32, whatever torch is set to.

    The variable is read when the GPU is first used.
    """
    if os.environ.get("NVIDIA_TF32_OVERRIDE") == "1":
        del os.environ["NVIDIA_TF32_OVERRIDE"]


def c_compiler() -> str | None:
    """Returns the path of the C compiler that Triton would use: CC, else gcc or clang; None if there is none."""
    given = os.environ.get("CC")
    return shutil.which(given) if given else shutil.which("gcc") or shutil.which("clang")


def local_world_size() -> int:
    """Returns the number of processes of the job on this node."""
    return _integer("LOCAL_WORLD_SIZE", 1)


def wandb_project() -> str:
    """Returns the project of Weights & Biases to log to: WANDB_PROJECT, or "megatron-spo" if that is not set."""
    return os.environ.get("WANDB_PROJECT") or "megatron-spo"


def datasets_cache() -> Path:
    """Returns the cache folder of Hugging Face `datasets` (its config.HF_DATASETS_CACHE) without importing it."""
    home = os.path.join(os.environ.get("XDG_CACHE_HOME", "~/.cache"), "huggingface")
    home = os.path.expanduser(os.environ.get("HF_HOME", home))
    return Path(os.environ.get("HF_DATASETS_CACHE", os.path.join(home, "datasets")))
