"""The calls of a userfaultfd.

Promises: the standard library alone is used: ``keeper``, which runs by itself, needs this.
Does not: know what belongs into the pages.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import struct

PAGE_BYTES = 4096

# linux/userfaultfd.h
UFFDIO_REGISTER, UFFDIO_UNREGISTER = 0xC020AA00, 0x8010AA01
_WAKE, COPY, _ZEROPAGE, _CONTINUE = 0x8010AA02, 0xC028AA03, 0xC020AA04, 0xC020AA07
MODE_MISSING = 1
# struct uffd_msg: the event, then an address behind flags, a descriptor, or up to three numbers.
_EVENT = struct.Struct("=B7xQQQ")
PAGEFAULT, FORK, REMAP, REMOVE, UNMAP = 0x12, 0x13, 0x14, 0x15, 0x16
_EVENTS = 64
# Below it nothing can be mapped unless root changed vm.mmap_min_addr.
_NOWHERE = 1 << 16

_libc = ctypes.CDLL(None, use_errno=True)


def call(fd: int, request: int, *words: int) -> tuple[int, int]:
    """One ioctl of a userfaultfd with a structure of 64-bit words: 0 or the error's number, and
    what the last word became.
    """
    argument = (ctypes.c_uint64 * len(words))(*words)
    result = _libc.ioctl(fd, ctypes.c_ulong(request), argument)
    return (ctypes.get_errno() if result < 0 else 0), ctypes.c_int64(argument[-1]).value


def zero(fd: int, address: int) -> int:
    """Make a missing page zero and wake who waits for it; 0 or the error's number."""
    return call(fd, _ZEROPAGE, address, PAGE_BYTES, 0, 0)[0]


def wake(fd: int, address: int, length: int = PAGE_BYTES) -> None:
    """Whoever waits for these pages looks again."""
    call(fd, _WAKE, address, length)


def messages(fd: int) -> list[tuple[int, int, int, int]]:
    """What a userfaultfd tells now: the event and its numbers."""
    with contextlib.suppress(BlockingIOError):
        return list(_EVENT.iter_unpack(os.read(fd, _EVENTS * _EVENT.size)))
    return []


def gone(fd: int) -> bool:
    """Whether the address space of a userfaultfd has ended."""
    # Asks for something that is done nowhere, wherever this may be: only for shared memory.
    return call(fd, _CONTINUE, _NOWHERE, PAGE_BYTES, 0, 0)[0] == errno.ESRCH
