"""A server that imports everything once and forks the processes of the tests, so that they need not import it again.

    python warm.py SOCKET

It imports at the first request, so that tests without processes do not pay for it. A request is one line of JSON
(`argv`, `env`, `cwd`) with the file descriptors of stdout and stderr. The answers are a line with the child's process
id and, when the child has ended, a line with its exit code and CPU seconds. A child leaves the server's loop and runs
like a new interpreter: the module or script is `__main__`, and arguments, environment, streams, signals and exit code
are its own. Unlike a new interpreter, it has no hash seed of its own, and its imports did not read its environment.
Tests of these use a cold process (`processes.launch(..., cold=True)`).
"""

import contextlib
import gc
import importlib
import json
import os
import runpy
import selectors
import signal
import socket
import sys
import time
import warnings
from typing import Any

BUFFER = 1 << 16
PRELOADED = (
    "megatron_spo.cli", "megatron_spo.train.run", "megatron_spo.reference.fill", "megatron_spo.rehearsal.step",
    "megatron_spo.train.sample_answers", "megatron_spo.convert.export", "megatron_spo.convert.adapters",
    "megatron_spo.planner.plan",
    "megatron_spo.evaluate.generate", "megatron_spo.report.sections", "datasets", "pyarrow.parquet", "scipy.optimize",
    "torch.distributed.checkpoint", "torch.distributed.run", "transformers.generation", "wandb",
    "transformers.models.llama.modeling_llama", "transformers.models.qwen3.modeling_qwen3",
)  # fmt: skip


def serve(path: str) -> dict[str, Any]:
    """Forks a child for each request until the parent process has ended; returns the request, in the children only."""
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(path)
    listening.listen(64)
    parent, waiting = os.getppid(), selectors.DefaultSelector()
    waiting.register(listening, selectors.EVENT_READ)
    children: dict[int, tuple[int, socket.socket]] = {}
    warm = False
    while os.getppid() == parent:
        for key, _ in waiting.select(1):
            if key.fileobj is not listening:
                waiting.unregister(key.fd)
                _answer(*children.pop(key.fd))
                os.close(key.fd)
                continue
            connection, _ = listening.accept()
            request, streams = _receive(connection)
            if not warm:
                _warm_up()
                warm = True
            pid = os.fork()
            if pid == 0:
                for number, stream in enumerate(streams, 1):
                    os.dup2(stream, number)
                for descriptor in (*streams, *children):
                    os.close(descriptor)
                waiting.close()
                for open_socket in (listening, connection, *(other for _, other in children.values())):
                    open_socket.close()
                return request
            for stream in streams:
                os.close(stream)
            watched = os.pidfd_open(pid)
            children[watched] = (pid, connection)
            waiting.register(watched, selectors.EVENT_READ)
            connection.sendall(f"{pid}\n".encode())
    for pid, _ in children.values():
        os.kill(pid, signal.SIGKILL)
    os._exit(0)


def _warm_up() -> None:
    for name in PRELOADED:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # a collection in a child would copy every page


def _receive(connection: socket.socket) -> tuple[dict[str, Any], list[int]]:
    text, streams, _, _ = socket.recv_fds(connection, BUFFER, 2)
    while not text.endswith(b"\n"):
        text += connection.recv(BUFFER)
    return json.loads(text), list(streams)


def _answer(pid: int, connection: socket.socket) -> None:
    _, status, usage = os.wait4(pid, 0)
    with contextlib.suppress(OSError), connection:
        code = os.waitstatus_to_exitcode(status)
        connection.sendall(f"{code} {usage.ru_utime + usage.ru_stime:.3f}\n".encode())


def become(request: dict[str, Any]) -> None:
    """Runs the requested script or module as the main program of this process."""
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    warnings.resetwarnings()
    if request["env"].get("PYTHONWARNINGS"):
        warnings.simplefilter(request["env"]["PYTHONWARNINGS"])
    sys.modules["megatron_spo.runtime.env"].STARTED = time.monotonic()  # type: ignore[attr-defined]
    first, *rest = request["argv"]
    if first == "-m":
        sys.argv = rest
        sys.path[0] = request["cwd"]
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = [first, *rest]
        sys.path[0] = os.path.dirname(first)
        runpy.run_path(first, run_name="__main__")


if __name__ == "__main__":
    sys.path[0] = os.getcwd()  # not this folder, whose megatron.py is not Megatron
    become(serve(sys.argv[1]))
