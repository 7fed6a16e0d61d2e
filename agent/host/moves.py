"""Which mappings a process moves while its writes are noted: the events of userfaultfds.

A mapping that moves takes its pages along, and with them what was noted of each. Were this not
asked for, the kernel would stop noting writes to it, and to a neighbour that it joins where it
arrives, whose pages would go on looking as if nobody had written to them; and a neighbour that is
part of a larger mapping could not be moved with it any more (mm/mremap.c, mm/userfaultfd.c:
``mremap_userfaultfd_prep``).

Promises: whoever moves a mapping goes on as soon as one thread of ours has run, or this program has
ended; when a process stands still, all its moves are known. What is held of them does not grow with
their number, however seldom it is asked for.
Does not: tell the order of moves.
"""

from __future__ import annotations

import contextlib
import os
import select
import struct
import threading

import numpy as np

from agent.host import threads
from agent.host.pagemap import Ranges, union

# linux/userfaultfd.h: struct uffd_msg is the event, 7 bytes of nothing, and for a move from, to and
# length.
_MESSAGE = struct.Struct("=B7xQQQ")
_REMAP = 0x14
_MESSAGES = 16
# Ranges held of one process; beyond it they are joined, first where they touch.
_MOST = 4096


class Moves:
    """Reads the events of some userfaultfds.

    Raises:
        errors.EnvironmentUnfit: no thread can be started.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._arrived: dict[int, list[tuple[int, int]]] = {}
        self._poll = select.epoll()
        self._wake, self._woken = os.pipe2(os.O_CLOEXEC)
        self._poll.register(self._woken, 0)  # hang-up: close was called
        self._thread = threading.Thread(target=self._serve, name="moves", daemon=True)
        try:
            threads.start(self._thread)
        except BaseException:
            self._poll.close()
            os.close(self._wake)
            os.close(self._woken)
            raise

    def add(self, descriptor: int) -> None:
        """Begin with this one."""
        with self._lock:
            self._arrived[descriptor] = []
            self._poll.register(descriptor, select.EPOLLIN)

    def remove(self, descriptor: int) -> None:
        """No more of this one, which is to be closed now."""
        with self._lock:
            self._poll.unregister(descriptor)
            del self._arrived[descriptor]

    def arrived(self, descriptor: int) -> Ranges:
        """Where mappings came to lie since the last call; ascending, may overlap."""
        with self._lock:
            self._read(descriptor)
            found, self._arrived[descriptor] = self._arrived[descriptor], []
        return np.array(sorted(found), dtype=np.int64).reshape(-1, 2)

    def close(self) -> None:
        """End; safe to repeat."""
        if self._wake >= 0:
            os.close(self._wake)
            self._wake = -1
            self._thread.join()
            self._poll.close()
            os.close(self._woken)

    def _serve(self) -> None:
        while True:
            for descriptor, _ in self._poll.poll():
                if descriptor == self._woken:
                    return
                with self._lock:
                    if descriptor in self._arrived:
                        self._read(descriptor)

    def _read(self, descriptor: int) -> None:
        with contextlib.suppress(BlockingIOError):
            while said := os.read(descriptor, _MESSAGES * _MESSAGE.size):
                for event, _, to, length in _MESSAGE.iter_unpack(said):
                    if event == _REMAP:
                        self._arrived[descriptor].append((to, to + length))
                        if len(self._arrived[descriptor]) > _MOST:
                            self._arrived[descriptor] = _joined(self._arrived[descriptor])


def _joined(ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Fewer ranges that hold all of these; to hold more costs only reading."""
    rows = union(np.array(ranges, dtype=np.int64)).tolist()
    if len(rows) > _MOST // 2:
        rows = [[rows[0][0], rows[-1][1]]]
    return [(start, end) for start, end in rows]
