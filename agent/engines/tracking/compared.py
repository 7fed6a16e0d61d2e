"""Copying ahead what may be written past any note of the kernel's: what a space holds is read again
at the cut, and of that, pieces that are not what was drafted are drafted anew.

Reading at the speed of memory is what a stop then takes, whatever was written: a piece that differs
is drafted whole, since fingerprints of its pages would cost several times as much a byte. The
store keeps what it has of it once.

Promises: at the cut, every page that exists is drafted with the content that it has then. What is
kept are 16 bytes for each ``PIECE_BYTES`` in which there is a page.
Does not: know where the bytes come from.
"""

from __future__ import annotations

import collections
import contextlib
import queue
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy import typing as npt

from agent import errors
from agent.engines.tracking.pace import Pace
from agent.host import clock, pagemap
from agent.host.fingerprints import PIECE_BYTES, Fingerprinter, Fingerprints
from agent.host.pagemap import Ranges
from agent.model.streams import PAGE_BYTES, AddressSpace, MemberSink, PageRun

# As in the page server: few system calls a byte, and it stays in a core's cache.
_STEP_BYTES = 2 << 20
_STEP_PIECES = _STEP_BYTES // PIECE_BYTES
# Two read quicker than one; more only take from each other.
_READERS = 2

# Fills a buffer with what the space holds from an address on, where there are the pages that are
# named, and says which of these could be read, by the same object if all; safe from several
# threads. The rest of the buffer may be anything, best the same each time.
Read = Callable[[memoryview, int, Ranges], Ranges]


