"""The watchdog threads: every other process reports to rank 0 once a second over TCP, and rank 0 answers each.

A killed process is noticed because the kernel closes its connection; a stopped process or a lost machine, because it
stops answering. This needs no launcher, and it works even if rank 0 is the process that died.
"""

import contextlib
import json
import logging
import os
import re
import secrets
import select
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

from megatron_spo.errors import Anomaly, LostRank, Stopped, UserError
from megatron_spo.runtime import env
from megatron_spo.runtime.progress import Member, Progress, Verdict, died, hung, laggards

LOG = logging.getLogger(__name__)

INTERVAL = 1.0
"""Seconds between reports."""
SILENCE = 60.0
"""Seconds without a report after which a process counts as lost."""
SETTLE = 1.0
"""Seconds within which further dead processes are reported in the same message."""
GRACE = 15.0
"""Seconds within which processes with the same error can report it themselves."""
LONG = 1e6
_OF_OTHERS = re.compile(r"gloo|nccl|connection (closed|reset|refused)|broken pipe|socket", re.IGNORECASE)


class Watch:
    """The watchdog of this process."""

    def __init__(self, rank: int, world_size: int) -> None:
        self.rank, self.world_size = rank, world_size
        self.progress = Progress()
        self.on_loss: Callable[[Verdict], None] = lambda verdict: None
        """Called on the lowest remaining rank before the process ends."""
        self._reached, self._said = threading.Event(), threading.Event()
        self._leaving: tuple[int, str] | None = None
        self._socket: socket.socket | None = None
        self.woken, self._wake = os.pipe()

    def start_hub(self) -> tuple[int, str]:
        """Starts listening on rank 0; returns the port and the token with which the others identify themselves."""
        self._socket = socket.create_server(("", 0), backlog=min(4096, self.world_size + 8))
        token = secrets.token_hex(16)
        self._run(_Hub(self, self._socket, token).run)
        return int(self._socket.getsockname()[1]), token

    def join_hub(self, host: str, port: int, token: str) -> None:
        """Connects another rank to rank 0."""
        self._socket = socket.create_connection((host, port), timeout=SILENCE)
        hello = {"rank": self.rank, "host": env.host(), "token": token}
        self._socket.sendall(_line(hello))
        self._run(_Spoke(self, self._socket, host).run)

    def leave(self, code: int, message: str) -> None:
        """Announces that this process is about to end; with a code other than 0 it is ended after GRACE seconds."""
        if self._socket is not None and self._leaving is None and not self._reached.is_set():
            self._leaving = (code, message)
            os.write(self._wake, b"!")
            self._said.wait(3 * INTERVAL)

    def explain(self, error: BaseException, *, ours: bool) -> None:
        """Waits for a verdict if the loss of another process may have caused this error, so that the loss is reported.

        If a verdict arrives in time, it ends this process and the call does not return. `ours`: the error has its own
        message for the user, or the stop was requested.
        """
        patience = SILENCE + 10 if _OF_OTHERS.search(str(error)) else 0 if ours else 3 * INTERVAL
        if self._socket is not None and self._reached.wait(patience):
            time.sleep(LONG)

    def ends(self, verdict: Verdict) -> None:
        """Ends this process with the verdict's message and code; called by the watchdog thread."""
        self._reached.set()
        time.sleep(verdict.grace)
        with contextlib.suppress(Exception):
            left = set(range(self.world_size)) - set(verdict.ranks)
            if self.rank == min(left, default=-1):
                self.on_loss(verdict)
        LOG.error(verdict.message)
        os._exit(verdict.code)

    def left(self) -> tuple[int, str] | None:
        """Returns the exit code and message given to `leave`, or None."""
        return self._leaving

    def told(self) -> None:
        """Records that the others know that this process is ending; ends it if it takes longer than GRACE."""
        self._said.set()
        if self._leaving and self._leaving[0]:
            time.sleep(GRACE)
            os._exit(self._leaving[0])  # something blocks the exit

    def _run(self, target: Callable[[], None]) -> None:
        os.register_at_fork(after_in_child=self._forget)
        threading.Thread(target=self._guarded, args=(target,), name="watch", daemon=True).start()

    def _guarded(self, target: Callable[[], None]) -> None:
        try:
            target()
        except Exception as error:
            LOG.warning(f"the watchdog thread failed ({error!r}); dead or hanging processes are no longer noticed")
        self._said.set()

    def _forget(self) -> None:
        """Closes a forked child's copy of the connection, which must not outlive the watched process."""
        if self._socket is not None:
            self._socket.close()


