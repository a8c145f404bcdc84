"""Counts the operators of a training step, which do not depend on the load of the machine."""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

FETCHES = ("item", "tolist", "cpu", "numpy", "nonzero", "__float__", "__int__", "__bool__", "__index__")
"""Methods of a tensor that wait for the GPU."""


class Operators(TorchDispatchMode):
    """Counts collectives by name, and records the largest tensor that an operator returned, except `known` sizes."""

    def __init__(self, known: Sequence[int] = ()) -> None:
        super().__init__()
        self.collectives: Counter[str] = Counter()
        self.largest, self._known = 0, set(known)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.namespace == "c10d":
            self.collectives[func._opname] += 1
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor) and leaf.numel() not in self._known:
                self.largest = max(self.largest, leaf.numel())
        return out


class Fetches(TorchFunctionMode):
    """Counts how often Python reads the numbers of a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = (resolve_name(func) or "").rpartition(".")[2]
        if name in FETCHES:
            self.count[name] += 1
        return func(*args, **(kwargs or {}))


def inside_steps(modes: Sequence[Any]) -> Callable[..., Any]:
    """Returns `Engine.train_step` with the i-th call under the i-th mode."""
    from megatron_spo.train.step import Engine

    step, left = Engine.train_step, iter(modes)

    def counted(*arguments: Any, **named: Any) -> Any:
        with next(left):
            return step(*arguments, **named)

    return counted
