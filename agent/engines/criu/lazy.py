"""Which memory of a tree may come when it runs already, and how the kernel is told to ask for it.

Large private anonymous mappings are left empty. CRIU has each process open a userfaultfd for them
(its lazy mode, whose part of the daemon is played here); when the tree stands, those mappings alone
are registered again, and ``filling`` brings what belongs there.

Promises: what the kernel itself needs at a thread's end, stacks, locked memory, mappings that
children do not inherit as they are, and whatever is small are there before the tree runs. No dump
takes a tree that is not complete.
Does not: fill anything.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
import os
import select
import socket
import struct
import sys
import threading
from collections.abc import Iterator, Sequence

from agent import errors
from agent.engines.criu import journal, pour, treeend, uffd
from agent.host import proc
from agent.host.pagemap import Pagemap
from agent.model.streams import PAGE_BYTES, PageRun

# criu/include/uffd.h and image.h: where its lazy mode finds us, what it says at the end, and the
# mark of a page that it leaves to us.
_SOCKET = "lazy-pages.socket"
PAGEMAP_LAZY = 1 << 1
_PID_BYTES = 4
# What it has begun to say comes at once; this is a struct timeval of ten seconds.
_SAID = struct.pack("@ll", 10, 0)
# Below this, a page at once costs less than a fault later.
_SMALLEST_BYTES = 1 << 20
# One message names all mappings of a process.
_MOST_AREAS = 4000
# include/uapi/asm-generic/mman.h and mman-common.h
_MAP_GROWSDOWN, _MAP_LOCKED = 0x100, 0x2000
_MADV_DONTFORK, _MADV_WIPEONFORK = 1 << 10, 1 << 18


class LateRefused(errors.RestoreFailed):
    """Memory cannot come when the tree runs already; it may come before."""

    code = "late-memory-refused"


@dataclasses.dataclass(frozen=True)
class Deferred:
    """What comes later of one process: its mappings as (start, end), and the runs in them."""

    areas: tuple[tuple[int, int], ...]
    runs: tuple[PageRun, ...]

    @property
    def size_bytes(self) -> int:
        """How much it is."""
        return sum(run.pages for run in self.runs) * PAGE_BYTES

    @functools.cached_property
    def _starts(self) -> list[int]:
        return [run.address for run in self.runs]

    def within(self, start: int, end: int) -> list[PageRun]:
        """The parts of the runs that lie in this range."""
        found = []
        for at in range(max(0, bisect.bisect_right(self._starts, start) - 1), len(self.runs)):
            run = self.runs[at]
            if run.address >= end:
                break
            low = max(start, run.address)
            high = min(end, run.address + run.pages * PAGE_BYTES)
            if low < high:
                found.append(PageRun(low, (high - low) // PAGE_BYTES, run.flags))
        return found

    def holes(self, least_pages: int) -> Iterator[tuple[int, int]]:
        """What of the mappings is in no run: address and pages, if so many are in a row."""
        least_bytes = least_pages * PAGE_BYTES
        for start, end in self.areas:
            for run in self.within(start, end):
                if run.address - start >= least_bytes:
                    yield start, (run.address - start) // PAGE_BYTES
                start = run.address + run.pages * PAGE_BYTES
            if end - start >= least_bytes:
                yield start, (end - start) // PAGE_BYTES


def defer(process: pour.ProcessMemory, share: pour.Split) -> tuple[pour.Split, Deferred]:
    """Share out what would be poured into fresh memory: what still is, and what comes later."""
    areas = sorted((a for a in process.areas if _may_wait(a)), key=lambda area: area.start)
    starts = [area.start for area in areas]

    def of(run: PageRun) -> int:
        at = bisect.bisect_right(starts, run.address) - 1
        return at if at >= 0 and run.address < areas[at].end else -1

    stored = [0] * len(areas)
    for run in share.poured_fresh:
        if (at := of(run)) >= 0:
            stored[at] += run.pages * PAGE_BYTES
    largest = sorted(range(len(areas)), key=lambda at: -stored[at])[:_MOST_AREAS]
    chosen = {at for at in largest if stored[at] >= _SMALLEST_BYTES}
    early = sorted({address // PAGE_BYTES * PAGE_BYTES for address in process.early_addresses})
    now: list[PageRun] = []
    later: list[PageRun] = []
    for run in share.poured_fresh:
        if of(run) in chosen:
            for part, wanted in _apart(run, early):
                (now if wanted else later).append(part)
        else:
            now.append(run)
    kept = tuple((areas[at].start, areas[at].end) for at in sorted(chosen))
    return dataclasses.replace(share, poured_fresh=tuple(now)), Deferred(kept, tuple(later))


def _may_wait(area: pour.Area) -> bool:
    return (
        pour.anonymous(area)
        and not area.flags & (_MAP_GROWSDOWN | _MAP_LOCKED)
        and not area.advice & (_MADV_DONTFORK | _MADV_WIPEONFORK)
    )


def _apart(run: PageRun, pages: Sequence[int]) -> Iterator[tuple[PageRun, bool]]:
    """The run in parts, and whether each is one of these pages."""
    at, end = run.address, run.address + run.pages * PAGE_BYTES
    for page in pages[bisect.bisect_left(pages, at) : bisect.bisect_left(pages, end)]:
        if page > at:
            yield PageRun(at, (page - at) // PAGE_BYTES, run.flags), False
        yield PageRun(page, 1, run.flags), True
        at = page + PAGE_BYTES
    if at < end:
        yield PageRun(at, (end - at) // PAGE_BYTES, run.flags), False


class Daemon:
    """CRIU's lazy mode speaks to this. Until ``take``, while CRIU itself works in the processes,
    their missing pages are zero, as they are for a process that was just made.
    """

    def __init__(self, folder: str) -> None:
        self._found: dict[int, int] = {}
        self._wake, self._woken = os.pipe2(os.O_CLOEXEC)
        self._listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._thread = threading.Thread(target=self._serve, name="lazy", daemon=True)
        self._connection: socket.socket | None = None
        # A socket's path is short, whatever the folder's is.
        at = os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            self._listening.bind(f"/proc/self/fd/{at}/{_SOCKET}")
            self._listening.listen()
        finally:
            os.close(at)
        self._thread.start()

    def take(self) -> dict[int, int]:
        """The userfaultfds by the processes' numbers in the image; the caller closes them."""
        self._stop()
        found, self._found = self._found, {}
        return found

    def close(self) -> None:
        """End; safe to repeat. Not before CRIU is done: it says good-bye."""
        self._stop()
        found, self._found = self._found, {}
        for descriptor in found.values():
            os.close(descriptor)
        for each in (self._connection, self._listening):
            if each is not None:
                each.close()

    def _stop(self) -> None:
        if self._wake >= 0:
            os.close(self._wake)
            self._wake = -1
            self._thread.join()
            os.close(self._woken)

    def _serve(self) -> None:
        poll = select.poll()
        poll.register(self._woken, 0)  # hang-up: take or close was called
        poll.register(self._listening, select.POLLIN)
        while True:
            ready = {fd for fd, _ in poll.poll()}
            speaks = self._listening if self._connection is None else self._connection
            if self._woken in ready and speaks.fileno() not in ready:
                return  # all that CRIU had said was heard
            if self._connection is None:
                self._connection, _ = self._listening.accept()
                self._connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _SAID)
                poll.unregister(self._listening)
                poll.register(self._connection, select.POLLIN)
                continue
            for descriptor in ready & set(self._found.values()):
                for event, _, address, _ in uffd.messages(descriptor):
                    if event == uffd.PAGEFAULT:
                        uffd.zero(descriptor, address & -PAGE_BYTES)
            if self._connection.fileno() in ready:
                try:
                    more = self._hear(self._connection, poll)
                except BlockingIOError:
                    more = False  # it hangs; who waits for it has a deadline
                if not more:
                    poll.unregister(self._connection)

    def _hear(self, connection: socket.socket, poll: select.poll) -> bool:
        """One process: its number, then, with one byte, its descriptor."""
        said = connection.recv(_PID_BYTES, socket.MSG_WAITALL)
        if len(said) < _PID_BYTES:
            return False
        pid = int.from_bytes(said, sys.byteorder, signed=True)
        if pid > 0:
            _, descriptors, _, _ = socket.recv_fds(connection, 1, 1)
            for descriptor in descriptors:
                os.set_blocking(descriptor, False)
                self._found[pid] = descriptor
                poll.register(descriptor, select.POLLIN)
        return True


