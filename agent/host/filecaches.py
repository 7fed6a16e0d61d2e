"""Making files durable, and letting the kernel forget what it keeps of them in memory.

Promises: nothing is read, written or followed out of the directory that is given, also while
somebody moves files about in it; only regular files are opened, and no other mount is entered;
between two files the deadline is looked at.
Does not: interrupt the kernel: one file of a volume that hangs hangs.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import stat
from collections.abc import Callable, Iterator

from agent import errors
from agent.host import clock, confine, mounts

# File systems whose files are not data: reading or syncing them means something else.
_NO_DATA = frozenset(
    (
        *("autofs", "bpf", "cgroup", "cgroup2", "configfs", "debugfs", "devpts", "devtmpfs"),
        *("efivarfs", "fusectl", "mqueue", "nsfs", "proc", "pstore", "securityfs", "sysfs"),
        "tracefs",
    )
)

_libc = ctypes.CDLL(None, use_errno=True)


def sync(root: int, pid: int, path: str, deadline: clock.Deadline) -> None:
    """Write to disk what process ``pid``, whose root directory ``root`` is, has changed in the file
    or directory ``path``.

    Raises:
        errors.NotFound | errors.InvalidInput: there is no such path, or no data there.
        errors.DeadlineExceeded: not all is done.
        errors.DumpFailed: the disk fails.
    """
    _each(root, pid, path, deadline, os.fsync)


def drop(root: int, pid: int, path: str, deadline: clock.Deadline) -> None:
    """As ``sync``, and then let the kernel keep nothing of it in memory."""

    def both(fd: int) -> None:
        os.fsync(fd)
        # Only what is on disk is forgotten.
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)

    _each(root, pid, path, deadline, both)


def sync_file_system(root: int) -> None:
    """Write the whole file system of an open directory to disk.

    Raises:
        errors.DumpFailed: the disk fails.
    """
    if _libc.syncfs(root) != 0:
        raise _failing(OSError(ctypes.get_errno(), ""))


def _each(
    root: int, pid: int, path: str, deadline: clock.Deadline, work: Callable[[int], None]
) -> None:
    try:
        top = confine.open_inside(root, path, os.O_PATH)
    except OSError as exc:
        raise errors.NotFound(
            f"there is no {path} in the container: {exc.strerror}", hint="check the path"
        ) from exc
    try:
        found = os.fstat(top)
        _refuse_no_data(pid, path, found.st_dev)
        if stat.S_ISREG(found.st_mode):
            _on(top, work)
        elif stat.S_ISDIR(found.st_mode):
            for fd in _files(top, deadline):
                _on(fd, work)
        else:
            raise errors.InvalidInput(
                f"{path} is neither a file nor a directory", hint="name one of these"
            )
    finally:
        os.close(top)


def _refuse_no_data(pid: int, path: str, device: int) -> None:
    shown = f"{os.major(device)}:{os.minor(device)}"
    kind = next((each.kind for each in mounts.of(pid) if each.device == shown), "")
    if kind in _NO_DATA:
        raise errors.InvalidInput(f"{path} is in a {kind}, which holds no data", hint="name a file")


def _files(top: int, deadline: clock.Deadline) -> Iterator[int]:
    """Descriptors, valid until the next, of the regular files below the directory ``top``."""
    folders = ["."]
    while folders:
        folder = folders.pop()
        deadline.check("going through the files")
        with contextlib.suppress(OSError):  # what has just gone, or is a mount, is passed over
            inner = _beneath(top, folder, os.O_RDONLY | os.O_DIRECTORY)
            try:
                with os.scandir(inner) as entries:
                    named = [(each.name, each.is_dir(follow_symlinks=False)) for each in entries]
            finally:
                os.close(inner)
            for name, is_folder in named:
                if is_folder:
                    folders.append(f"{folder}/{name}")
                    continue
                with contextlib.suppress(OSError):
                    fd = _beneath(top, f"{folder}/{name}", os.O_PATH)
                    try:
                        if stat.S_ISREG(os.fstat(fd).st_mode):
                            deadline.check("going through the files")
                            yield fd
                    finally:
                        os.close(fd)


def _beneath(top: int, path: str, flags: int) -> int:
    return confine.open_beneath(top, path, flags, one_file_system=True)


def _on(path_fd: int, work: Callable[[int], None]) -> None:
    try:
        fd = os.open(f"/proc/self/fd/{path_fd}", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            work(fd)
        finally:
            os.close(fd)
    except OSError as exc:
        raise _failing(exc) from exc


def _failing(exc: OSError) -> errors.DumpFailed:
    return errors.DumpFailed(
        f"a file cannot be written to disk: {os.strerror(exc.errno or 0)}",
        hint="look at the volume",
    )
