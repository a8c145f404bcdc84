"""Files and folders that appear whole or not at all, also after a loss of power."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from megatron_spo.errors import UserError


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A file to write that takes the name `path` at the end of the context; after an error, none is left.

    Raises:
        OSError
    """
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
        os.chmod(name, 0o644)
        put_in_place(Path(name), path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)
        raise


def put_in_place(written: Path, path: Path) -> None:
    """Give a complete file its name, in place of an earlier one; both are on disk when this returns.

    Raises:
        OSError
    """
    _flush(written)
    os.replace(written, path)
    _flush(path.parent)


def _flush(path: Path) -> None:
    """Have a file's content, or a folder's names, on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_whole(path: Path, content: str | bytes) -> None:
    """Write or replace a file.

    Raises:
        OSError
    """
    with replacing(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


@contextlib.contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A folder to fill that takes the name `target`, which is absent or empty, at the end of the context.

    After an error it is left as `target`.partial; the next attempt begins anew.
    """
    partial = target.with_name(f"{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    yield partial
    if target.exists():
        target.rmdir()
    partial.rename(target)


def write_output(path: Path, text: str) -> None:
    """Write a file that the user asked for, and its folder. Half a surrogate pair becomes a question mark.

    Raises:
        UserError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, text.encode("utf-8", errors="replace"))
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error}") from error
