"""What a step's seconds go into."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

PHASES = ("data", "forward_backward", "optimizer", "communication")
"""Named parts of a step; what is left is `other`."""


class Clock:
    """Time by phases between `start` and `read`, each second counted once: an inner phase's is not the outer one's.

    On a GPU moments are events in its stream.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._marks: list[tuple[float | torch.cuda.Event, str]] = []  # (moment, the phase that begins there)
        self._begin = 0.0

    def start(self) -> None:
        """A step begins."""
        self._begin = time.perf_counter()
        self._marks = [(self._now(), "")]

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """What is done within is `name`, one of PHASES."""
        before = self._marks[-1][1] if self._marks else ""
        self._mark(name)
        try:
            yield
        finally:
            self._mark(before)

    def read(self) -> dict[str, float]:
        """Seconds since `start`, and of each phase, which together with `other` are these.

        Waits for the GPU: the question whether to stop (StopRequest.reason), which follows every step, does so anyway.
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