class Compared:
    """The copy of one space."""

    def __init__(self, space: AddressSpace, fingerprinter: Fingerprinter) -> None:
        self.space = space
        self._fingerprinter = fingerprinter
        # Of each step, when it was read last.
        self._tags: dict[int, Fingerprints] = {}
        # Pages that could be read then, and are drafted.
        self._have = pagemap.none()
        # Fresh memory would cost as much time as reading into it.
        self._buffers: queue.SimpleQueue[memoryview] = queue.SimpleQueue()
        # What the last look found changed.
        self.changed_bytes = 0
        # Steps all of whose pages exist, and were had when this look began.
        self._plain: frozenset[int] = frozenset()

    def recall(self, sink: MemberSink, epoch: str) -> None:
        """Begin another copy, in ``sink``, with what it takes over of ``epoch``."""
        rows = [
            (run.address, run.address + run.pages * PAGE_BYTES)
            for run in sink.recall(epoch, self.space)
        ]
        there = np.array(rows, dtype=np.int64).reshape(-1, 2)
        self._have = pagemap.clip(self._have, there)

    def round(
        self,
        existing: Ranges,
        read: Read,
        sink: MemberSink,
        deadline: clock.Deadline,
        pace: Pace | None,
    ) -> int:
        """Draft of the ``existing`` pages what is not as it was drafted; say how many bytes."""
        had, self._have = self._have, pagemap.none()  # until it went well
        total, found = 0, [pagemap.none()]
        steps = self._steps(existing, had)
        with _buffers(self._buffers):
            for step in steps:
                deadline.check("copying memory ahead")
                if pace is not None:
                    pace.wait(_STEP_BYTES)
                there, size_bytes = self._step(step, existing, had, read, sink)
                found.append(there)
                total += size_bytes
        self._have = pagemap.union(*found)
        self.changed_bytes = total
        return total

    def finish(self, existing: Ranges, read: Read, sink: MemberSink) -> int:
        """As ``round``, at the cut. ``sink`` must be safe from several threads.

        Raises:
            errors.ShortStopFailed: something cannot be read.
        """
        had, self._have = self._have, pagemap.none()
        steps = iter(self._steps(existing, had))

        def work() -> tuple[int, int]:
            read_bytes = drafted_bytes = 0
            try:
                for step in steps:
                    there, size_bytes = self._step(step, existing, had, read, sink)
                    read_bytes += pagemap.size_bytes(there)
                    drafted_bytes += size_bytes
            finally:
                collections.deque(steps, 0)  # if this one failed, the others need not go on
            return read_bytes, drafted_bytes

        with _buffers(self._buffers), ThreadPoolExecutor(_READERS, "compare") as pool:
            done = [each.result() for each in [pool.submit(work) for _ in range(_READERS)]]
        if sum(read_bytes for read_bytes, _ in done) != pagemap.size_bytes(existing):
            raise errors.ShortStopFailed(
                f"memory of {self.space.kind} {self.space.id} cannot be read"
            )
        self._have = existing
        return sum(drafted_bytes for _, drafted_bytes in done)

    def _steps(self, existing: Ranges, had: Ranges) -> list[int]:
        """Which steps hold a page; of the others nothing is known any more."""
        found: set[int] = set()
        for low, high in existing.tolist():
            found.update(range(low // _STEP_BYTES, -(-high // _STEP_BYTES)))
        for step in self._tags.keys() - found:
            del self._tags[step]
        for step in found - self._tags.keys():
            self._tags[step] = np.zeros((_STEP_PIECES, 2), dtype=np.uint64)
        steps = sorted(found)
        self._plain = _inside(steps, existing) & _inside(steps, had)
        return steps

    def _step(
        self, step: int, existing: Ranges, had: Ranges, read: Read, sink: MemberSink
    ) -> tuple[Ranges, int]:
        """Read one step and draft what differs; which pages are had now, and how many bytes were
        drafted.
        """
        start = step * _STEP_BYTES
        whole = np.array([[start, start + _STEP_BYTES]], dtype=np.int64)
        wanted = whole if step in self._plain else pagemap.clip(whole, existing)
        first = int(wanted[0, 0] - start) // PIECE_BYTES
        pieces = slice(first, -(-int(wanted[-1, 1] - start) // PIECE_BYTES))
        low = start + first * PIECE_BYTES
        buffer = self._buffers.get()
        try:
            data = buffer[: (pieces.stop - first) * PIECE_BYTES]
            there = read(data, low, wanted)
            same = self._same(step, pieces, data)
            # Nearly always there is no more to do: the rest takes longer than reading does.
            if there is whole and same.all():
                return there, 0
            if there is whole:
                missing = _ranges(~same, low)
            else:
                had_same = pagemap.clip(pagemap.clip(whole, had), _ranges(same, low))
                missing = pagemap.without(there, had_same)
            size_bytes = _moved_up(data, low, missing)
            if size_bytes:
                rows = missing.tolist()
                runs = [PageRun(at, (end - at) // PAGE_BYTES, 0) for at, end in rows]
                sink.draft(self.space, runs, data[:size_bytes])
            return there, size_bytes
        finally:
            self._buffers.put(buffer)

    def _same(self, step: int, pieces: slice, data: memoryview) -> npt.NDArray[np.bool_]:
        """Which pieces are what they were when this was asked last."""
        known = self._tags[step][pieces]
        tags = self._fingerprinter.of(data)
        same: npt.NDArray[np.bool_] = (tags == known).all(axis=1)
        known[:] = tags
        return same


def piecewise(pieces: Callable[[list[tuple[int, int]], memoryview], list[int]]) -> Read:
    """Reading by what takes pieces of ``address, bytes`` and says how much of each was read."""

    def read(into: memoryview, start: int, wanted: Ranges) -> Ranges:
        if pagemap.size_bytes(wanted) != len(into):
            into[:] = bytes(len(into))
        there = []
        for low, high in wanted.tolist():
            (count,) = pieces([(low, high - low)], into[low - start : high - start])
            there.append((low, low + count // PAGE_BYTES * PAGE_BYTES))
        rows = np.array(there, dtype=np.int64)
        if np.array_equal(rows, wanted):
            return wanted
        return rows[rows[:, 1] > rows[:, 0]]

    return read


def _inside(steps: Sequence[int], ranges: Ranges) -> frozenset[int]:
    """Which steps are whole in one of the ranges."""
    if not len(ranges):
        return frozenset()
    starts = np.array(steps, dtype=np.int64) * _STEP_BYTES
    at = np.searchsorted(ranges[:, 0], starts, side="right") - 1
    inside = (at >= 0) & (ranges[at, 1] >= starts + _STEP_BYTES)
    return frozenset((starts[inside] // _STEP_BYTES).tolist())


def _ranges(pieces: npt.NDArray[np.bool_], low: int) -> Ranges:
    """Where the pieces are, the first of which is at ``low``."""
    edges = np.flatnonzero(np.diff(pieces, prepend=False, append=False))
    return low + edges.reshape(-1, 2) * PIECE_BYTES


def _moved_up(data: memoryview, low: int, ranges: Ranges) -> int:
    """Move these parts of ``data``, which is from address ``low`` on, to its beginning, one after
    the other; say how many bytes they are.
    """
    at = 0
    for start, end in ranges.tolist():
        length = end - start
        if at != start - low:
            data[at : at + length] = data[start - low : end - low]
        at += length
    return at


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