def refuse_unfilled(places: journal.Places, tree: Sequence[proc.Identity]) -> None:
    """Refuse to capture what is not complete: also children that were forked meanwhile.

    Raises:
        errors.TargetBusy: memory of one of the processes is still on the way.
    """
    if not any(each.action == "fill" for each in places.entries()):
        return
    for who in tree:
        if treeend.missing(str(who.pid)):
            raise errors.TargetBusy(
                f"the memory of process {who.pid} still comes from the image it was restored from",
                hint="wait until the restore says that it is complete",
                pid=who.pid,
            )


def release(descriptor: int, process: pour.ProcessMemory) -> None:
    """Have the kernel ask for none of this process's pages, so that they can be written."""
    for area in process.areas:
        # Refused where CRIU has not registered it.
        uffd.call(descriptor, uffd.UFFDIO_UNREGISTER, area.start, area.end - area.start)


def ask_for(descriptor: int, deferred: Deferred, pid: int) -> list[PageRun]:
    """Have the kernel ask for what is deferred of the process behind ``pid``; return the runs of it
    for which it will not, since something is there.

    Raises:
        LateRefused: the kernel refuses.
    """
    there = []
    pages = Pagemap(pid)
    try:
        for start, end in deferred.areas:
            length = end - start
            problem, _ = uffd.call(
                descriptor, uffd.UFFDIO_REGISTER, start, length, uffd.MODE_MISSING, 0
            )
            if problem:
                raise LateRefused(
                    f"memory at {start:#x} cannot be filled later: {os.strerror(problem)}",
                    hint="restore it with --eager",
                )
            # Not before: the kernel may make a huge page of what is there and what is missing, but
            # not any more once it is to ask.
            there += pages.occupied(start, end).tolist()
    finally:
        pages.close()
    return [run for start, end in there for run in deferred.within(start, end)]
