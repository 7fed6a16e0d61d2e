"""Whether somebody may be writing to a file at this instant.

The kernel gives a read lease on a file only while nobody has it open for writing or mapped so, nor
is truncating it (fcntl(2), F_SETLEASE; check_conflicting_open in fs/locks.c), whatever the way by
which he reached it, an overlay's included. It is given back at once: whoever opens the file in the
microseconds between waits for that.

Promises: the answer yes is right for the moment in which it was found; no signal does harm.
Does not: know who writes. Without CAP_LEASE only files of this program's own user can be asked
about, and of some file systems none.
"""

from __future__ import annotations

import ctypes
import fcntl
import signal

# Unlike CDLL it keeps the interpreter's lock, so that no other thread comes between two calls.
_libc = ctypes.PyDLL(None, use_errno=True)


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