class _Lines:
    """Sends and receives JSON objects over a connection, one per line."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection, self._rest = connection, b""
        connection.settimeout(SILENCE)

    def send(self, values: dict[str, Any]) -> bool:
        try:
            self.connection.sendall(_line(values))
        except OSError:
            return False
        return True

    def receive(self) -> tuple[list[dict[str, Any]], bool]:
        """Returns the received objects, and whether the connection is still open."""
        try:
            content = self.connection.recv(1 << 16)
        except OSError:
            content = b""
        *lines, self._rest = (self._rest + content).split(b"\n")
        return [json.loads(line) for line in lines], bool(content)


def _readable(descriptors: list[int]) -> list[int]:
    """Returns the descriptors that can be read, after at most INTERVAL. Uses poll, as select stops at 1024."""
    poll = select.poll()
    for descriptor in descriptors:
        poll.register(descriptor, select.POLLIN)
    return [descriptor for descriptor, _ in poll.poll(INTERVAL * 1000)]


def _line(values: dict[str, Any]) -> bytes:
    return json.dumps(values).encode() + b"\n"


class _Spoke:
    """The watchdog thread of every rank except 0."""

    def __init__(self, watch: Watch, connection: socket.socket, host: str) -> None:
        self._watch, self._lines, self._host = watch, _Lines(connection), host

    def run(self) -> None:
        heard = looked = time.monotonic()
        while True:
            leaving = self._watch.left()
            if leaving is not None:
                self._lines.send({"bye": leaving[0], "message": leaving[1]})
                self._watch.told()
                return
            self._lines.send(self._watch.progress.report())  # if sending fails, reading shows why
            now = time.monotonic()
            if now - looked > SILENCE / 2:
                heard = now  # this process itself was stopped for a while
            looked = now
            if self._lines.connection.fileno() in _readable([self._lines.connection.fileno(), self._watch.woken]):
                messages, there = self._lines.receive()
                heard = time.monotonic() if there else heard
                for message in messages:
                    if "verdict" in message:
                        self._watch.ends(_verdict(message["verdict"]))
                    if "bye" in message:
                        self._watch.told()
                        return
                if not there:
                    self._lost("it died")
            elif time.monotonic() - heard > SILENCE:
                self._lost(f"it has not answered for {SILENCE:.0f} seconds")

    def _lost(self, how: str) -> None:
        main = Member(0, self._host, 0.0, {"label": f"unknown (this rank's: {self._watch.progress.report()['label']})"})
        self._watch.ends(Verdict(LostRank.code, died([main], how), (0,)))


class _Hub:
    """The watchdog thread of rank 0."""

    def __init__(self, watch: Watch, server: socket.socket, token: str) -> None:
        self._watch, self._server, self._token = watch, server, token
        self._members = {
            rank: Member(rank, "not heard of", time.monotonic(), {}) for rank in range(1, watch.world_size)
        }
        self._lines: dict[int, _Lines] = {}
        self._new: list[_Lines] = []
        self._lost: list[int] = []

    def run(self) -> None:
        beat = looked = time.monotonic()
        while True:
            if self._watch.left() is not None:
                self._bye(*self._watch.left())  # type: ignore[misc]
                return
            self._listen()
            now = time.monotonic()
            if now - looked > SILENCE / 2:  # this process itself was stopped for a while
                for member in self._members.values():
                    member.heard += now - looked
            looked = now
            if now - beat >= INTERVAL:
                beat = now
                for lines in self._lines.values():
                    lines.send({"alive": 1})
                self._judge(now)

    def _listen(self) -> None:
        sources = {lines.connection.fileno(): rank for rank, lines in self._lines.items()}
        fresh = {lines.connection.fileno(): lines for lines in self._new}
        for source in _readable([self._server.fileno(), self._watch.woken, *sources, *fresh]):
            if source == self._server.fileno():
                self._new.append(_Lines(self._server.accept()[0]))
            elif source in fresh:
                self._greet(fresh[source])
            elif source in sources:
                self._hear(sources[source])

    def _greet(self, lines: _Lines) -> None:
        self._new.remove(lines)
        try:
            first, *others = lines.receive()[0]
            member = self._members[first["rank"]] if first["token"] == self._token else None
        except (ValueError, KeyError, TypeError):
            member = None
        if member is None:  # not a process of this job
            lines.connection.close()
            return
        member.host, member.heard = first["host"], time.monotonic()
        self._lines[member.rank] = lines
        for report in others:
            member.report = report

    def _hear(self, rank: int) -> None:
        member = self._members[rank]
        messages, there = self._lines[rank].receive()
        for message in messages:
            if "bye" not in message:
                member.report, member.heard = message, time.monotonic()
                continue
            member.left = True
            if message["bye"]:
                self._pronounce(_ended(member.name, rank, message["bye"], message["message"]))
        if not there:
            del self._lines[rank]
            if not member.left:
                self._lost.append(rank)

    def _judge(self, now: float) -> None:
        if self._lost:
            until = time.monotonic() + SETTLE
            while time.monotonic() < until:
                self._listen()
            self._pronounce(Verdict(LostRank.code, died(self._named(self._lost), "it died"), tuple(self._lost)))
        silent = [rank for rank, member in self._members.items() if not member.left and now - member.heard > SILENCE]
        if silent:
            how = f"it has not answered for {SILENCE:.0f} seconds"
            self._pronounce(Verdict(LostRank.code, died(self._named(silent), how), tuple(silent)))
        own = Member(0, env.host(), now, self._watch.progress.report())
        guilty = laggards([own, *self._members.values()], now)
        if guilty:
            ranks = tuple(member.rank for member in guilty)
            self._pronounce(Verdict(LostRank.code, hung(guilty, now), ranks))

    def _named(self, ranks: list[int]) -> list[Member]:
        return [self._members[rank] for rank in ranks]

    def _bye(self, code: int, message: str) -> None:
        """Tells the others that rank 0 ends; with a code other than 0 they end, too."""
        if code == 0:
            self._tell({"bye": 0})
        else:
            self._tell({"verdict": vars(_ended(f"rank 0 (host {env.host()})", 0, code, message))})
        self._watch.told()

    def _pronounce(self, verdict: Verdict) -> None:
        self._tell({"verdict": vars(verdict)})
        self._watch.ends(verdict)

    def _tell(self, message: dict[str, Any]) -> None:
        for lines in self._lines.values():
            lines.connection.settimeout(2.0)
            lines.send(message)


def _ended(name: str, rank: int, code: int, message: str) -> Verdict:
    """Returns the verdict after a process ended with a code other than 0; others may be about to report the same."""
    grace = GRACE if code in (UserError.code, Anomaly.code) else 3 * INTERVAL if code == Stopped.code else 0.0
    return Verdict(code if grace else LostRank.code, f"{name} ended: {message}", (rank,), grace)


def _verdict(values: dict[str, Any]) -> Verdict:
    return Verdict(values["code"], values["message"], tuple(values["ranks"]), values["grace"])


_watch: Watch | None = None


def watch() -> Watch:
    """Returns the watchdog of this process; with a single process it does nothing."""
    global _watch
    if _watch is None:
        _watch = Watch(env.rank(), env.world_size())
    return _watch
