"""Another process's open files: a copy of one of its descriptors, by pidfd_getfd, and which of its
threads have others than it shows, or another working directory.

Promises: the copy shares the open file with the process, and is closed with the context.
Does not: close or change anything in the process.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import platform
from collections.abc import Iterator

from agent import errors
from agent.host import proc

NR_KCMP = {"x86_64": 312, "aarch64": 272}
KCMP_FILES, KCMP_FS = 2, 3  # linux/kcmp.h
_PF_EXITING = 0x4  # include/linux/sched.h
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


def apart(pid: int, kind: int = KCMP_FILES) -> list[int]:
    """The threads of a process with a table of descriptors of their own (``unshare(CLONE_FILES)``),
    or with ``KCMP_FS`` a root, working directory and umask of their own (``CLONE_FS``), at which
    neither /proc/PID nor CRIU looks, ascending; none on a kernel that cannot compare. Who is ending
    has none: it gives them up some time before its number.

    Raises:
        errors.NotFound: there is no such process.
    """
    number = NR_KCMP.get(platform.machine())
    if number is None:
        return []
    found = []
    for tid in proc.threads(pid):
        if tid == pid:
            continue
        order: int = _libc.syscall(number, pid, tid, kind, 0, 0)
        # Below zero it is not known; who has ended meanwhile has none.
        if order and not (order < 0 and ctypes.get_errno() in (errno.ESRCH, errno.ENOSYS)):
            found.append(tid)
    # Whoever is not ending now was not when it was compared.
    return [] if found and _ends(pid, pid) else [tid for tid in found if not _ends(pid, tid)]


def _ends(pid: int, tid: int) -> bool:
    try:
        return bool(proc.thread_stat(pid, tid).flags & _PF_EXITING)
    except errors.NotFound:
        return True
