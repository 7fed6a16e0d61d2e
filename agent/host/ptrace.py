"""The door to ptrace(2).

Promises: a call that fails raises OSError; nothing stays traced of what was done ``by_thread``.
Does not: wait for who is traced.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable
from typing import TypeVar

from agent.host import threads

_T = TypeVar("_T")

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


def by_thread(name: str, work: Callable[[], _T]) -> _T:
    """Do ``work`` in a thread of this name, which traces for it, and wait for its end; what it
    raises is raised here. The kernel lets go of all that a thread traces when that ends.

    Raises also:
        errors.EnvironmentUnfit: no thread can be started; nothing was done.
    """
    done: list[_T] = []
    failed: list[BaseException] = []

    def run() -> None:
        try:
            done.append(work())
        except BaseException as exc:  # noqa: BLE001 - carried to the caller
            failed.append(exc)

    thread = threading.Thread(target=run, name=name)
    threads.start(thread)
    thread.join()
    if failed:
        raise failed[0]
    return done[0]
