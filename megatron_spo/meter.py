"""Shows how far a long task is: a bar on a terminal, otherwise one line a minute with the rate and the time left."""

import logging
import sys
import time
from types import TracebackType
from typing import Any, Self

LOG = logging.getLogger(__name__)

FIRST = 10.0
"""Seconds until the first line, so that a user soon sees that a task is running."""
EVERY = 60.0
"""Seconds between further lines."""
BYTES = "GB"
"""The unit of totals that are numbers of bytes."""


class Meter:
    """Counts the parts of a task that are done. A task that ends before the first line is due logs nothing."""

    def __init__(self, task: str, total: int, unit: str, *, done: int = 0, shown: bool = True) -> None:
        """Args:
        task: what is done, such as "tokenising pairs.jsonl".
        total: number of parts; of bytes if `unit` is BYTES.
        unit: name of the parts, in the plural.
        done: parts that an earlier call has finished.
        shown: False shows nothing.
        """
        self._task, self._total, self._unit, self._shown = task, total, unit, shown
        self._begin, self._first, self._done = time.monotonic(), done, done
        self._due, self._said = self._begin + FIRST, False
        self._bar: Any = None
        if shown and sys.stderr.isatty():
            from tqdm import tqdm

            size = {"unit": "B", "unit_scale": True} if unit == BYTES else {"unit": f" {unit}"}
            self._bar = tqdm(total=total, initial=done, desc=task, dynamic_ncols=True, **size)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.close()
        elif self._said and kind is None:
            self._say()

    def advance(self, count: int = 1) -> None:
        """Counts `count` more parts as done."""
        self._done += count
        if self._bar is not None:
            self._bar.update(count)
        elif self._shown and time.monotonic() >= self._due and self._done < self._total:
            self._say()
            self._due, self._said = time.monotonic() + EVERY, True

    def _say(self) -> None:
        seconds = max(time.monotonic() - self._begin, 1e-9)
        rate = (self._done - self._first) / seconds
        left = f"left {duration((self._total - self._done) / rate)}" if rate > 0 else "no rate yet"
        end = f"done in {duration(seconds)}" if self._done >= self._total else left
        LOG.info(f"{self._task}: {self._amount()}  {self._rate(rate)}  {end}")

    def _amount(self) -> str:
        if self._unit == BYTES:
            return f"{self._done / 1e9:,.1f}/{self._total / 1e9:,.1f} GB"
        return f"{self._done:,}/{self._total:,} {self._unit}"

    def _rate(self, rate: float) -> str:
        return f"{rate / 1e9:.2g} GB/s" if self._unit == BYTES else f"{number(rate)} {self._unit}/s"


def number(value: float) -> str:
    """Returns a positive number with two or three significant digits and no exponent: 0.61, 2.8, 867, 12,400."""
    if value >= 1000:
        return f"{float(f'{value:.3g}'):,.0f}"
    return f"{value:.0f}" if value >= 100 else f"{value:.2g}" if value >= 1e-4 else "0"


def duration(seconds: float) -> str:
    """Returns a time in its largest sensible unit: 45 s, 16 min, 3.5 h, 2.1 days."""
    for limit, size, unit in ((90, 1, "s"), (90 * 60, 60, "min")):
        if seconds < limit:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds / 3600:.1f} h" if seconds < 36 * 3600 else f"{seconds / 86400:.1f} days"
