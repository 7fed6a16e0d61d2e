"""Whether somebody may be writing to a file at this instant.

The kernel gives a read lease on a file only while nobody has it open for writing or mapped so, nor
is truncating it (fcntl(2), F_SETLEASE; check_conflicting_open in fs/locks.c), whatever the way by
which he reached it, an overlay's included. It is given back at once: whoever opens the file in the
microseconds between waits for that.

Promises: the answer yes is right for the moment in which it was found, and no signal does harm;
where ``tells_of_writes``, the change time of a file that was ``unwritten`` moves with whatever is
written to it next, also through a mapping.
Does not: know who writes. Without CAP_LEASE only files of this program's own user can be asked
about, and of some file systems none.
"""

from __future__ import annotations

import ctypes
import fcntl
import signal

# Unlike CDLL it keeps the interpreter's lock, so that no other thread comes between two calls.
_libc = ctypes.PyDLL(None, use_errno=True)

# linux/magic.h: ext2 to ext4, XFS, Btrfs. In tmpfs a page that was only read may be written to
# through a mapping without a fault, and so without a trace; on FUSE and in the network the times
# are a server's.
_TELLING = frozenset((0xEF53, 0x58465342, 0x9123683E))
# More than struct statfs has, which begins with the file system's type, a long.
_STATFS_BYTES = 256


def unwritten(fd: int) -> bool:
    """Whether nobody can be writing to the file, of which ``fd`` is a descriptor for reading; False
    also where that cannot be told.
    """
    # What tells of somebody who wants to write is SIGIO, which would end this program; SIGURG is
    # ignored.
    if _libc.fcntl(fd, fcntl.F_SETSIG, int(signal.SIGURG)) != 0:
        return False
    given: bool = _libc.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_RDLCK) == 0
    _libc.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    return given


def tells_of_writes(fd: int) -> bool:
    """Whether the file system of ``fd`` is known to move the change time with every first write."""
    answer = ctypes.create_string_buffer(_STATFS_BYTES)
    if _libc.fstatfs(fd, answer) != 0:
        return False
    return ctypes.c_long.from_buffer(answer).value in _TELLING
