"""Copying a tree's shared memory ahead: memfds, shared anonymous mappings, SysV segments.

Anybody who has such an object may write to it, by system calls and through mappings that come and
go between two looks, so no note of the kernel's tells what is unchanged. Its content does: each
piece is read again at the cut, and of those that differ the pages that differ from the drafts are
given to the sink.

Promises: at the cut, every page that an object has then is drafted with the content that it has
then; objects are known by their file, however many processes have them, and are held open only
while they are read. What is kept is 17 bytes a page.
Does not: take on objects smaller than ``SMALLEST_BYTES``, in huge pages, of a number that CRIU
would cut off, or that processes have mapped to write and to execute, where CRIU may work itself
(``criu/codepages``) while they stand still; whoever copied these before goes on doing so.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import queue
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy import typing as npt

from agent import errors
from agent.engines.tracking.pace import Pace
from agent.host import clock, pagemap, proc
from agent.host.fingerprints import PIECE_BYTES, Fingerprinter, Fingerprints
from agent.host.pagemap import Ranges
from agent.model.streams import PAGE_BYTES, AddressSpace, MemberSink, PageRun

SMALLEST_BYTES = 1 << 20
# As in the page server: few system calls a byte, and it stays in a core's cache.
_STEP_BYTES = 2 << 20
_STEP_PIECES = _STEP_BYTES // PIECE_BYTES
_PIECE_PAGES = PIECE_BYTES // PAGE_BYTES
# CRIU keeps the inode's number, by which it calls a memfd, in 32 bits (criu/memfd.c of 4.2).
_NUMBERS_END = 1 << 32
# Two read quicker than one; more only take from each other.
_READERS = 2


@dataclasses.dataclass(frozen=True)
class Key:
    """Which file an object is."""

    device: int
    inode: int


@dataclasses.dataclass(frozen=True)
class Found:
    """An object of a tree; ``path`` opens it as long as the process has it there."""

    key: Key
    path: str

    @property
    def space(self) -> AddressSpace:
        """What CRIU calls it."""
        return AddressSpace("shmem", self.key.inode)


def key_of(path: str) -> Key:
    """Which file this is; raises OSError."""
    found = os.stat(path)
    return Key(found.st_dev, found.st_ino)


def find(pids: Iterable[int]) -> list[Found]:
    """The shared memory objects that these processes have mapped or open."""
    objects: dict[Key, Found] = {}
    workplaces: set[Key] = set()
    for pid in pids:
        with contextlib.suppress(errors.NotFound):
            for path, perms in _paths(pid):
                # It may be gone again.
                with contextlib.suppress(OSError):
                    known = os.stat(path)
                    key = Key(known.st_dev, known.st_ino)
                    if perms.endswith("wxs"):
                        workplaces.add(key)
                    if known.st_dev == _device() and known.st_size >= SMALLEST_BYTES:
                        objects.setdefault(key, Found(key, path))
    return [
        each
        for each in objects.values()
        if each.key.inode < _NUMBERS_END and each.key not in workplaces
    ]


def _paths(pid: int) -> Iterator[tuple[str, str]]:
    """Where shared memory may be had from, and how it is mapped there ("" if it is open)."""
    if _maps_any(pid):
        for mapping in proc.maps(pid):
            if mapping.dev == _device_numbers():
                path = f"/proc/{pid}/map_files/{mapping.start:x}-{mapping.end:x}"
                yield path, mapping.perms
    for number in proc.descriptors(pid):
        with contextlib.suppress(OSError, errors.NotFound):
            if proc.descriptor_link(pid, number).startswith("/memfd:"):
                yield f"/proc/{pid}/fd/{number}", ""


def _maps_any(pid: int) -> bool:
    """Whether there may be a mapping of any: nearly no process has one, and some have thousands of
    others, which take long to take apart while everything stands still.
    """
    try:
        with open(f"/proc/{pid}/maps", "rb") as file:
            return b" %02x:%02x " % _device_numbers() in file.read()
    except OSError as exc:
        raise errors.NotFound(f"there is no process {pid}", pid=pid) from exc


@functools.cache
def _device() -> int:
    """The device of all shared memory that is no file of a mounted file system."""
    descriptor = os.memfd_create("device", os.MFD_CLOEXEC)
    try:
        return os.fstat(descriptor).st_dev
    finally:
        os.close(descriptor)


def _device_numbers() -> tuple[int, int]:
    return os.major(_device()), os.minor(_device())


class SharedCopy:
    """The copy of one object."""

    def __init__(self, space: AddressSpace, fingerprinter: Fingerprinter) -> None:
        self.space = space
        self._fingerprinter = fingerprinter
        # Of each piece, and of each page: pages cost several times as much a byte.
        self._pieces: Fingerprints = np.zeros((0, 2), dtype=np.uint64)
        self._pages: Fingerprints = np.zeros((0, 2), dtype=np.uint64)
        # Pages that were there when their fingerprints were taken, and drafted.
        self._have = pagemap.none()
        # Fresh memory would cost as much time as reading into it.
        self._buffers: queue.SimpleQueue[memoryview] = queue.SimpleQueue()

    def recall(self, sink: MemberSink, epoch: str) -> None:
        """Begin another copy, in ``sink``, with what it takes over of ``epoch``."""
        runs = sink.recall(epoch, self.space)
        self._have = pagemap.clip(self._have, _ranges(runs))

    def round(
        self, found: Found, sink: MemberSink, deadline: clock.Deadline, pace: Pace | None
    ) -> int:
        """Draft what is not as it was drafted; say how many bytes that were."""
        drafted = [0]
        with _opened(found) as (descriptor, existing), _buffers(self._buffers):
            steps = _steps(existing)
            self._make_room(steps)
            had = self._have
            self._have = pagemap.none()  # until it went well
            kept = [pagemap.clip(had, existing)]
            for step in steps:
                deadline.check("copying memory ahead")
                if pace is not None:
                    pace.wait(_STEP_BYTES)
                missing = self._compare(descriptor, step, existing, kept[0], sink)
                drafted.append(pagemap.size_bytes(missing))
                kept.append(missing)
            self._have = pagemap.union(*kept)
        return sum(drafted)

    def finish(self, found: Found, sink: MemberSink) -> tuple[Ranges, int]:
        """At the cut: draft what is not as it was drafted; all pages that there are, and how many
        bytes were drafted. ``sink`` must be safe from several threads.
        """
        with _opened(found) as (descriptor, existing):
            steps = _steps(existing)
            self._make_room(steps)
            had = self._have
            with _buffers(self._buffers), ThreadPoolExecutor(_READERS, "shared") as pool:
                missing = pool.map(
                    lambda step: self._compare(descriptor, step, existing, had, sink), steps
                )
                size_bytes = sum(map(pagemap.size_bytes, missing))
        self._have = existing
        return existing, size_bytes

    def _make_room(self, steps: list[int]) -> None:
        pieces = (steps[-1] + 1) * _STEP_PIECES if steps else 0
        self._pieces = _longer(self._pieces, pieces)
        self._pages = _longer(self._pages, pieces * _PIECE_PAGES)

    def _compare(
        self, descriptor: int, step: int, existing: Ranges, had: Ranges, sink: MemberSink
    ) -> Ranges:
        """Read one step, draft what differs, and say which pages."""
        start = step * _STEP_BYTES
        data = self._buffers.get()
        try:
            return self._compared(descriptor, start, data, existing, had, sink)
        finally:
            self._buffers.put(data)

    def _compared(
        self,
        descriptor: int,
        start: int,
        data: memoryview,
        existing: Ranges,
        had: Ranges,
        sink: MemberSink,
    ) -> Ranges:
        _read(descriptor, data, start)
        same = self._same_pages(data, start // PIECE_BYTES)
        starts = start + np.flatnonzero(same) * PAGE_BYTES
        unchanged = pagemap.union(np.stack([starts, starts + PAGE_BYTES], axis=1).astype(np.int64))
        whole = np.array([[start, start + _STEP_BYTES]], dtype=np.int64)
        missing = pagemap.without(pagemap.clip(existing, whole), pagemap.clip(had, unchanged))
        if len(missing):
            rows = missing.tolist()
            runs = [PageRun(low, (high - low) // PAGE_BYTES, 0) for low, high in rows]
            parts = [data[low - start : high - start] for low, high in rows]
            sink.draft(self.space, runs, _joined(parts))
        return missing

    def _same_pages(self, data: memoryview, first: int) -> npt.NDArray[np.bool_]:
        """Which pages of ``data``, from piece number ``first`` on, are what they were when this was
        asked last.
        """
        tags = self._fingerprinter.of(data)
        at = slice(first, first + len(tags))
        changed = np.flatnonzero((tags != self._pieces[at]).any(axis=1)).tolist()
        self._pieces[at] = tags
        same = np.ones(len(tags) * _PIECE_PAGES, dtype=np.bool_)
        for number in changed:
            piece = data[number * PIECE_BYTES : (number + 1) * PIECE_BYTES]
            page_tags = self._fingerprinter.of(piece, PAGE_BYTES)
            begin = (first + number) * _PIECE_PAGES
            before = self._pages[begin : begin + _PIECE_PAGES]
            within = slice(number * _PIECE_PAGES, (number + 1) * _PIECE_PAGES)
            same[within] = (page_tags == before).all(axis=1)
            before[:] = page_tags
        return same


def _joined(parts: list[memoryview]) -> memoryview:
    return parts[0] if len(parts) == 1 else memoryview(b"".join(parts))


def _longer(tags: Fingerprints, length: int) -> Fingerprints:
    """``tags`` with room for so many."""
    if len(tags) >= length:
        return tags
    return np.concatenate([tags, np.zeros((length - len(tags), 2), dtype=np.uint64)])


def _ranges(runs: Iterable[PageRun]) -> Ranges:
    rows = [(run.address, run.address + run.pages * PAGE_BYTES) for run in runs]
    return np.array(rows, dtype=np.int64).reshape(-1, 2)


def _steps(existing: Ranges) -> list[int]:
    """Which steps hold a page."""
    found: set[int] = set()
    for low, high in existing.tolist():
        found.update(range(low // _STEP_BYTES, -(-high // _STEP_BYTES)))
    return sorted(found)


@contextlib.contextmanager
def _buffers(into: queue.SimpleQueue[memoryview]) -> Iterator[None]:
    """One for each reader, no longer than they are needed."""
    for _ in range(_READERS):
        into.put(memoryview(bytearray(_STEP_BYTES)))
    try:
        yield
    finally:
        for _ in range(_READERS):
            into.get()


@contextlib.contextmanager
def _opened(found: Found) -> Iterator[tuple[int, Ranges]]:
    """The object and its pages; raises errors.NotFound if it is not there any more."""
    try:
        descriptor = os.open(found.path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as exc:
        raise errors.NotFound("a shared memory object is gone", inode=found.key.inode) from exc
    try:
        known = os.fstat(descriptor)
        if Key(known.st_dev, known.st_ino) != found.key:
            raise errors.NotFound("a shared memory object is gone", inode=found.key.inode)
        yield descriptor, _pages(descriptor)
    finally:
        os.close(descriptor)


def _pages(descriptor: int) -> Ranges:
    """The pages that an object has, as CRIU finds them (criu/shmem.c, next_data_segment)."""
    rows, at = [], 0
    with contextlib.suppress(OSError):  # ENXIO: nothing more
        while True:
            start = os.lseek(descriptor, at, os.SEEK_DATA)
            at = os.lseek(descriptor, start, os.SEEK_HOLE)
            # The end of an object need not be that of a page.
            rows.append((start, -(-at // PAGE_BYTES) * PAGE_BYTES))
    return np.array(rows, dtype=np.int64).reshape(-1, 2)


def _read(descriptor: int, into: memoryview, offset: int) -> None:
    """What lies beyond the end is zero."""
    done = 0
    while done < len(into):
        got = os.preadv(descriptor, [into[done:]], offset + done)
        if not got:
            into[done:] = bytes(len(into) - done)
            return
        done += got


class SharedCopies:
    """The copies of all shared memory objects of a tree."""

    def __init__(self) -> None:
        self._fingerprinter = Fingerprinter()
        self._copies: dict[Key, SharedCopy] = {}

    def begin(self, sink: MemberSink, epoch: str) -> None:
        """Begin other copies, in ``sink``, after the last ones became ``epoch``."""
        for copy in self._copies.values():
            copy.recall(sink, epoch)

    def round(
        self, pids: Iterable[int], sink: MemberSink, deadline: clock.Deadline, pace: Pace | None
    ) -> int:
        """Draft what is not as it was drafted; say how many bytes that were."""
        total = 0
        for each in find(pids):
            with contextlib.suppress(errors.NotFound):
                total += self._copy(each).round(each, sink, deadline, pace)
        return total

    def cut(self, pids: Iterable[int]) -> list[Found]:
        """What is copied of processes that stand still; two objects of one number are not."""
        found = find(pids)
        numbers = [each.space for each in found]
        standing = [each for each in found if numbers.count(each.space) == 1]
        keys = {each.key for each in standing}
        self._copies = {key: copy for key, copy in self._copies.items() if key in keys}
        return standing

    def finish(self, each: Found, sink: MemberSink) -> tuple[Ranges, int]:
        """See ``SharedCopy.finish``.

        Raises:
            errors.ShortStopFailed: it is not there any more.
        """
        try:
            return self._copy(each).finish(each, sink)
        except errors.NotFound as exc:
            raise errors.ShortStopFailed(exc.message) from exc

    def _copy(self, found: Found) -> SharedCopy:
        if found.key not in self._copies:
            self._copies[found.key] = SharedCopy(found.space, self._fingerprinter)
        return self._copies[found.key]
