"""Text files for users."""

import os
from pathlib import Path

from megatron_spo.errors import UserError


def write_whole(path: Path, text: str) -> None:
    """Write a file that appears complete or not at all, with its folder. Half a surrogate pair becomes a question mark.

    Raises:
        UserError: it cannot be written.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("w", encoding="utf-8", errors="replace") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error}") from error
