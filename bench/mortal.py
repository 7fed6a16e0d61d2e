"""Jobs that end with the bench that started them, however it ends."""

from __future__ import annotations

import ctypes
import signal

# linux/prctl.h
_PR_SET_PDEATHSIG = 1


def end_with_parent() -> None:
    """Have the kernel end this process when its parent's thread that started it ends."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGKILL), 0, 0, 0)
