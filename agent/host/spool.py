"""A stream that must be read at random, on disk meanwhile.

Promises: the file has no name, so that nothing of it stays whatever ends the program; its room is
taken before the first byte comes, and never the room that the node's own housekeeping needs; it
holds exactly as many bytes as were announced.
Does not: look at what is in it.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterable, Iterator

from agent import errors


@contextlib.contextmanager
def spooled(
    directory: str, size_bytes: int, pieces: Iterable[bytes], *, kept_free_percent: int
) -> Iterator[int]:
    """A descriptor of a file with all of ``pieces``, which must come to ``size_bytes``.
    ``kept_free_percent`` of the disk stay free.

    Raises:
        errors.EnvironmentUnfit: ``directory`` has no room for it, or fails.
        errors.InvalidInput: there are more bytes or fewer.
    """
    try:
        os.makedirs(directory, mode=0o700, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory, buffering=0) as file:
            fd = file.fileno()
            _reserve(fd, size_bytes, directory, kept_free_percent)
            _fill(fd, size_bytes, pieces)
            yield fd
    except OSError as exc:
        raise errors.EnvironmentUnfit(
            f"cannot write to {directory}: {exc.strerror}",
            hint="make room there, or let work_dir be on another disk",
            path=directory,
        ) from exc


def _reserve(fd: int, size_bytes: int, directory: str, kept_free_percent: int) -> None:
    room = os.fstatvfs(fd)
    free_bytes = room.f_bavail * room.f_frsize - size_bytes
    if free_bytes < room.f_blocks * room.f_frsize * kept_free_percent / 100:
        raise errors.EnvironmentUnfit(
            f"{directory} has no room for {size_bytes >> 20} MiB: less than {kept_free_percent} %"
            " would stay free",
            hint="make room there, let work_dir be on another disk, or ask another node's agent",
            path=directory,
        )
    if size_bytes:
        os.posix_fallocate(fd, 0, size_bytes)


def _fill(fd: int, size_bytes: int, pieces: Iterable[bytes]) -> None:
    at = 0
    for piece in pieces:
        if at + len(piece) > size_bytes:
            raise errors.InvalidInput(
                f"more than the announced {size_bytes} bytes came",
                hint="did the file grow while it was read?",
            )
        view = memoryview(piece)
        while view:
            count = os.pwrite(fd, view, at)
            at += count
            view = view[count:]
    if at != size_bytes:
        raise errors.InvalidInput(
            f"{at} bytes came instead of the announced {size_bytes}",
            hint="did the file become shorter while it was read?",
        )
