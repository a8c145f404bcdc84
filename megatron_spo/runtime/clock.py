"""What a step's seconds go into."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

PHASES = ("data", "forward_backward", "optimizer", "communication")
"""Named parts of a step; what is left is `other`."""


class Clock:
    """Time by phases, each second counted once: an inner phase's is not the outer one's.

    On a GPU moments are events in its stream, and the process never waits for one: those that it has not reached yet
    are counted in the next reading, so a step's optimizer phase is that of the step before.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._marks: list[tuple[float | torch.cuda.Event, str]] = []  # (moment, the phase that begins there)
        self._begin = 0.0
        self._phase = ""

    def start(self) -> None:
        """A step begins; what was measured since the last one's reading is dropped."""
        del self._marks[: len(self._reached()) - 1]
        self._begin = time.perf_counter()
        self._mark("")

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """What is done within is `name`, one of PHASES."""
        before = self._phase
        self._mark(name)
        try:
            yield
        finally:
            self._mark(before)

    def read(self) -> dict[str, float]:
        """Seconds since `start`, and of each phase, which together with `other` are these."""
        total = time.perf_counter() - self._begin
        seconds = dict.fromkeys(PHASES, 0.0)
        reached = self._reached()
        for (begin, phase), (end, _) in zip(reached, reached[1:], strict=False):
            if phase:
                seconds[phase] += _between(begin, end)
        del self._marks[: len(reached) - 1]
        seconds["other"] = max(0.0, total - sum(seconds.values()))
        return {"seconds": total, **{f"seconds/{phase}": value for phase, value in seconds.items()}}

    def _mark(self, phase: str) -> None:
        self._phase = phase
        if self._on_gpu:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append((event, phase))
        else:
            self._marks.append((time.perf_counter(), phase))

    def _reached(self) -> list[tuple[float | torch.cuda.Event, str]]:
        """The marks up to the first that the GPU has not come to yet."""
        late = (i for i, (moment, _) in enumerate(self._marks) if not isinstance(moment, float) and not moment.query())
        return self._marks[: next(late, None)]


def _between(begin: float | torch.cuda.Event, end: float | torch.cuda.Event) -> float:
    if isinstance(begin, float) or isinstance(end, float):
        return float(end) - float(begin)  # type: ignore[arg-type]
    return begin.elapsed_time(end) / 1000
