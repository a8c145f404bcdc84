"""Observes a training step on fake tensors: memory, communication, and where the process would wait for the GPU.

Fake tensors have shapes but no data. torch can only compute gradients of fake CUDA tensors if it is built for CUDA, so
these are fake CPU tensors that answer True to `is_cuda`. Tensors that would be in the memory of the host are excluded:
those made from Python numbers or NumPy arrays, and what is computed from them alone.
"""

import sys
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map_only

from megatron_spo.rehearsal.kernels import FUNCTIONS, OPERATORS

BLOCK = 512
"""The GPU's allocator rounds sizes up to multiples of this (c10/cuda/CUDACachingAllocator.h)."""
WAITING = {"aten::nonzero", "aten::masked_select", "aten::unique_dim", "aten::_unique2"}
"""Operators whose result has a size that only the GPU knows."""
PACKAGES = ("megatron_spo", "megatron/core")


@dataclass
class Memory:
    """Bytes of the tensors on the GPU: now, the maximum, and where it was reached."""

    now: int = 0
    peak: int = 0
    at_peak: str = ""
    _known: "weakref.WeakKeyDictionary[Any, int]" = field(default_factory=weakref.WeakKeyDictionary)

    def see(self, tensor: Tensor, operator: str) -> None:
        """Counts the storage of a tensor until it is freed, unless it is already counted."""
        storage = tensor.untyped_storage()
        if storage in self._known:
            return
        size = -(-storage.nbytes() // BLOCK) * BLOCK
        self._known[storage] = size
        self.now += size
        if self.now > self.peak:
            self.peak, self.at_peak = self.now, f"{operator.removeprefix('aten::')} in {place()}"
        weakref.finalize(storage, self._free, size)

    def _free(self, size: int) -> None:
        self.now -= size


@dataclass(frozen=True)
class Exchange:
    """A kind of communication: the operation and the name of the process group."""

    kind: str
    group: str


class Watch(TorchDispatchMode):
    """Counts storages, communication and waits of the operators that run within the context.

    Attributes:
        memory: bytes of tensors.
        calls, sent: number of calls and bytes of each exchange.
        waits: number of times that the process waited for the GPU, by what and where.
        selected: number of experts per token; the size of a selection by a router's map [experts, tokens] follows.
    """

    def __init__(self, groups: dict[tuple[int, ...], str], *, selected: int = 0) -> None:
        super().__init__()
        self.memory = Memory()
        self.calls, self.sent = Counter[Exchange](), Counter[Exchange]()
        self.waits = Counter[tuple[str, str]]()
        self._groups, self._selected = groups, selected
        self._on_host: weakref.WeakSet[Any] = weakref.WeakSet()

    def start_step(self) -> None:
        """Forgets the communication and waits so far."""
        for counts in (self.calls, self.sent, self.waits):
            counts.clear()

    def wait(self, what: str) -> None:
        """Records that the process waits for the GPU here."""
        self.waits[what, place()] += 1

    def keep_on_host(self, tensor: Tensor) -> None:
        """Marks a tensor as one in the memory of the host."""
        self._on_host.add(tensor.untyped_storage())

    def is_on_host(self, tensor: Tensor) -> bool:
        return not _is_fake(tensor) or tensor.untyped_storage() in self._on_host

    def exchange(self, kind: str, group: str, size: int) -> None:
        """Records one call of a communication of `size` bytes."""
        self.calls[Exchange(kind, group)] += 1
        self.sent[Exchange(kind, group)] += size

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.name()
        if name.startswith("c10d::"):
            return self._communicate(func, name, args)
        inputs = [one for one in tree_iter((args, kwargs)) if isinstance(one, Tensor)]
        on_host = bool(inputs) and all(self.is_on_host(one) for one in inputs)
        if name == "aten::_local_scalar_dense" and _is_fake(args[0]):
            if not on_host:
                self.wait("item")
            return 1.0 if args[0].is_floating_point() else 1
        if name in WAITING and not on_host:
            self.wait(name.removeprefix("aten::"))
        result = self._result(func, name, args, kwargs or {})
        for tensor in tree_iter(result):
            if isinstance(tensor, Tensor):
                if on_host:
                    self.keep_on_host(tensor)
                else:
                    self.memory.see(tensor, name)
        return result

    def _result(self, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if name in OPERATORS:
            return OPERATORS[name](*args, **kwargs)
        if name == "aten::masked_select":
            return args[0].new_empty(args[1].shape[-1] * self._selected)
        return func(*args, **kwargs)

    def _communicate(self, func: Any, name: str, args: tuple[Any, ...]) -> Any:
        """Counts a collective by the larger of what goes in and what comes out, and returns at once."""
        sides = [sum(one.nbytes for one in tree_iter(side) if isinstance(one, Tensor)) for side in args]
        ranks = next(
            dist.get_process_group_ranks(dist.ProcessGroup.unbox(one))
            for one in args
            if isinstance(one, torch.ScriptObject) and "ProcessGroup" in str(one._type())
        )
        if len(ranks) > 1:
            self.exchange(_kind(name), self._groups.get(tuple(ranks), f"{len(ranks)} ranks"), max(sides))
        work = torch._C._distributed_c10d.FakeWork().boxed()
        return work if len(func._schema.returns) == 1 else (args[0], work)


KINDS = {
    "reduce_scatter": "reduce-scatter",
    "allgather": "all-gather",
    "allreduce": "all-reduce",
    "alltoall": "all-to-all",
    "broadcast": "broadcast",
    "send": "send",
    "recv": "recv",
}
"""Beginning of the name of torch's operator -> name of the communication."""


def _kind(name: str) -> str:
    plain = name.removeprefix("c10d::").lstrip("_")
    return next((kind for beginning, kind in KINDS.items() if plain.startswith(beginning)), plain)


class GpuBranches(TorchFunctionMode):
    """Takes the branches of a GPU: tensors say that they are on one, and copies to and from it are watched."""

    def __init__(self, watch: Watch) -> None:
        super().__init__()
        self._watch = watch

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in FUNCTIONS:
            return FUNCTIONS[func](*args, **kwargs)
        if func == torch.Tensor.is_cuda.__get__:  # type: ignore[attr-defined]
            return not self._watch.is_on_host(args[0])
        if func is torch.autograd.backward:
            with self:  # autograd calls the functions of the backward pass in the modes of this call
                return _run_backward(*args, **kwargs)
        if func is torch.Tensor.pin_memory:
            return args[0]
        if func is torch.tensor:
            return self._from_numbers(args, kwargs)
        if (
            func in (torch.Tensor.to, torch.Tensor.cuda)
            and self._watch.is_on_host(args[0])
            and _to_gpu(func, args, kwargs)
        ):
            if not kwargs.get("non_blocking"):
                self._watch.wait("copy from pageable memory")
            return torch.empty(args[0].shape, dtype=args[0].dtype, device="cuda")
        if func is torch.Tensor.cpu and not self._watch.is_on_host(args[0]):
            self._watch.wait("copy to the host")
            return _of_ones(args[0])
        return func(*args, **kwargs)

    def _from_numbers(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """Makes a tensor from numbers. On a GPU this copies pageable memory; the device of another fake tensor, which
        is a torch.device, stands for the GPU."""
        device = kwargs.get("device")
        numbers = tree_map_only(Tensor, torch.Tensor.item, args[0])  # an item of a tensor on the GPU is a wait
        made = torch.tensor(numbers, *args[1:], **kwargs)
        if device is None or device == "cpu" and isinstance(device, str):
            self._watch.keep_on_host(made)
        else:
            self._watch.wait("copy from pageable memory")
        return made


def _run_backward(tensors: Any, grad_tensors: Any = None, **_: Any) -> None:
    """Does what torch.autograd.backward does for one tensor, which would leave the modes."""
    (tensor,) = tensors if isinstance(tensors, tuple) else (tensors,)
    (given,) = grad_tensors if isinstance(grad_tensors, tuple) else (grad_tensors,)
    gradient = torch.ones_like(tensor) if given is None else given
    torch.autograd.Variable._execution_engine.run_backward(
        (tensor,), (gradient,), False, False, (), allow_unreachable=True, accumulate_grad=True
    )


def _to_gpu(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    devices = [one for one in (*args[1:], *kwargs.values()) if isinstance(one, torch.device)]
    return func is torch.Tensor.cuda or any(device.type == "cuda" for device in devices)


def _is_fake(tensor: Tensor) -> bool:
    from torch._subclasses.fake_tensor import FakeTensor

    return isinstance(tensor, FakeTensor)


def real(array: NDArray[Any]) -> Tensor:
    """Returns a tensor with the data of an array, in the memory of the host."""
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    with unset_fake_temporarily():
        return torch.from_numpy(np.ascontiguousarray(array))


def _of_ones(tensor: Tensor) -> Tensor:
    """Returns a real tensor of this shape."""
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    with unset_fake_temporarily():
        return torch.ones(tuple(tensor.shape), dtype=tensor.dtype)


@contextmanager
def watching_lists(watch: Watch) -> Iterator[None]:
    """Lets `tolist` of a tensor on the GPU count as one wait, not as one per element."""
    from torch._subclasses.fake_tensor import FakeTensor

    def tolist(self: Tensor) -> Any:
        if not watch.is_on_host(self):
            watch.wait("tolist")
        return _of_ones(self).tolist()

    original = FakeTensor.tolist
    FakeTensor.tolist = tolist  # type: ignore[method-assign]
    try:
        yield
    finally:
        FakeTensor.tolist = original  # type: ignore[method-assign]


def place() -> str:
    """Returns the innermost function of this package or of Megatron-Core that is being executed, as file and name."""
    frame = sys._getframe(1)
    while frame is not None:
        path = frame.f_code.co_filename
        if any(package in path for package in PACKAGES) and not any(own in path for own in NOT_SHOWN):
            package = next(one for one in PACKAGES if one in path)
            return f"{package}{path.rpartition(package)[2]} {frame.f_code.co_name}"
        frame = frame.f_back  # type: ignore[assignment]
    return "torch"


NOT_SHOWN = ("megatron_spo/rehearsal/", "runtime/cpu_bridge.py", "runtime/megatron_import.py")
"""Modules that only pass calls on."""
