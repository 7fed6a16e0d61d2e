"""Pages of a process become drafts; here of this very one."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Sequence

import numpy as np
import pytest

from agent import errors
from agent.engines.criu.codepages import CodePages
from agent.engines.tracking import reading
from agent.host import proc
from agent.model.streams import PAGE_BYTES, AddressSpace, MemberSink, PageRun

_libc = ctypes.CDLL(None)
_libc.mmap.restype = ctypes.c_void_p


class Kept:
    """Keeps drafts."""

    def __init__(self) -> None:
        self.pages: dict[int, bytes] = {}

    def draft(self, space: AddressSpace, runs: Sequence[PageRun], data: memoryview) -> None:
        content = bytes(data)
        for run in runs:
            size_bytes = run.pages * PAGE_BYTES
            self.pages[run.address], content = content[:size_bytes], content[size_bytes:]


class Code(CodePages):
    """Knows one page of this process."""

    def __init__(self, space: AddressSpace, address: int, page: bytes) -> None:
        super().__init__()
        self._pages[space] = address, memoryview(bytearray(page))


def test_what_cannot_be_read_is_said_and_the_rest_is_drafted_as_it_was_before_criu_came() -> None:
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    start = _libc.mmap(None, 3 * PAGE_BYTES, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0)
    first, second, third = (start + number * PAGE_BYTES for number in range(3))
    ctypes.memset(start, 1, 3 * PAGE_BYTES)
    _libc.munmap(ctypes.c_void_p(second), PAGE_BYTES)
    try:
        space, kept = AddressSpace("process", os.getpid()), Kept()
        sink: MemberSink = kept  # type: ignore[assignment]
        drafts = Code(space, first, bytes([9]) * PAGE_BYTES).drafts(sink)
        ranges = np.array([[at, at + PAGE_BYTES] for at in (first, second, third)], dtype=np.int64)
        with pytest.raises(errors.ShortStopFailed):
            reading.whole(proc.identity(os.getpid()), space, ranges, drafts)
        assert kept.pages == {first: bytes([9]) * PAGE_BYTES, third: bytes([1]) * PAGE_BYTES}
    finally:
        _libc.munmap(ctypes.c_void_p(start), 3 * PAGE_BYTES)


def test_pieces_are_read_through_one_room_however_many_and_large_they_are() -> None:
    pages = 3 * reading.ROOM_BYTES // PAGE_BYTES
    memory = mmap.mmap(-1, pages * PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    for page in range(pages):
        memory[page * PAGE_BYTES : page * PAGE_BYTES + 2] = page.to_bytes(2, "little")
    anchor = ctypes.c_char.from_buffer(memory)
    start = ctypes.addressof(anchor)
    # Every second page by itself, which are more pieces than the kernel takes at once, then a large
    # one that does not begin where the room does.
    rows = [(page, page + 1) for page in range(0, pages // 2, 2)] + [(pages // 2 + 1, pages)]
    ranges = start + np.array(rows, dtype=np.int64) * PAGE_BYTES
    space, kept, who = AddressSpace("process", os.getpid()), Kept(), proc.identity(os.getpid())
    room = reading.room()
    size_bytes = reading.whole(who, space, ranges, kept, room)
    expected = [page for low, high in rows for page in range(low, high)]
    assert size_bytes == len(expected) * PAGE_BYTES
    found = b"".join(kept.pages[address] for address in sorted(kept.pages))
    numbers = [int.from_bytes(found[at : at + 2], "little") for at in range(0, len(found), 4096)]
    assert numbers == expected
    del anchor
    memory.close()
