"""Opening paths below a directory that somebody else arranges: openat2 with its resolve flags.

Promises: what is opened lies below the given directory, whatever links, mounts or ``..`` somebody
put into the path, and also if they are put there at this very moment.
Does not: read or write.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import struct
from collections.abc import Iterator

from agent import errors
from agent.host import proc

# include/uapi/linux/openat2.h; the number is the same on every architecture.
_OPENAT2 = 437
_HOW = struct.Struct("=QQQ")
_NO_XDEV, _NO_MAGICLINKS, _NO_SYMLINKS, _BENEATH, _IN_ROOT = 0x01, 0x02, 0x04, 0x08, 0x10
# The kernel could not tell whether a racing rename led out of the tree; to be tried again.
_TRIES = 100

_libc = ctypes.CDLL(None, use_errno=True)


@contextlib.contextmanager
def root_of(who: proc.Identity) -> Iterator[int]:
    """A descriptor of a process's root directory, with the mounts that it sees.

    Raises:
        errors.NotFound: it has ended.
    """
    try:
        fd = os.open(f"/proc/{who.pid}/root", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as exc:
        raise errors.NotFound(f"there is no process {who.pid}", pid=who.pid) from exc
    try:
        if not proc.alive(who):
            raise errors.NotFound(f"process {who.pid} has ended", pid=who.pid)
        yield fd
    finally:
        os.close(fd)


def open_inside(root: int, path: str, flags: int) -> int:
    """Open ``path`` as a process would whose root is the directory ``root``: links and ``..`` are
    followed, but never out of it.

    Raises:
        OSError: as ``open``.
    """
    return _openat2(root, path, flags, _IN_ROOT | _NO_MAGICLINKS)


def open_beneath(root: int, path: str, flags: int, *, one_file_system: bool = False) -> int:
    """Open ``path`` below ``root`` without following any link; ``..`` does not lead out. With
    ``one_file_system``, no mount is entered either.

    Raises:
        OSError: as ``open``; ``ELOOP`` at a link, ``EXDEV`` at a mount or the root's parent.
    """
    resolve = _BENEATH | _NO_SYMLINKS | _NO_MAGICLINKS
    return _openat2(root, path, flags, resolve | (_NO_XDEV if one_file_system else 0))


def _openat2(root: int, path: str, flags: int, resolve: int) -> int:
    how = ctypes.create_string_buffer(_HOW.pack(flags | os.O_CLOEXEC, 0, resolve), _HOW.size)
    name = os.fsencode(path)
    for _ in range(_TRIES):
        fd = int(_libc.syscall(_OPENAT2, root, name, how, _HOW.size))
        if fd >= 0:
            return fd
        code = ctypes.get_errno()
        if code == errno.ENOSYS:
            raise errors.EnvironmentUnfit(
                "this kernel cannot confine paths (openat2)", hint="Linux 5.6 or later is needed"
            )
        if code != errno.EAGAIN:
            break
    raise OSError(code, os.strerror(code), path)
