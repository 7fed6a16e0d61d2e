"""Copying a tree's shared memory ahead: memfds, shared anonymous mappings, SysV segments.

Anybody who has such an object may write to it, by system calls and through mappings that come and
go between two looks, so no note of the kernel's tells what is unchanged. Its content does
(``compared``). Write protection of every mapping and the object's times together do not either, as
seen on Linux 6.18: a first write to a protected page sets ctime as ``write(2)`` does, so that its
change tells nothing; a memfd's own descriptor makes no inotify event; a page that was punched out
stays noted as not written, also when it is read back as zeros; and a forked child, or a mapping
made by ``mremap`` or of a file that is open with O_NOATIME, changes no time if it reads a page
before it writes there, and leaves nothing when it goes.

Promises: at the cut, every page that an object has then is drafted with the content that it has
then; objects are known by their file, however many processes have them, and are held open only
while they are read.
Does not: take on objects smaller than ``SMALLEST_BYTES``, in huge pages, of a number that CRIU
would cut off, or that processes have mapped to write and to execute, where CRIU may work itself
(``criu/codepages``) while they stand still; whoever copied these before goes on doing so.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import functools
import os
from collections.abc import Iterable, Iterator

import numpy as np

from agent import errors
from agent.engines.tracking.compared import Compared, Read
from agent.engines.tracking.pace import Pace
from agent.host import clock, proc
from agent.host.fingerprints import Fingerprinter
from agent.host.pagemap import Ranges
from agent.model.streams import PAGE_BYTES, AddressSpace, MemberSink

SMALLEST_BYTES = 1 << 20
# CRIU keeps the inode's number, by which it calls a memfd, in 32 bits (criu/memfd.c of 4.2).
_NUMBERS_END = 1 << 32


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
    try:
        while True:
            start = os.lseek(descriptor, at, os.SEEK_DATA)
            at = os.lseek(descriptor, start, os.SEEK_HOLE)
            # The end of an object need not be that of a page.
            rows.append((start, -(-at // PAGE_BYTES) * PAGE_BYTES))
    except OSError as exc:
        if exc.errno != errno.ENXIO:  # nothing more
            raise errors.NotFound(f"a shared memory object cannot be read: {exc}") from exc
    return np.array(rows, dtype=np.int64).reshape(-1, 2)


def _read(descriptor: int, into: memoryview, offset: int) -> None:
    """What lies beyond the end is zero. Raises errors.NotFound if it cannot be read."""
    done = 0
    while done < len(into):
        try:
            got = os.preadv(descriptor, [into[done:]], offset + done)
        except OSError as exc:
            raise errors.NotFound(f"a shared memory object cannot be read: {exc}") from exc
        if not got:
            into[done:] = bytes(len(into) - done)
            return
        done += got


def _reading(descriptor: int) -> Read:
    def read(into: memoryview, start: int, wanted: Ranges) -> Ranges:
        _read(descriptor, into, start)
        return wanted

    return read


class SharedCopies:
    """The copies of all shared memory objects of a tree."""

    def __init__(self, fingerprinter: Fingerprinter) -> None:
        self._fingerprinter = fingerprinter
        self._copies: dict[Key, Compared] = {}

    @property
    def changed_bytes(self) -> int:
        """What the last look found changed."""
        return sum(copy.changed_bytes for copy in self._copies.values())

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
            with contextlib.suppress(errors.NotFound), _opened(each) as (descriptor, existing):
                read = _reading(descriptor)
                total += self._copy(each).round(existing, read, sink, deadline, pace)
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
        """At the cut: draft what is not as it was drafted; all pages that there are, and how many
        bytes were drafted. ``sink`` must be safe from several threads.

        Raises:
            errors.ShortStopFailed: it is not there any more.
        """
        try:
            with _opened(each) as (descriptor, existing):
                return existing, self._copy(each).finish(existing, _reading(descriptor), sink)
        except errors.NotFound as exc:
            raise errors.ShortStopFailed(exc.message) from exc

    def _copy(self, found: Found) -> Compared:
        if found.key not in self._copies:
            self._copies[found.key] = Compared(found.space, self._fingerprinter)
        return self._copies[found.key]
