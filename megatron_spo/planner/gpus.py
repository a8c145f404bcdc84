"""Properties of GPU types, with one calibration number each."""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from megatron_spo.errors import UserError

GIB = 2**30
ACHIEVED_BANDWIDTH = 0.8
"""Assumed fraction of the bandwidth of memory or links that large transfers reach, the same for all GPUs."""


@dataclass(frozen=True)
class Gpu:
    """One type of GPU.

    Attributes:
        memory: bytes available to a process.
        bf16, fp8: peak FLOP/s of dense matrix products from the data sheet; fp8 is None if not supported.
        hbm, nvlink, network: bandwidth in bytes per second and one direction, of the memory, to GPUs of the same node,
            and to other nodes.
        per_node: GPUs per node.
        efficiency: calibration: fraction of the peak that the matrix products of a training step reach.
        source: source of `efficiency`.
    """

    name: str
    memory: float
    bf16: float
    fp8: float | None
    hbm: float
    nvlink: float
    network: float
    per_node: int
    efficiency: float
    source: str


_HOPPER = "1638 tokens/s/GPU of Llama-3-70B SFT in FP8 on 32 H100 (Megatron-Bridge performance summary 26.06)"

GPUS: Mapping[str, Gpu] = MappingProxyType(
    {
        "h100": Gpu("h100", 79.1 * GIB, 989e12, 1979e12, 3.35e12, 450e9, 50e9, 8, 0.585, _HOPPER),
        "h200": Gpu("h200", 139.8 * GIB, 989e12, 1979e12, 4.8e12, 450e9, 50e9, 8, 0.585, f"the H100's: {_HOPPER}"),
        "b200": Gpu(
            "b200", 178.3 * GIB, 2250e12, 4500e12, 8e12, 900e9, 50e9, 8, 0.49,
            "30624 tokens/s/GPU of Llama-3-8B in FP8 on 8 B200 (Megatron-Bridge performance summary 25.11)",
        ),
        "a100": Gpu(
            "a100", 79.2 * GIB, 312e12, None, 2.04e12, 300e9, 25e9, 8, 0.619,
            "13.75 s per step of a GPT of 175 billion parameters on 64 A100 (arXiv 2205.05198, table 5)",
        ),
    }
)  # fmt: skip


def cpu_remark(gpus: int) -> str:
    """Returns what this machine has instead of the GPU that a plan for one GPU is for; empty if it has one."""
    if gpus > 1 or shutil.which("nvidia-smi"):
        return ""
    return "no GPU: a CPU takes some thousand times as long, and needs the memory in RAM"


def find_gpu(name: str, changes: Mapping[str, float | int]) -> Gpu:
    """Returns the GPU with the given name and changed properties. A name that is not known needs all properties.

    Raises:
        UserError: the name is not known and properties are missing.
    """
    values = {key: value for key, value in changes.items() if value is not None}
    known = GPUS.get(name.lower())
    if known is not None:
        source = {"source": "given by the user"} if "efficiency" in values else {}
        return Gpu(**{**vars(known), **values, **source})
    needed = {"memory", "bf16", "hbm", "nvlink", "network", "efficiency"}
    if absent := sorted(needed - set(values)):
        options = ", ".join(f"--{key}" for key in absent)
        raise UserError(f"--gpu {name} is not one of {', '.join(GPUS)}; for another GPU also give {options}")
    return Gpu(**{"name": name, "fp8": None, "per_node": 8, "source": "given by the user", **values})  # type: ignore[arg-type]
