"""A limit to how long this program may stand still while others depend on it: the kernel ends it.

A program that was stopped (SIGSTOP, Ctrl-Z, a debugger) or hangs cannot let go of what it holds,
but its end does that for it: tracers, sockets and locks go with the process. So a timer of the
kernel's holds SIGKILL ready, which reaches a stopped process as well, and a thread puts it off for
as long as threads of this program run at all.

Promises: within the context this process ends ``LEASE_S`` after it has come to stand still; none
of it is left when the context is.
Does not: notice a single thread that hangs while others run; every wait has a deadline of its own.
Nor end the first process of a pid namespace, which the kernel spares its own signals.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import signal
import threading
import time
from collections.abc import Iterator

from agent import errors
from agent.host import threads

# Longer than a busy node keeps a thread waiting, shorter than peers' patience: as ``hold.LEASE_S``.
LEASE_S = 10.0
_RENEWALS = 5  # in the time of one lease
_SIGEV_SIGNAL = 0


class _Event(ctypes.Structure):
    # struct sigevent: value, signo, notify; 64 bytes in all.
    _fields_ = (
        ("value", ctypes.c_void_p),
        ("signo", ctypes.c_int),
        ("notify", ctypes.c_int),
        ("rest", ctypes.c_byte * 48),
    )


class _Setting(ctypes.Structure):
    # struct itimerspec: the interval, which is none, then the time that is left.
    _fields_ = (
        ("interval_s", ctypes.c_long),
        ("interval_ns", ctypes.c_long),
        ("left_s", ctypes.c_long),
        ("left_ns", ctypes.c_long),
    )


_libc = ctypes.CDLL(None, use_errno=True)


@contextlib.contextmanager
def armed(lease_s: float = LEASE_S) -> Iterator[None]:
    """End this process if all of it stands still for ``lease_s`` before the context is left.

    Raises:
        errors.EnvironmentUnfit: the kernel gives no timer, or no thread.
    """
    timer = ctypes.c_void_p()
    event = _Event(None, signal.SIGKILL, _SIGEV_SIGNAL)
    create = (time.CLOCK_MONOTONIC, ctypes.byref(event), ctypes.byref(timer))
    if _libc.timer_create(*create) != 0:
        _raise_limit()
        _checked(_libc.timer_create(*create))
    over = threading.Event()
    setting = _Setting(0, 0, int(lease_s), int(lease_s % 1 * 1e9))

    def put_off() -> None:
        while not over.wait(lease_s / _RENEWALS):
            _libc.timer_settime(timer, 0, ctypes.byref(setting), None)

    try:
        _checked(_libc.timer_settime(timer, 0, ctypes.byref(setting), None))
        keeper = threading.Thread(target=put_off, name="deadman", daemon=True)
        threads.start(keeper)
        try:
            yield
        finally:
            over.set()
            keeper.join()
    finally:
        _libc.timer_delete(timer)


def _raise_limit() -> None:
    """Timers count as pending signals, and those of all processes of a user are counted together:
    root in any container could have used all of them.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_SIGPENDING)
    for most in (hard, resource.RLIM_INFINITY):
        with contextlib.suppress(ValueError, OSError):  # the second takes a privilege
            resource.setrlimit(resource.RLIMIT_SIGPENDING, (most, most))


def _checked(result: int) -> None:
    if result != 0:
        code = ctypes.get_errno()
        raise errors.EnvironmentUnfit(
            f"the kernel gives no timer: {os.strerror(code)}",
            hint="raise the limit of pending signals (ulimit -i)",
        )
