"""The device of this process: its name, its memory, what it can run, and copying arrays to it."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
import torch
from numpy.typing import NDArray
from torch import Tensor

from megatron_spo.config.fp8 import obstacle
from megatron_spo.config.schema import PrecisionConfig
from megatron_spo.errors import UserError
from megatron_spo.runtime import env

CGROUP_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
"""Files with the memory limit of a container, in bytes (cgroup versions 2 and 1); "max" means no limit."""


def to_device(array: NDArray[Any], device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """Copies `array` to `device`; to a GPU from pinned memory, so that the process need not wait for the copy."""
    tensor = torch.from_numpy(array).to(dtype).contiguous()
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def name_of(device: torch.device) -> str:
    """Returns the name of a GPU according to its driver, or "cpu"."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def free_memory_of(device: torch.device) -> int:
    """Returns the bytes that other programs leave of a GPU, or of this machine within the cgroup of this process."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    limits = [path.read_text().strip() for path in CGROUP_LIMITS if path.exists()]
    return min([psutil.virtual_memory().available, *(int(limit) for limit in limits if limit.isdigit())])


def uses_transformer_engine(precision: PrecisionConfig, *, experts: bool = False) -> bool:
    """Returns whether the layers are Transformer Engine's; call `check_device` first. Layers with experts never are."""
    if precision.layers == "auto" and precision.fp8 is None:
        return not experts and precision.dtype == "bf16" and torch.cuda.is_available() and have_engine()
    return precision.layers != "torch"


def check_device(precision: PrecisionConfig) -> None:
    """Checks that this process can run the configured layers and fp8 recipe.

    Raises:
        UserError: there is no GPU, it does not support the recipe, Transformer Engine cannot be imported, or torch is
            too old.
    """
    if torch.cuda.is_available() and precision.dtype == "bf16" and find_spec("torch.nn.attention.varlen") is None:
        raise UserError(
            f"bf16 on a GPU requires the attention kernel of torch 2.10 or later, but torch is {torch.__version__}; "
            "upgrade it, or set precision.dtype=fp32"
        )
    if not uses_transformer_engine(precision):
        return
    remedy = "set precision.fp8=null precision.layers=torch"
    if not torch.cuda.is_available():
        raise UserError(
            f"{precision.reason} needs an NVIDIA GPU, but torch finds none (see megatron-spo doctor); {remedy}"
        )
    if not have_engine():
        raise UserError(
            f"{precision.reason} needs Transformer Engine, which cannot be imported; build it for this torch "
            f"(pip install --no-build-isolation -e '.[gpu]'), or {remedy}"
        )
    if precision.fp8 is None:
        return
    capability = torch.cuda.get_device_capability()
    if why := obstacle(precision.fp8, capability, str(torch.version.cuda)):
        raise UserError(
            f"precision.fp8 = {precision.fp8} cannot run on this {torch.cuda.get_device_name()} (compute capability "
            f"{capability[0]}.{capability[1]}): {why}; choose one of the recipes that megatron-spo doctor lists"
        )


def can_compile() -> bool:
    """Returns whether torch.compile can make kernels for the GPU of this process."""
    return torch.cuda.is_available() and find_spec("triton") is not None and env.c_compiler() is not None


def have_engine() -> bool:
    """Returns whether Megatron-Core can import Transformer Engine; the layers are Megatron-Core's wrappers of it."""
    from megatron.core.extensions.transformer_engine import HAVE_TE  # after the bridge: importing it touches torch.cuda

    return bool(HAVE_TE)
