"""Writing into a standing process."""

from __future__ import annotations

import ctypes
import mmap
import os
import signal
import threading
from collections.abc import Iterator, Sequence

import pytest

from agent import errors
from agent.engines.criu import pour
from agent.model.streams import PAGE_BYTES, AddressSpace, PageRun
from tests.host.image import MemoryImage, MemorySource

SPACE = AddressSpace("process", 7)


class EndsItsTarget(MemorySource):
    """An image whose reading takes so long that the process is dead by then."""

    def __init__(self, pid: int) -> None:
        image = MemoryImage()
        image.pages(SPACE, PageRun(1 << 20, 1, 0), memoryview(b"x" * PAGE_BYTES))
        super().__init__(image)
        self._pid = pid

    def read(
        self, space: AddressSpace, runs: Sequence[PageRun] | None = None
    ) -> Iterator[tuple[int, memoryview | None, int]]:
        os.kill(self._pid, signal.SIGKILL)
        os.waitpid(self._pid, 0)
        yield from super().read(space, runs)


def test_a_process_that_ends_meanwhile_is_an_error_and_not_a_loop() -> None:
    pid = os.fork()
    if pid == 0:
        signal.pause()
    share = pour.Split((), (PageRun(1 << 20, 1, 0),), ())
    with pytest.raises(errors.RestoreFailed, match="ended while") as caught:
        pour.pour(EndsItsTarget(pid), SPACE, share, pid, lambda: None)
    assert not isinstance(caught.value, pour.PourRefused)


def test_a_process_that_ended_before_is_no_kernel_that_refuses() -> None:
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    image = MemoryImage()
    image.pages(SPACE, PageRun(1 << 20, 1, 0), memoryview(b"x" * PAGE_BYTES))
    share = pour.Split((), (PageRun(1 << 20, 1, 0),), ())
    with pytest.raises(errors.RestoreFailed, match="ended while") as caught:
        pour.pour(MemorySource(image), SPACE, share, pid, lambda: None)
    assert not isinstance(caught.value, pour.PourRefused)


@pytest.fixture
def standing() -> Iterator[tuple[int, int]]:
    """A process that stands still, with 96 MiB of private memory at the same place as here, of
    which the first 4 MiB are protected and the rest may have huge pages.
    """
    memory = mmap.mmap(-1, 96 << 20, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    memory.madvise(mmap.MADV_HUGEPAGE)
    pid = os.fork()
    if pid == 0:
        ctypes.CDLL(None).mprotect(ctypes.c_void_p(start), ctypes.c_size_t(4 << 20), 0)
        os.kill(os.getpid(), signal.SIGSTOP)
    os.waitpid(pid, os.WUNTRACED)
    try:
        yield pid, start
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def numbered(start: int, pages: int) -> MemoryImage:
    image = MemoryImage()
    for at in range(0, pages, 256):
        data = b"".join((start + n).to_bytes(8, "little") * 512 for n in range(at, at + 256))
        image.pages(SPACE, PageRun(start + at * PAGE_BYTES, 256, 0), memoryview(data))
    return image


def test_memory_is_poured_by_several_threads_whole_and_also_where_it_is_protected(
    standing: tuple[int, int],
) -> None:
    pid, start = standing
    pages = (96 << 20) // PAGE_BYTES
    image = numbered(start, pages)
    runs = (PageRun(start, pages, 0),)
    source = MemorySource(image)
    assert source.runs(SPACE)
    checked: set[int] = set()
    share = pour.Split((), (), runs)
    written = pour.pour_all(
        source, {SPACE: share}, {SPACE: pid}, lambda: checked.add(threading.get_ident())
    )
    assert written == pages * PAGE_BYTES
    assert threading.get_ident() not in checked
    with open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
        for number in range(pages):
            memory.seek(start + number * PAGE_BYTES)
            assert memory.read(PAGE_BYTES) == (start + number).to_bytes(8, "little") * 512


def test_what_one_thread_cannot_pour_ends_the_others(standing: tuple[int, int]) -> None:
    pid, start = standing
    pages = (96 << 20) // PAGE_BYTES
    source = MemorySource(numbered(start, pages))
    pieces: list[int] = []

    def fail() -> None:
        pieces.append(1)
        raise errors.Corrupt("damaged after all")

    share = pour.Split((), (), (PageRun(start, pages, 0),))
    with pytest.raises(errors.Corrupt):
        pour.pour_all(source, {SPACE: share}, {SPACE: pid}, fail)
    assert len(pieces) <= 3
