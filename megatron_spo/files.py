"""Atomic writing of files and folders: they are complete or absent, even after a power failure."""

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
    """Opens a temporary file that is renamed to `path` at the end of the context; after an error it is removed.

    Raises:
        OSError: the file cannot be written.
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
    """Renames a complete file to `path`, replacing an earlier one; content and name are on disk when this returns.

    Raises:
        OSError: the file cannot be flushed or renamed.
    """
    _flush(written)
    os.replace(written, path)
    _flush(path.parent)


def _flush(path: Path) -> None:
    """Flushes a file's content, or a folder's entries, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_whole(path: Path, content: str | bytes) -> None:
    """Writes or replaces a file atomically.

    Raises:
        OSError: the file cannot be written.
    """
    with replacing(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


@contextlib.contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Creates a folder to fill, which is renamed to `target` at the end of the context; `target` is absent or empty.

    After an error it remains as `target`.partial, which the next attempt replaces.
    """
    partial = target.with_name(f"{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    yield partial
    if target.exists():
        target.rmdir()
    partial.rename(target)


def check_output(path: Path) -> None:
    """Checks, before a long computation, that `write_output` will be able to write a file; creates its folder.

    Raises:
        UserError: it will not.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise IsADirectoryError("it is a folder")
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error}") from error


def write_output(path: Path, content: str | bytes) -> None:
    """Writes a file that the user requested, and creates its folder. Unpaired surrogates become question marks.

    Raises:
        UserError: the file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, content.encode("utf-8", errors="replace") if isinstance(content, str) else content)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error}") from error
