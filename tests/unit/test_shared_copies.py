"""Copies of shared memory: found by content, whatever was done to it between two looks."""

from __future__ import annotations

import ctypes
import os
import random
from collections.abc import Iterator

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
    os.pwrite(memfd, b"x", 70_000)
    os.pwrite(memfd, b"y", 2 * MIB + 5)
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
