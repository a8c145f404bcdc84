"""The differences between the versions of Megatron-Core that this package supports; no other module depends on them.

Each is found by a feature of the installed version, not by its number. Importing this module imports neither torch nor
Megatron.
"""

import importlib.util
import sys
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

TESTED = ("0.16.1", "0.17.1", "0.18.2", "0.19.2")
"""Versions that the tests were run with. setup.py allows all patch releases of these minor versions."""

_KERNELS = ("transformer.moe.ops.paged_stash", "transformer.moe.paged_stash")
"""Modules that import Triton without a check: in 0.19 the first one, in 0.18 the second, before neither exists."""


class _WithoutTriton(ModuleType):
    """Replaces a module of Triton kernels; calling one of them is an error."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)

        def unavailable(*_: Any, **__: Any) -> None:
            raise RuntimeError(f"{self.__name__}.{name} requires Triton, which is not installed")

        return unavailable


def import_without_triton() -> None:
    """Lets Megatron-Core be imported if Triton is not installed, as with CPU builds of torch.

    The kernels belong to the key `moe_paged_stash` of Megatron's configuration, which this package does not set.
    """
    package = importlib.util.find_spec("megatron")  # "megatron.core" would import this one
    if package is None or importlib.util.find_spec("triton") is not None:
        return
    for folder in package.submodule_search_locations or []:
        for name in _KERNELS:
            if Path(folder, "core", *name.split(".")).with_suffix(".py").exists():
                module = f"megatron.core.{name}"
                sys.modules.setdefault(module, _WithoutTriton(module))
                return


def own_writer() -> dict[str, str]:
    """Returns the arguments of `async_save` for Megatron's own writer; 0.17 and later prefer that of
    nvidia-resiliency-ext."""
    import inspect

    from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

    known = inspect.signature(TorchDistSaveShardedStrategy.async_save).parameters
    return {"async_strategy": "mcore"} if "async_strategy" in known else {}


def submodules(part: Any) -> Any:
    """Returns the submodules of a part of a layer's spec, which is a ModuleSpec or, in 0.18 and later, a partial."""
    return part.keywords["submodules"] if isinstance(part, partial) else part.submodules


def mark_tensor_parallel(weight: Any, axis: int) -> None:
    """Marks a weight of Megatron's layers as the part of a larger one, split along `axis`.

    In 0.18 and later the layers do it themselves; before, only if they also initialise the weight.
    """
    from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes

    if not hasattr(weight, "tensor_model_parallel"):
        set_tensor_model_parallel_attributes(weight, is_parallel=True, dim=axis, stride=1)
