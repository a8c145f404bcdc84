"""Imports Megatron-Core faster, without optional parts that this package does not use.

`import megatron.core` (0.16.1) imports optional packages for features that are not used here, and calls `torch.compile`
on functions that are rarely called. Together this is more than a third of the start-up time of a training run. While
`import_megatron()` imports it, the packages in `HIDDEN` cannot be imported, as if they were not installed, and
`torch.compile` is deferred until a function is called. Afterwards both are restored: `import wandb` finds wandb.
`import megatron.core` without this function also works, but takes longer.
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
"""Packages that Megatron-Core 0.16.1 imports if they are installed, and where it uses them."""

_compile = torch.compile


def compile_when_called(model: Any = None, **options: Any) -> Any:
    """Replaces `torch.compile`: compiles a function when it is first called.

    Megatron decorates about thirty functions with it, which imports torch's compiler. On a CPU, layers of torch call
    none of them; on a GPU, those that are called are compiled as before.
    """
    if model is None:
        return functools.partial(compile_when_called, **options)
    if not isinstance(model, type(import_megatron)):  # only plain functions can be deferred
        return _compile(model, **options)
    compiled: Callable[..., Any] | None = None

    @functools.wraps(model)
    def call(*arguments: Any, **named: Any) -> Any:
        nonlocal compiled
        if torch.compiler.is_compiling():  # the caller is being compiled, and this function becomes part of it
            return model(*arguments, **named)
        compiled = compiled or _compile(model, **options)
        return compiled(*arguments, **named)

    return call


def import_megatron() -> None:
    """Imports `megatron.core` unless it has been imported already.

    Raises:
        RuntimeError: Megatron-Core no longer compiles its functions through `torch.compile`.
    """
    if "megatron.core" in sys.modules:
        return
    hidden = [package for package in HIDDEN if package not in sys.modules]
    try:
        for package in hidden:
            sys.modules[package] = None  # type: ignore[assignment]  # importing it raises ImportError now
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
