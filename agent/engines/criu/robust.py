"""Where the robust futexes lie that a tree's threads hold when it is restored.

When a thread ends, the kernel follows its list of them to tell whoever waits (``EOWNERDEAD``). A
thread that ends waits for no page (``handle_userfault`` refuses it): where one of these is missing,
the kernel gives up, and nobody is told. Whatever comes onto a list later, its thread has touched.

Promises: every page that the kernel would look at has been asked for, in the order of the lists.
Does not: bring pages; complain of a list that leads nowhere, as little as the kernel does.
"""

from __future__ import annotations

import contextlib
import os
import struct
from collections.abc import Callable, Iterable

from agent import errors

# include/uapi/linux/futex.h: struct robust_list_head (the first entry, from an entry to its futex,
# an entry that is being added or removed), ROBUST_LIST_LIMIT, and the mark of a futex that inherits
# priority.
HEAD = struct.Struct("=QqQ")
_LIMIT = 2048
_MARK = 1
_ENTRY = struct.Struct("=Q")
_FUTEX_BYTES = 4
_ADDRESSES = 1 << 63


def bring(heads: Iterable[int], pid: int, ask: Callable[[int, int], None]) -> None:
    """Follow these lists through the memory of a process that stands still. ``ask`` brings what
    lies between two addresses; it is called before that is looked at.

    Raises:
        errors.NotFound: there is no such process.
    """
    try:
        fd = os.open(f"/proc/{pid}/mem", os.O_RDONLY | os.O_CLOEXEC)
    except (FileNotFoundError, ProcessLookupError) as exc:
        raise errors.NotFound(f"there is no process {pid}", pid=pid) from exc
    try:
        for head in heads:
            with contextlib.suppress(_Nowhere):
                _follow(_Memory(fd, ask), head)
    finally:
        os.close(fd)


class _Nowhere(Exception):
    """Nothing is mapped there."""


class _Memory:
    def __init__(self, fd: int, ask: Callable[[int, int], None]) -> None:
        self._fd = fd
        self._ask = ask

    def look(self, address: int, length: int) -> bytes:
        if not 0 < address < _ADDRESSES - length:
            raise _Nowhere
        self._ask(address, address + length)
        try:
            found = os.pread(self._fd, length, address)
        except OSError as exc:
            raise _Nowhere from exc
        if len(found) < length:
            raise _Nowhere
        return found


def _follow(memory: _Memory, head: int) -> None:
    entry, offset, pending = HEAD.unpack(memory.look(head, HEAD.size))
    if pending & ~_MARK:
        with contextlib.suppress(_Nowhere):
            memory.look((pending & ~_MARK) + offset, _FUTEX_BYTES)
    for _ in range(_LIMIT):
        if entry & ~_MARK == head:
            return
        # The next entry is looked up before this futex is let go of.
        (following,) = _ENTRY.unpack(memory.look(entry & ~_MARK, _ENTRY.size))
        memory.look((entry & ~_MARK) + offset, _FUTEX_BYTES)
        entry = following
