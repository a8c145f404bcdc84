"""Lets Megatron-Core run without a GPU.

Megatron-Core uses CUDA by name in many places, though all of its arithmetic and communication works on CPU tensors with
gloo. `install()` redirects these uses to the CPU. It changes only the names listed in `BRIDGED`, hides the packages in
`HIDDEN`, does nothing if a GPU is present, and raises an error if a listed name no longer exists.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

CPU = torch.device("cpu")


def _names_cuda(device: Any) -> bool:
    if isinstance(device, torch.device):
        return device.type == "cuda"
    if isinstance(device, str):
        return device.startswith("cuda")
    return isinstance(device, int) and not isinstance(device, bool)


class _CudaMeansCpu(TorchFunctionMode):
    """Rewrites a CUDA `device` argument of any torch function to the CPU.

    Megatron-Core 0.16.1 has device="cuda" in its schedules, gradient clipping and optimizer, and compares
    `Tensor.type()` with "torch.cuda.FloatTensor" in the distributed optimizer.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            return func(*args).replace("torch.", "torch.cuda.")
        if "device" in kwargs and _names_cuda(kwargs["device"]):
            kwargs = {**kwargs, "device": CPU}
        if func is torch.Tensor.to and len(args) > 1 and _names_cuda(args[1]):
            args = (args[0], CPU, *args[2:])
        return func(*args, **kwargs)


class _NoStream:
    """Replaces a CUDA stream; work on a CPU has only one order."""

    def wait_stream(self, other: Any) -> None:
        return None

    def synchronize(self) -> None:
        return None


def _unless_alone(operation: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a collective operation of Megatron that does nothing for one process if its output is its input."""

    def call(output: torch.Tensor, given: torch.Tensor, *, group: Any, **options: Any) -> Any:
        if torch.distributed.get_world_size(group) == 1 and output.data_ptr() == given.data_ptr():
            return None
        return operation(output, given, group=group, **options)

    return call


def _scale(chunk_size: int, overflow: Any, tensors: list[list[torch.Tensor]], factor: float) -> None:
    """Writes each tensor of the first list times `factor` into that of the second list."""
    for source, target in zip(*tensors, strict=True):
        torch.mul(source, factor, out=target)


@dataclass(frozen=True)
class Bridged:
    """A replaced name of a module or a class in it, its replacement, and the reason (seen in megatron-core 0.16.1)."""

    module: str
    name: str
    answer: Any
    why: str


BRIDGED = (
    Bridged("torch.cuda", "current_device", lambda: CPU, "device of buffers in p2p, optimizer, rotary embedding"),
    Bridged("torch.cuda", "synchronize", lambda *a, **k: None, "called after batched p2p and in timers"),
    Bridged("torch.cuda", "current_stream", lambda *a, **k: _NoStream(), "used by overlap and checkpoint code"),
    Bridged("torch.cuda", "Stream", _NoStream, "made by the token dispatcher of a mixture of experts"),
    Bridged(
        "torch.cuda", "FloatTensor", torch.FloatTensor, "optimizer/clip_grads.py makes one-element tensors with it"
    ),
    Bridged("torch.cuda", "get_rng_state", lambda *a, **k: torch.get_rng_state(), "random-number tracker"),
    Bridged("torch.cuda", "set_rng_state", lambda state, *a, **k: torch.set_rng_state(state), "random-number tracker"),
    Bridged(
        "torch.cuda",
        "manual_seed",
        lambda seed: torch.random.default_generator.manual_seed(seed),
        "random-number tracker",
    ),
    Bridged(
        "megatron.core.tensor_parallel.random",
        "_set_cuda_rng_state",
        lambda state, *a, **k: torch.set_rng_state(state),
        "random-number tracker",
    ),
    Bridged(
        "megatron.core.tensor_parallel.random",
        "_get_cuda_rng_state",
        lambda *a, **k: torch.get_rng_state(),
        "random-number tracker",
    ),
    *(
        Bridged(
            "megatron.core.distributed.param_and_grad_buffer",
            name,
            _unless_alone(operation),
            "gloo copies all weights or gradients, also if there is one process (a fifth of a step of 0.6B parameters)",
        )
        for name, operation in (
            ("dist_reduce_scatter_func", torch.distributed.reduce_scatter_tensor),
            ("dist_all_gather_func", torch.distributed.all_gather_into_tensor),
        )
    ),
    Bridged(
        "megatron.core.optimizer.clip_grads",
        "multi_tensor_scale_impl",
        _scale,
        "Megatron's own creates a new tensor for each gradient that is clipped (six times as slow)",
    ),
    *(
        Bridged(
            "torch.optim",
            f"Optimizer.{name}",
            getattr(torch.optim.Optimizer, name).__wrapped__,
            "torch 2.13 keeps torch.compile out of it, and imports the compiler for that; no optimizer is compiled",
        )
        for name in ("add_param_group", "state_dict", "load_state_dict")
    ),
)

HIDDEN = ("transformer_engine", "apex", "amp_C")
"""Packages of GPU kernels that Megatron-Core 0.16.1 prefers if they are installed (Adam in optimizer/__init__.py, the
norm in optimizer/clip_grads.py), even if there is no GPU or CUDA_VISIBLE_DEVICES hides it."""

_mode: _CudaMeansCpu | None = None


def install() -> bool:
    """Let Megatron-Core 0.16 run on a CPU with gloo, where torch sees no GPU.

    Requests for CUDA are answered with the CPU. Call it before Megatron's process groups, model and optimizer are
    built, and before `megatron.core` is imported where Transformer Engine or apex is installed. Further calls change
    nothing. Build the model with `use_cpu_initialization=True` and without fused kernels.

    Returns:
        Whether the bridge is in place; False where there is a GPU.

    Raises:
        RuntimeError: a name of torch or Megatron-Core that is replaced does not exist in the installed version.
    """
    global _mode
    if torch.cuda.is_available():
        return False
    if _mode is None:
        for package in HIDDEN:
            sys.modules.setdefault(package, None)  # type: ignore[arg-type]  # importing it raises ImportError now
        for entry in BRIDGED:
            owner, name = import_module(entry.module), entry.name
            if "." in name:
                of, name = name.split(".")
                owner = getattr(owner, of)
            if not hasattr(owner, name):
                raise RuntimeError(
                    f"{entry.module}.{entry.name} no longer exists; update runtime/cpu_bridge.py ({entry.why})"
                )
            setattr(owner, name, entry.answer)
        _mode = _CudaMeansCpu()
        _mode.__enter__()
    return True
