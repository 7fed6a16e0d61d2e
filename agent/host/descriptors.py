"""Another process's open files: a copy of one of its descriptors, by pidfd_getfd.

Promises: the copy shares the open file with the process, and is closed with the context.
Does not: close or change anything in the process.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterator

# System call numbers are the same on every architecture since Linux 5.1.
_PIDFD_GETFD = 438

_libc = ctypes.CDLL(None, use_errno=True)


@contextlib.contextmanager
def borrowed(pid: int, number: int) -> Iterator[int]:
    """A copy of descriptor ``number`` of process ``pid``.

    Raises:
        OSError: there is no such process or descriptor, or it is not allowed.
    """
    pidfd = os.pidfd_open(pid)
    try:
        copy = int(_libc.syscall(_PIDFD_GETFD, pidfd, number, 0))
    finally:
        os.close(pidfd)
    if copy < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    try:
        yield copy
    finally:
        os.close(copy)
