"""Reads environment variables, such as those set by a launcher (torchrun, srun). No other module reads them."""

import os
import shutil
import socket
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


def in_slurm() -> bool:
    """Returns whether this process belongs to a SLURM job."""
    return "SLURM_JOB_ID" in os.environ


def host() -> str:
    """Returns the name of this machine, as SLURM names it in a SLURM job."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


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


def cpu_threads() -> int:
    """Returns OMP_NUM_THREADS if it was set by a person, else this process's share of the cores of the node.

    torchrun sets it to 1 for several processes unless it is set.
    """
    given = _integer("OMP_NUM_THREADS", 0)
    if given > 1 or given == 1 and not has_agent():
        return given
    cores = os.cpu_count() or 1
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else cores  # SLURM may bind a process
    return max(1, min(bound, cores // local_world_size()))


def yield_soon() -> None:
    """Lets waiting CPU threads sleep after some microseconds, unless the user has set for how long they are to spin.

    By default they spin for milliseconds; on a machine with other work they then use the core that the others need: a
    forward pass of a model with 0.5 billion parameters took five times as long. GNU OpenMP reads the variable when
    torch is imported.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "3000")


def c_compiler() -> str | None:
    """Returns the path of the C compiler that Triton would use: CC, else gcc or clang; None if there is none."""
    given = os.environ.get("CC")
    return shutil.which(given) if given else shutil.which("gcc") or shutil.which("clang")


def local_world_size() -> int:
    """Returns the number of processes of the job on this node."""
    return _integer("LOCAL_WORLD_SIZE", 1)


def node_name() -> str:
    """Returns the name of this node in SLURM, or "" outside of a job."""
    return os.environ.get("SLURMD_NODENAME", "")


def job_variables() -> dict[str, str]:
    """Returns the variables of the job scripts (SPO_*) that are set."""
    return {name: value for name, value in os.environ.items() if name.startswith("SPO_")}


def wandb_project() -> str:
    """Returns the project of Weights & Biases to log to: WANDB_PROJECT, or "megatron-spo" if that is not set."""
    return os.environ.get("WANDB_PROJECT") or "megatron-spo"


def datasets_cache() -> Path:
    """Returns the cache folder of Hugging Face `datasets` (its config.HF_DATASETS_CACHE) without importing it."""
    home = os.path.join(os.environ.get("XDG_CACHE_HOME", "~/.cache"), "huggingface")
    home = os.path.expanduser(os.environ.get("HF_HOME", home))
    return Path(os.environ.get("HF_DATASETS_CACHE", os.path.join(home, "datasets")))


def hide_gpus() -> None:
    """Makes this process behave as on a machine without a GPU; call it before torch is imported."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
