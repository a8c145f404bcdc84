"""Decides whether training must stop before its last step: because of a signal on any rank or the time limit."""

import contextlib
import signal
import time
from collections.abc import Iterator
from typing import NoReturn

import torch
import torch.distributed as dist

from megatron_spo.errors import Stopped
from megatron_spo.runtime import env
from megatron_spo.runtime.signals import signals

FIRST_SAVE = 0.05
"""Share of the time limit reserved for saving until a save has been timed; at most FIRST_SAVE_SECONDS."""
FIRST_SAVE_SECONDS = 600.0
_TIME = 1


class StopRequest:
    """Tells all ranks after each step whether to stop."""

    def __init__(self, minutes: float | None, device: torch.device) -> None:
        self._minutes, self._device = minutes, device
        self._longest: dict[str, float] = {}
        if minutes is not None:
            self._longest["save"] = min(FIRST_SAVE * minutes * 60, FIRST_SAVE_SECONDS)
        self._timed: set[str] = set()

    @contextlib.contextmanager
    def timing(self, what: str) -> Iterator[None]:
        """Measures how long a "step", an "evaluation" or a "save" takes."""
        begin = time.monotonic()
        yield
        seconds = time.monotonic() - begin
        self._longest[what] = max(seconds, self._longest.get(what, 0.0) if what in self._timed else 0.0)
        self._timed.add(what)

    def reason(self, *ahead: str) -> str | None:
        """Returns why to save and stop now, or None. `ahead`: what will run before the next call.

        It uses one small all-reduce, so that all ranks get the same answer.
        """
        wish = torch.tensor([float(self._own_wish(ahead))], device=self._device)
        dist.all_reduce(wish, op=dist.ReduceOp.MAX)
        code = int(wish)
        if code == 0:
            return None
        if code == _TIME:
            return f"training.time_limit of {self._minutes:g} minutes"
        return signal.Signals(code - _TIME).name

    def end(self, reason: str, step: int) -> NoReturn:
        """Ends the run after everything has been saved.

        Raises:
            Stopped: always.
        """
        signals.over(Stopped.code)
        raise Stopped(f"{reason}: stopped after step {step}, everything is saved; the same command resumes from here")

    def _own_wish(self, ahead: tuple[str, ...]) -> int:
        if signals.requested is not None:
            return _TIME + signals.requested
        if self._minutes is None:
            return 0
        needed = sum(self._longest.get(what, 0.0) for what in ("save", *ahead))
        return _TIME if time.monotonic() - env.STARTED + needed > self._minutes * 60 else 0
