"""A file that stands under its name only when it is whole.

Promises: what is written goes into a file beside the name, for its owner alone; it is synced and
gets the name when the context is left without an error, so that an old file of that name stays
until then, and of an unfinished one nothing stays.
Does not: make directories.
"""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from typing import BinaryIO

from agent import errors

_BUFFER_BYTES = 1 << 20


@contextlib.contextmanager
def whole(path: str) -> Iterator[BinaryIO]:
    """A new file that can be written, read and sought in, and is ``path`` afterwards.

    Raises:
        errors.InvalidInput: no file can be written there.
    """
    unfinished = f"{path}.{secrets.token_hex(4)}.unfinished"
    try:
        fd = os.open(unfinished, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except OSError as exc:
        raise _unwritable(path, exc) from exc
    try:
        with open(fd, "w+b", buffering=_BUFFER_BYTES) as out:
            yield out
            out.flush()
            os.fsync(fd)
        os.rename(unfinished, path)
    except OSError as exc:
        raise _unwritable(path, exc) from exc
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(unfinished)


def _unwritable(path: str, exc: OSError) -> errors.InvalidInput:
    return errors.InvalidInput(
        f"cannot write {path}: {exc.strerror}",
        hint="name a file in a directory with room that you may write to",
        path=path,
    )
