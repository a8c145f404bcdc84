"""Logging of the commands to stderr: one line per message, with its level from WARNING on, and the rank if it is not 0.

Modules use `logging.getLogger(__name__)`. Other programs that import the package configure logging as they like.
"""

import logging
import sys

from megatron_spo.runtime.env import rank


class _Stderr(logging.Handler):
    """Writes to the current `sys.stderr`."""

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), file=sys.stderr, flush=True)


class _Line(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        who = f"rank {rank()}: " if rank() else ""
        level = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
        return f"{level}{who}{super().format(record)}"


def log_to_stderr() -> None:
    """Writes the package's log messages of level INFO and above to stderr; a second call changes nothing."""
    logger = logging.getLogger("megatron_spo")
    if not any(isinstance(handler, _Stderr) for handler in logger.handlers):
        handler = _Stderr()
        handler.setFormatter(_Line())
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        logger.propagate = False
