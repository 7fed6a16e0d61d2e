"""Copies of shared memory: found by content, whatever was done to it between two looks."""

from __future__ import annotations

import ctypes
import mmap
import os
import random
from collections.abc import Callable, Iterator

import pytest

from agent import errors
from agent.engines.criu.held import HeldSink
from agent.engines.tracking.shared import Found, SharedCopies, find
from agent.host import clock
from agent.host.fingerprints import PIECE_BYTES, Fingerprinter
from agent.model.streams import PAGE_BYTES, PageRun
from tests.host.image import MemoryImage

MIB = 1 << 20
SIZE_BYTES = 5 * MIB + 100
_FALLOC_FL_KEEP_SIZE, _FALLOC_FL_PUNCH_HOLE = 1, 2
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mremap.restype = _libc.shmat.restype = ctypes.c_void_p


@pytest.fixture
def memfd() -> Iterator[int]:
    descriptor = os.memfd_create("copied", os.MFD_CLOEXEC)
    os.ftruncate(descriptor, SIZE_BYTES)
    yield descriptor
    os.close(descriptor)


def found(memfd: int) -> Found:
    inode = os.fstat(memfd).st_ino
    (one,) = [each for each in find([os.getpid()]) if each.key.inode == inode]
    return one


def looked(copies: SharedCopies, image: MemoryImage) -> int:
    return copies.round([os.getpid()], image, clock.Deadline.after(60), None)


