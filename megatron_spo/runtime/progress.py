"""What each process of a job knows of the others, and who is to blame when they stand still.

Every process counts what it does in a `Progress`: phases that all ranks go through alike, and ticks within them. A
thread (watch_thread.py) tells rank 0, which judges; a verdict ends all processes.
"""

import sys
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DAY = 24 * 3600.0
"""Seconds that the first phase may take: downloading and tokenising have no progress to show."""


class Progress:
    """How far this process is. The main thread writes, the watching thread reads."""

    def __init__(self) -> None:
        self._thread = threading.get_ident()
        self._phase, self._seconds = 0, DAY
        self.start_up(DAY)

    def start_up(self, seconds: float) -> None:
        """The first phase of a command; `seconds` is the longest time without progress in the later ones."""
        self._seconds = seconds
        self.phase("start-up", times=DAY / seconds)

    def phase(self, label: str, *, times: float = 1) -> None:
        """The next phase; all ranks must go through the same ones. `times` the ordinary patience in this one."""
        self._label, self._patience, self._ticks = label, times * self._seconds, 0
        self._phase += 1
        self._at = time.monotonic()

    def tick(self) -> None:
        """One row more in this phase."""
        self._ticks += 1
        self._at = time.monotonic()

    def report(self) -> dict[str, Any]:
        """For rank 0."""
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
    """The innermost line of a thread, and whether it waits for other processes there."""
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
    """One process as rank 0 knows it; times on rank 0's clock."""

    rank: int
    host: str
    heard: float
    report: dict[str, Any]
    left: bool = False

    @property
    def name(self) -> str:
        """For messages."""
        return f"rank {self.rank} (host {self.host})"

    @property
    def last_did(self) -> str:
        """For messages."""
        rows = f", row {self.report['ticks']}" if self.report.get("ticks") else ""
        return f"{self.report.get('label', 'start-up')}{rows}"

    def idle(self, now: float) -> float:
        """Seconds without progress."""
        return float(self.report["idle"] + now - self.heard)


@dataclass(frozen=True)
class Verdict:
    """Why the job ends: exit code, message, who is to blame, and how long the others may take to end by themselves."""

    code: int
    message: str
    ranks: tuple[int, ...]
    grace: float = 0.0


def laggards(members: Iterable[Member], now: float) -> list[Member]:
    """Who holds up the job: of those that are behind all others for too long, the ones that do not themselves wait.

    Empty as long as one of the hindmost makes progress or may still take its time.
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
    """The message about laggards."""
    named = "; ".join(f"{member.name}: {member.last_did}, now in {member.report.get('where')}" for member in guilty[:8])
    more = f"; and {len(guilty) - 8} more" if len(guilty) > 8 else ""
    minutes = min(member.idle(now) for member in guilty) / 60
    return (
        f"no progress for {minutes:.1f} minutes (training.hang_timeout), the job waits for {named}{more}. Start the "
        "same command again; if it hangs again, leave out that machine"
    )


def died(lost: list[Member], how: str) -> str:
    """The message about processes that are gone."""
    named = "; ".join(f"{member.name}, last in: {member.last_did}" for member in lost[:8])
    more = f"; and {len(lost) - 8} more" if len(lost) > 8 else ""
    return f"{named}{more}: {how}. Start the same command again; it resumes from the newest checkpoint"
