"""The door to ptrace(2).

Promises: a call that fails raises OSError.
Does not: wait for anything. The kernel lets go of all that a thread traces when that thread ends.
"""

from __future__ import annotations

import ctypes
import os

# linux/ptrace.h
SINGLESTEP, GETREGS, SETREGS, DETACH, CONT = 9, 12, 13, 17, 7
SEIZE, INTERRUPT, GETSIGMASK, SETSIGMASK, RSEQ = 0x4206, 0x4207, 0x420A, 0x420B, 0x420F
O_SUSPEND_SECCOMP = 1 << 21
EVENT_STOP = 128
# linux/wait.h: __WALL, threads included.
WALL = 0x40000000

_libc = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.restype = ctypes.c_long
_libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]


def call(request: int, tid: int, address: int = 0, data: int = 0) -> None:
    """One request about a thread."""
    if _libc.ptrace(request, tid, address, data) < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
