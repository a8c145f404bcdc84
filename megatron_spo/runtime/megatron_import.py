"""Imports Megatron-Core without what this package never uses of it.

`import megatron.core` (0.16.1) imports optional packages for features that are not used here, and calls
`torch.compile` on functions that are rarely called; together more than a third of the start of a training. While
`import_megatron()` imports it, the packages in `HIDDEN` cannot be imported, as if they were not installed, and
`torch.compile` puts its work off until the function is called. Afterwards both are as they were: `import wandb` finds
wandb. `import megatron.core` without this function works as well, and takes longer.
"""

import functools
import sys
from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch

HIDDEN = {
    "wandb": "inference/contexts/dynamic_context.py and timers.py: the writers of its inference engine and its timers",
    "tensorboard": "timers.py: the same",
}
"""Packages that Megatron-Core 0.16.1 imports if they are installed, and for what."""

_compile = torch.compile


def compile_when_called(model: Any = None, **options: Any) -> Any:
    """`torch.compile`, but a function is compiled when it is first called.

    Megatron decorates some thirty functions with it, which imports torch's compiler. Layers of torch call none of them
    on a CPU; on a GPU those that are called are compiled as before.
    """
    if model is None:
        return functools.partial(compile_when_called, **options)
    if not isinstance(model, type(import_megatron)):  # only plain functions can wait
        return _compile(model, **options)
    compiled: Callable[..., Any] | None = None

    @functools.wraps(model)
    def call(*arguments: Any, **named: Any) -> Any:
        nonlocal compiled
        if torch.compiler.is_compiling():  # called by a function that is being compiled, and becomes part of it
            return model(*arguments, **named)
        compiled = compiled or _compile(model, **options)
        return compiled(*arguments, **named)

    return call


def import_megatron() -> None:
    """Import `megatron.core`, unless it has been imported already.

    Raises:
        RuntimeError: Megatron-Core no longer compiles its functions through `torch.compile`.
    """
    if "megatron.core" in sys.modules:
        return
    hidden = [package for package in HIDDEN if package not in sys.modules]
    try:
        for package in hidden:
            sys.modules[package] = None  # type: ignore[assignment]  # importing it is an ImportError now
        torch.compile = compile_when_called
        import_module("megatron.core")
        jit = import_module("megatron.core.jit")
    finally:
        torch.compile = _compile
        for package in hidden:
            del sys.modules[package]
    if getattr(jit, "jit_fuser", None) is not compile_when_called:
        raise RuntimeError("megatron.core.jit.jit_fuser is no longer torch.compile; update runtime/megatron_import.py")


import_megatron()
