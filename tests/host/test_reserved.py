"""Address space that a program reserved, and of which it uses little."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
from collections.abc import Iterator

import pytest

from agent.host import pagemap
from agent.host.pagemap import PAGE_BYTES, Pagemap
from tests.conftest import NOT_TO_BE_HAD

_RESERVED_BYTES = 64 << 30
_NORESERVE = 0x4000  # asm-generic/mman-common.h: MAP_NORESERVE
_USED_AT = (0, 1 << 20, (31 << 30) + PAGE_BYTES, _RESERVED_BYTES - PAGE_BYTES)


@pytest.fixture
def reserved() -> Iterator[int]:
    """Where it is; a page is used at each of ``_USED_AT``."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NORESERVE
    with mmap.mmap(-1, _RESERVED_BYTES, flags=flags) as memory:
        for at in _USED_AT:
            memory[at] = 1
        view = (ctypes.c_char * 1).from_buffer(memory)
        try:
            yield ctypes.addressof(view)
        finally:
            del view


def test_all_that_is_used_of_it_is_found(reserved: int) -> None:
    end = reserved + _RESERVED_BYTES
    with contextlib.closing(Pagemap(os.getpid())) as pages:
        found = pages.existing(reserved, end), *pages.existing_and_written(reserved, end)
        for each in (*found, pages.occupied(reserved, end), pages.own(reserved, end)):
            used = [at for first, last in each.tolist() for at in range(first, last, PAGE_BYTES)]
            assert [at - reserved for at in used if at - reserved in _USED_AT] == list(_USED_AT)
            # A page may come as part of a huge one.
            assert pagemap.size_bytes(each) <= len(_USED_AT) * (2 << 20)


def test_it_is_looked_at_only_where_it_is_used(reserved: int) -> None:
    if not pagemap.scans():
        pytest.skip(f"{NOT_TO_BE_HAD}this kernel has no PAGEMAP_SCAN")
    with contextlib.closing(Pagemap(os.getpid())) as pages:
        pieces = pages.pieces(reserved, reserved + _RESERVED_BYTES, 64 << 20)
    starts = [start - reserved for start, _ in pieces.tolist()]
    assert len(starts) == 3
    assert starts[0] == 0
