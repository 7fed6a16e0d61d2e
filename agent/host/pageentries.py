"""The entries of /proc/PID/pagemap, one a page: what every kernel knows, PAGEMAP_SCAN or not.

Promises: ``scan`` answers as PAGEMAP_SCAN does, for the categories that an entry has.
Does not: know guard pages or write protection, which no kernel without PAGEMAP_SCAN has in a way
that is used here; know that a huge page is the kernel's zero page, which then counts as content.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import os

import numpy as np
from numpy import typing as npt

PAGE_BYTES = 4096

# Documentation/admin-guide/mm/pagemap.rst
PRESENT, SWAPPED, FILE, SOFT_DIRTY = (np.uint64(1 << bit) for bit in (63, 62, 61, 55))
# What page of memory, or which place of which swap space; 0 for those who may not know.
FRAME = np.uint64((1 << 55) - 1)

# linux/fs.h, the categories of PAGEMAP_SCAN.
_C_WRITTEN, _C_FILE, _C_PRESENT, _C_SWAPPED, _C_PFNZERO = 2, 4, 8, 16, 32
# Read at once: 2 MiB of entries.
WINDOW_BYTES = 1 << 30

Entries = npt.NDArray[np.uint64]


def read(descriptor: int, start: int, end: int) -> Entries:
    """The entries of the pages from ``start`` to ``end``, not more than ``WINDOW_BYTES`` apart.

    Raises:
        ProcessLookupError: the process has ended.
    """
    wanted = (end - start) // PAGE_BYTES
    data = bytearray(wanted * 8)
    view, at = memoryview(data), 0
    while at < len(data):
        count = os.preadv(descriptor, [view[at:]], start // PAGE_BYTES * 8 + at)
        if not count:
            raise ProcessLookupError
        at += count
    return np.frombuffer(data, dtype=np.uint64)


def scan(
    descriptor: int, start: int, end: int, inverted: int, mask: int, any_of: int, returned: int
) -> npt.NDArray[np.int64]:
    """Ranges whose pages match, and those of their categories that are asked for: shape (n, 3).
    What they mean: Documentation/admin-guide/mm/pagemap.rst.

    Raises:
        ProcessLookupError: the process has ended.
    """
    found = [np.empty((0, 3), dtype=np.int64)]
    for at in range(start, end, WINDOW_BYTES):
        stop = min(end, at + WINDOW_BYTES)
        categories = _categories(read(descriptor, at, stop))
        looked_at = categories ^ inverted
        matching = looked_at & mask == mask
        if any_of:
            matching &= looked_at & any_of != 0
        kinds = np.where(matching, categories & returned, -1)
        edges = np.flatnonzero(np.diff(kinds)) + 1
        firsts = np.concatenate(([0], edges))
        lasts = np.concatenate((edges, [len(kinds)]))
        kept = matching[firsts]
        rows = [at + firsts * PAGE_BYTES, at + lasts * PAGE_BYTES, kinds[firsts]]
        found.append(np.stack(rows, axis=1)[kept].astype(np.int64))
    return np.concatenate(found)


def _categories(entries: Entries) -> npt.NDArray[np.int64]:
    """In words of PAGEMAP_SCAN. Where nothing notes writes, what is there counts as written."""
    there = entries & (PRESENT | SWAPPED) != 0
    found = np.where(there, np.int64(_C_WRITTEN), np.int64(0))
    for bit, category in ((FILE, _C_FILE), (PRESENT, _C_PRESENT), (SWAPPED, _C_SWAPPED)):
        found |= np.where(entries & bit != 0, np.int64(category), np.int64(0))
    zero = zero_frame()
    if zero:
        is_zero = (entries & PRESENT != 0) & (entries & FRAME == np.uint64(zero))
        found |= np.where(is_zero, np.int64(_C_PFNZERO), np.int64(0))
    return found


@functools.cache
def zero_frame() -> int:
    """Which page of memory is the kernel's zero page; 0 if that may not be known."""
    with mmap.mmap(-1, PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as page:
        handle = (ctypes.c_char * PAGE_BYTES).from_buffer(page)
        address = ctypes.addressof(handle)
        try:
            ctypes.string_at(address, 1)  # reading it is what maps the zero page there
            descriptor = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
            try:
                (entry,) = read(descriptor, address, address + PAGE_BYTES)
            finally:
                os.close(descriptor)
        finally:
            del handle
    return int(entry & FRAME) if entry & PRESENT else 0
