"""Reading the memory of other processes, many pieces at once.

Promises: what is read is of the address space that the process had when it was opened, whoever has
its number later; pages that are protected against reading are read all the same.
Does not: write; see one moment unless the process stands still.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence

import numpy as np
from numpy import typing as npt

from agent import errors
from agent.host import proc

# include/uapi/linux/uio.h: UIO_MAXIOV.
_PIECES = 1024

_libc = ctypes.CDLL(None, use_errno=True)
_libc.process_vm_readv.restype = ctypes.c_ssize_t


class _Iovec(ctypes.Structure):
    _fields_ = [("base", ctypes.c_uint64), ("length", ctypes.c_uint64)]


class ForeignMemory:
    """The memory of ``who`` as it is now.

    Raises:
        errors.NotFound: the process has ended.
    """

    def __init__(self, who: proc.Identity) -> None:
        self._who = who
        try:
            self._fd = os.open(f"/proc/{who.pid}/mem", os.O_RDONLY | os.O_CLOEXEC)
        except (FileNotFoundError, ProcessLookupError) as exc:
            raise errors.NotFound(f"there is no process {who.pid}", pid=who.pid) from exc
        if not proc.alive(who):
            self.close()
            raise errors.NotFound(f"there is no process {who.pid} any more", pid=who.pid)

    def close(self) -> None:
        """Let go of it."""
        os.close(self._fd)

    def read(self, pieces: Sequence[tuple[int, int]], into: memoryview) -> list[int]:
        """Read pieces of ``address, bytes`` one after the other into ``into``; say how many bytes
        of each could be read. Of a piece that could not be read whole, what follows in its part of
        ``into`` is undefined.
        """
        counts = []
        at = 0
        for address, size_bytes in pieces:
            counts.append(self._read_one(address, into[at : at + size_bytes]))
            at += size_bytes
        return counts

    def read_standing(
        self, pieces: Sequence[tuple[int, int]] | npt.NDArray[np.int64], into: memoryview
    ) -> list[int]:
        """As ``read``, quicker, of a process that stands still and so cannot end."""
        first = ctypes.addressof(ctypes.c_char.from_buffer(into))
        at = 0
        # A row is what the kernel takes for one of them: struct iovec.
        rows = np.ascontiguousarray(pieces, dtype=np.int64)
        for begin in range(0, len(rows), _PIECES):
            part = rows[begin : begin + _PIECES]
            total = int(part[:, 1].sum())
            local = _Iovec(first + at, total)
            remote = ctypes.c_void_p(part.ctypes.data)
            got = _libc.process_vm_readv(
                self._who.pid, ctypes.byref(local), 1, remote, len(part), ctypes.c_ulong(0)
            )
            if got != total:  # protected pages, or worse
                return self.read([(address, length) for address, length in rows.tolist()], into)
            at += total
        counts: list[int] = rows[:, 1].tolist()
        return counts

    def _read_one(self, address: int, into: memoryview) -> int:
        done = 0
        while done < len(into):
            try:
                got = os.preadv(self._fd, [into[done:]], address + done)
            except OSError:
                break  # not mapped any more
            if not got:
                break
            done += got
        return done
