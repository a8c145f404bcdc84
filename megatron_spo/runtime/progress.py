"""Progress of the processes of a job, and which of them blocks the others if there is none.

Every process counts its work in a `Progress`: phases, which all ranks pass alike, and ticks within them. A thread
(watchdog.py) reports it to rank 0, which decides whether the job must end; such a verdict ends all processes.
"""

import sys
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DAY = 24 * 3600.0
"""Seconds that the first phase may take; downloading and tokenising report no progress."""


def _ignore(label: str) -> None:
    pass


class Progress:
    """Progress of this process. The main thread writes it, the watchdog thread reads it.

    `on_phase` is called with the label of each new phase; all steps count as one phase, "training".
    """

    def __init__(self) -> None:
        self._thread = threading.get_ident()
        self._phase, self._seconds = 0, DAY
        self._shown = ""
        self.on_phase: Callable[[str], None] = _ignore
        self.start_up(DAY)

    def start_up(self, seconds: float) -> None:
        """Starts the first phase of a command; `seconds`: longest time without progress in the later phases."""
        self._seconds, self.on_phase = seconds, _ignore
        self.phase("start-up", times=DAY / seconds)

    def phase(self, label: str, *, times: float = 1) -> None:
        """Starts the next phase; all ranks must pass the same phases. `times` multiplies the time allowed without
        progress in this phase."""
        self._label, self._patience, self._ticks = label, times * self._seconds, 0
        self._phase += 1
        self._at = time.monotonic()
        shown = "training" if label.startswith("step ") else label
        if shown != self._shown:  # not at every step
            self._shown = shown
            self.on_phase(shown)

    def tick(self) -> None:
        """Counts one more row in this phase."""
        self._ticks += 1
        self._at = time.monotonic()

    def report(self) -> dict[str, Any]:
        """Returns the progress as a message to rank 0."""
        where, waits = _whereabouts(self._thread)
        return {
            "phase": self._phase,
            "ticks": self._ticks,
            "label": self._label,
            "patience": self._patience,
            "idle": time.monotonic() - self._at,
            "where": where,
            "waits": waits,
        }


def _whereabouts(thread: int) -> tuple[str, bool]:
    """Returns the line that a thread executes, and whether it waits for other processes there."""
    frame = sys._current_frames().get(thread)
    if frame is None:
        return "nowhere", False
    where = f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno} {frame.f_code.co_name}"
    for _ in range(12):
        if frame is None:
            break
        if "torch/distributed/" in frame.f_code.co_filename:
            return where, True
        frame = frame.f_back
    return where, False


@dataclass
class Member:
    """What rank 0 knows about one process; times are on rank 0's clock."""

    rank: int
    host: str
    heard: float
    report: dict[str, Any]
    left: bool = False

    @property
    def name(self) -> str:
        """Rank and host, for messages."""
        return f"rank {self.rank} (host {self.host})"

    @property
    def last_did(self) -> str:
        """Last reported phase and row, for messages."""
        rows = f", row {self.report['ticks']}" if self.report.get("ticks") else ""
        return f"{self.report.get('label', 'start-up')}{rows}"

    def idle(self, now: float) -> float:
        """Returns the seconds without progress."""
        return float(self.report["idle"] + now - self.heard)


@dataclass(frozen=True)
class Verdict:
    """Why the job ends: exit code, message, ranks at fault, and the seconds that the others get to exit themselves."""

    code: int
    message: str
    ranks: tuple[int, ...]
    grace: float = 0.0


def laggards(members: Iterable[Member], now: float) -> list[Member]:
    """Returns the processes that block the job: of those furthest behind, the ones that do not wait for others.

    It returns [] while any process that is furthest behind makes progress or is within its allowed time.
    """
    present = [member for member in members if not member.left and "phase" in member.report]
    if not present:
        return []
    least = min((member.report["phase"], member.report["ticks"]) for member in present)
    last = [member for member in present if (member.report["phase"], member.report["ticks"]) == least]
    if any(member.idle(now) <= member.report["patience"] for member in last):
        return []
    return [member for member in last if not member.report["waits"]] or last


def hung(guilty: list[Member], now: float) -> str:
    """Returns the message about processes without progress."""
    named = "; ".join(f"{member.name}: {member.last_did}, now in {member.report.get('where')}" for member in guilty[:8])
    more = f"; and {len(guilty) - 8} more" if len(guilty) > 8 else ""
    minutes = min(member.idle(now) for member in guilty) / 60
    return (
        f"no progress for {minutes:.1f} minutes (training.hang_timeout), the job waits for {named}{more}. Start the "
        "same command again; if it hangs again, leave out that machine"
    )


def died(lost: list[Member], how: str) -> str:
    """Returns the message about processes that died."""
    named = "; ".join(f"{member.name}, last in: {member.last_did}" for member in lost[:8])
    more = f"; and {len(lost) - 8} more" if len(lost) > 8 else ""
    return f"{named}{more}: {how}. Start the same command again; it resumes from the newest checkpoint"