def finished(copies: SharedCopies, memfd: int, image: MemoryImage) -> tuple[bytes, int]:
    """What the image has of it in the end, holes as zeros, and how much was drafted for that."""
    one = found(memfd)
    existing, size_bytes = copies.finish(one, HeldSink(image, 0))
    rows = existing.tolist()
    image.settle(one.space, [PageRun(low, (high - low) // PAGE_BYTES, 4) for low, high in rows])
    content = bytearray(-(-os.fstat(memfd).st_size // PAGE_BYTES) * PAGE_BYTES)
    for run, data in image.runs_of.get(one.space, []):
        content[run.address : run.address + len(data)] = data
    return bytes(content[: os.fstat(memfd).st_size]), size_bytes


def whole(memfd: int) -> bytes:
    return os.pread(memfd, os.fstat(memfd).st_size, 0)


def test_pages_that_are_as_they_were_drafted_are_not_drafted_again(memfd: int) -> None:
    os.pwrite(memfd, random.randbytes(3 * MIB), 0)
    copies, image = SharedCopies(Fingerprinter()), MemoryImage()
    assert looked(copies, image) == 3 * MIB
    assert looked(copies, image) == 0
    for at in (70_000, 2 * MIB + 5):
        os.pwrite(memfd, bytes([whole(memfd)[at] ^ 1]), at)
    content, size_bytes = finished(copies, memfd, image)
    assert content == whole(memfd)
    assert size_bytes == 2 * PIECE_BYTES


def test_a_page_of_zeros_in_what_was_a_hole_is_stored(memfd: int) -> None:
    """It reads like the hole."""
    copies, image = SharedCopies(Fingerprinter()), MemoryImage()
    os.pwrite(memfd, b"x", 0)
    looked(copies, image)
    os.pwrite(memfd, bytes(PAGE_BYTES), PAGE_BYTES)
    content, size_bytes = finished(copies, memfd, image)
    assert content == whole(memfd)
    assert size_bytes == PAGE_BYTES
    assert image.memory_bytes == 2 * PAGE_BYTES


def test_what_was_taken_away_is_not_stored(memfd: int) -> None:
    os.pwrite(memfd, random.randbytes(SIZE_BYTES), 0)
    copies, image = SharedCopies(Fingerprinter()), MemoryImage()
    looked(copies, image)
    mode = _FALLOC_FL_KEEP_SIZE | _FALLOC_FL_PUNCH_HOLE
    offset, length = ctypes.c_long(MIB), ctypes.c_long(MIB)
    assert _libc.fallocate(memfd, mode, offset, length) == 0
    os.ftruncate(memfd, 4 * MIB)
    os.ftruncate(memfd, 6 * MIB)
    content, size_bytes = finished(copies, memfd, image)
    assert content == whole(memfd)
    assert size_bytes == 0
    assert image.memory_bytes == 3 * MIB


def _fresh(memfd: int, flags: int = 0) -> int:
    return os.open(f"/proc/self/fd/{memfd}", os.O_RDWR | os.O_CLOEXEC | flags)


def _through(memfd: int, write: Callable[[int], object], flags: int = 0) -> None:
    """By a descriptor that comes and goes."""
    descriptor = _fresh(memfd, flags)
    try:
        write(descriptor)
    finally:
        os.close(descriptor)


def _mapped(memfd: int, size_bytes: int = 2 * MIB) -> None:
    """By a mapping that comes and goes; what is read first is written without a fault."""
    with mmap.mmap(memfd, size_bytes) as passing:
        passing[5] ^= 1


def _elsewhere(act: Callable[[], object]) -> None:
    """In a process that nobody follows, and that is gone afterwards."""
    pid = os.fork()
    if not pid:
        try:
            act()
            os._exit(0)
        finally:
            os._exit(1)
    assert os.waitpid(pid, 0)[1] == 0


def _inherited(area: mmap.mmap) -> None:
    area[7] ^= 1


def _spliced(memfd: int) -> None:
    reading, writing = os.pipe()
    os.write(writing, b"spliced")
    assert os.splice(reading, memfd, 7, offset_dst=4096) == 7
    os.close(reading)
    os.close(writing)


def _sent(memfd: int) -> None:
    with open(__file__, "rb") as file:
        os.lseek(memfd, 9, os.SEEK_SET)
        assert os.sendfile(memfd, file.fileno(), 0, 100) == 100


def _punched(memfd: int) -> None:
    mode = _FALLOC_FL_KEEP_SIZE | _FALLOC_FL_PUNCH_HOLE
    assert _libc.fallocate(memfd, mode, ctypes.c_long(0), ctypes.c_long(MIB)) == 0


def _punched_and_read(memfd: int, area: mmap.mmap) -> None:
    """The mapping goes on telling that nobody wrote to these pages."""
    _punched(memfd)
    assert area[::PAGE_BYTES][:256] == bytes(256)


def _moved(area: mmap.mmap) -> None:
    """By a mapping that no ``mmap`` made."""
    first = ctypes.addressof(ctypes.c_char.from_buffer(area))
    twin = _libc.mremap(ctypes.c_void_p(first), ctypes.c_size_t(0), ctypes.c_size_t(MIB), 1)
    ctypes.memset(twin + 11, ctypes.string_at(twin + 11, 1)[0] ^ 1, 1)
    assert _libc.munmap(ctypes.c_void_p(twin), ctypes.c_size_t(MIB)) == 0


def _cut_and_grown(memfd: int) -> None:
    os.ftruncate(memfd, 3 * PAGE_BYTES + 5)
    os.ftruncate(memfd, SIZE_BYTES)


_ESCAPES: dict[str, Callable[[int, mmap.mmap], object]] = {
    "pwrite": lambda memfd, _: os.pwrite(memfd, b"written", 70_000),
    "pwritev": lambda memfd, _: os.pwritev(memfd, [b"wri", b"tten"], 70_000),
    "splice": lambda memfd, _: _spliced(memfd),
    "sendfile": lambda memfd, _: _sent(memfd),
    "copy": lambda memfd, _: os.copy_file_range(memfd, memfd, 100, 0, 5000),
    "hole": lambda memfd, _: _punched(memfd),
    "hole that is read": _punched_and_read,
    "removed": lambda _, area: area.madvise(mmap.MADV_REMOVE, 0, MIB),
    "cut and grown": lambda memfd, _: _cut_and_grown(memfd),
    "mapping": lambda _, area: area.__setitem__(3, area[3] ^ 1),
    "second mapping": lambda memfd, _: _mapped(memfd),
    "mapping unseen": lambda memfd, _: _through(memfd, _mapped, os.O_NOATIME),
    "moved mapping": lambda _, area: _moved(area),
    "child": lambda _, area: _elsewhere(lambda: _inherited(area)),
    "outsider's mapping": lambda memfd, _: _elsewhere(lambda: _through(memfd, _mapped)),
    "outsider's descriptor": lambda memfd, _: _elsewhere(
        lambda: _through(memfd, lambda descriptor: os.pwrite(descriptor, b"written", 70_000))
    ),
}


@pytest.mark.parametrize("escape", _ESCAPES)
def test_whatever_no_page_table_and_no_time_tells_is_found(memfd: int, escape: str) -> None:
    """What was written once more through the mapping, last, hides what else there was."""
    os.pwrite(memfd, random.randbytes(SIZE_BYTES), 0)
    area = mmap.mmap(memfd, 2 * MIB)
    assert sum(area[::PAGE_BYTES]) > 0
    copies, image = SharedCopies(Fingerprinter()), MemoryImage()
    looked(copies, image)
    before = whole(memfd)
    _ESCAPES[escape](memfd, area)
    assert whole(memfd) != before
    area[MIB + 1] ^= 1
    content, _ = finished(copies, memfd, image)
    assert content == whole(memfd)


def test_what_is_written_to_a_private_mapping_is_not_the_objects(memfd: int) -> None:
    os.pwrite(memfd, random.randbytes(SIZE_BYTES), 0)
    copies, image = SharedCopies(Fingerprinter()), MemoryImage()
    looked(copies, image)
    with mmap.mmap(memfd, 2 * MIB, flags=mmap.MAP_PRIVATE) as own:
        own[5] ^= 1
        content, size_bytes = finished(copies, memfd, image)
    assert content == whole(memfd)
    assert size_bytes == 0


def test_what_an_outsider_writes_to_a_segment_is_found() -> None:
    segment = _libc.shmget(0, ctypes.c_size_t(2 * MIB), 0o600)
    assert segment >= 0
    try:
        address = _libc.shmat(segment, None, 0)
        ctypes.memset(address, 1, 2 * MIB)
        (one,) = [each for each in find([os.getpid()]) if "/map_files/" in each.path]
        copies, image = SharedCopies(Fingerprinter()), MemoryImage()
        looked(copies, image)

        def attach() -> None:
            assert _libc.shmdt(ctypes.c_void_p(address)) == 0
            ctypes.memset(_libc.shmat(segment, None, 0), 2, PAGE_BYTES)

        _elsewhere(attach)
        assert ctypes.string_at(address, 1) == b"\2"
        copies.finish(one, HeldSink(image, 0))
        drafts = image.drafts[one.space]
        held = b"".join(drafts[at] for at in range(0, 2 * MIB, PAGE_BYTES))
        assert held == ctypes.string_at(address, 2 * MIB)
        assert _libc.shmdt(ctypes.c_void_p(address)) == 0
    finally:
        _libc.shmctl(segment, 0, None)  # IPC_RMID


def test_any_writes_between_any_looks(memfd: int) -> None:
    draw = random.Random(7)
    copies, image = SharedCopies(Fingerprinter()), MemoryImage()
    for epoch in range(4):
        for _ in range(3):
            for _ in range(20):
                at = draw.randrange(SIZE_BYTES - 9000)
                # The same again, and what was there before, as well.
                os.pwrite(memfd, bytes([draw.randrange(3)]) * draw.randrange(1, 9000), at)
            looked(copies, image)
        os.pwrite(memfd, b"last", draw.randrange(SIZE_BYTES - 4))
        content, _ = finished(copies, memfd, image)
        assert content == whole(memfd)
        image = MemoryImage((str(epoch), image))
        copies.begin(image, str(epoch))


def test_an_object_that_is_gone_at_the_cut_fails_the_short_stop() -> None:
    descriptor = os.memfd_create("gone", os.MFD_CLOEXEC)
    os.ftruncate(descriptor, MIB)
    one = found(descriptor)
    os.close(descriptor)
    with pytest.raises(errors.ShortStopFailed):
        SharedCopies(Fingerprinter()).finish(one, MemoryImage())
