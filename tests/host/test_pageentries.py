"""Which pages there are, on kernels that must be asked page by page."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import subprocess
from collections.abc import Iterator

import pytest

from agent import errors
from agent.engines.tracking.protected import Protected
from agent.host import injection, pagemap, proc
from agent.host.moves import Moves
from agent.host.pagemap import Pagemap
from tests.conftest import NOT_TO_BE_HAD

_PAGE_BYTES = 4096
_BYTES = 64 << 20
_MADV_NOHUGEPAGE = 15


@pytest.fixture
def area() -> Iterator[tuple[int, int]]:
    """Memory of our own, with pages that were written, read or never touched in turns."""
    libc = ctypes.CDLL(None)
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    with mmap.mmap(-1, _BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        handle = (ctypes.c_char * _BYTES).from_buffer(memory)
        start = ctypes.addressof(handle)
        assert libc.madvise(start, _BYTES, _MADV_NOHUGEPAGE) == 0
        for page in range(0, _BYTES // 2 // _PAGE_BYTES, 7):
            ctypes.memset(start + page * _PAGE_BYTES, 1, 2 * _PAGE_BYTES)
            ctypes.string_at(start + (page + 3) * _PAGE_BYTES, 1)
        try:
            yield start, start + _BYTES
        finally:
            del handle


def looked(area: tuple[int, int]) -> list[list[list[int]]]:
    with contextlib.closing(Pagemap(os.getpid())) as pages:
        ways = (pages.existing, pages.own, pages.occupied, pages.unguarded)
        found = [*(way(*area) for way in ways), *pages.existing_and_written(*area)]
        assert not pages.guarded(*area)
    return [pagemap.union(ranges).tolist() for ranges in found]


@pytest.mark.skipif(not pagemap.scans(), reason=f"{NOT_TO_BE_HAD}there is no other way here")
def test_page_by_page_is_found_what_is_found_at_once(
    area: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    at_once = looked(area)
    monkeypatch.setattr(pagemap, "scans", lambda: False)
    assert looked(area) == at_once
    assert all(len(rows) > 1000 for rows in at_once)


def test_a_process_that_ended_is_not_one_without_memory(
    area: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pagemap, "scans", lambda: False)
    with subprocess.Popen(["sleep", "100"]) as child, contextlib.closing(Pagemap(child.pid)) as it:
        child.kill()
        child.wait()
        with pytest.raises(errors.NotFound):
            it.existing(*area)


def test_nothing_is_put_into_a_process_for_a_kernel_that_would_note_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def inject(*_: object) -> None:
        pytest.fail("it was touched")

    monkeypatch.setattr(pagemap, "scans", lambda: False)
    monkeypatch.setattr(injection, "userfaultfd", inject)
    moves = Moves()
    with contextlib.closing(moves), pytest.raises(errors.EnvironmentUnfit):
        Protected(proc.identity(os.getpid()), moves)
