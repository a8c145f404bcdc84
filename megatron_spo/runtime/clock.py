"""Measures how the time of a step is divided into phases."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

PHASES = ("data", "forward_backward", "optimizer", "communication")
"""Named parts of a step; the rest is `other`."""


class Clock:
    """Measures the time of phases between `start` and `read`. Time in a nested phase counts only for the nested phase.

    On a GPU, times are taken with events in its stream.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._marks: list[tuple[float | torch.cuda.Event, str]] = []  # (moment, the phase that begins there)
        self._begin = 0.0

    def start(self) -> None:
        """Starts the time of a step."""
        self._begin = time.perf_counter()
        self._marks = [(self._now(), "")]

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Counts the time within the context for phase `name`, one of PHASES."""
        before = self._marks[-1][1] if self._marks else ""
        self._mark(name)
        try:
            yield
        finally:
            self._mark(before)

    def read(self) -> dict[str, float]:
        """Returns the seconds since `start`, in total and by phase; the phases and `other` add up to the total.

        This waits for the GPU, which `StopRequest.reason` does after every step anyway.
        """
        last, _ = self._marks[-1]
        if not isinstance(last, float):
            last.synchronize()
        total = time.perf_counter() - self._begin
        seconds = dict.fromkeys(PHASES, 0.0)
        for (begin, phase), (end, _) in zip(self._marks, self._marks[1:], strict=False):
            if phase:
                seconds[phase] += _between(begin, end)
        self._marks = []
        seconds["other"] = max(0.0, total - sum(seconds.values()))
        return {"seconds": total, **{f"seconds/{phase}": value for phase, value in seconds.items()}}

    def _mark(self, phase: str) -> None:
        if self._marks:
            self._marks.append((self._now(), phase))

    def _now(self) -> float | torch.cuda.Event:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def _between(begin: float | torch.cuda.Event, end: float | torch.cuda.Event) -> float:
    if isinstance(begin, float) or isinstance(end, float):
        return float(end) - float(begin)  # type: ignore[arg-type]
    return begin.elapsed_time(end) / 1000
