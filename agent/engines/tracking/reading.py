"""Reading pages of a process into drafts.

Memory that is touched for the first time takes several times as long to read into, so who reads
again and again, or while a process stands still, brings ``room``.

Promises: what is held at once is one buffer of ``ROOM_BYTES``.
Does not: know which pages.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np

from agent import errors
from agent.engines.tracking.pace import Pace
from agent.host import pagemap, proc
from agent.host.foreign import ForeignMemory
from agent.host.pagemap import Ranges
from agent.model.streams import PAGE_BYTES, AddressSpace, PageRun

# As in the page server: few system calls a byte, and it stays in a core's cache.
ROOM_BYTES = 2 << 20


class Drafts(Protocol):
    """What takes pages: the part of a ``MemberSink`` that is needed."""

    def draft(self, space: AddressSpace, runs: Sequence[PageRun], data: memoryview) -> None:
        """As ``MemberSink.draft``."""


def room() -> memoryview:
    """What can be read into again and again; it is touched."""
    return memoryview(bytearray(b"\xff") * ROOM_BYTES)


def whole(
    who: proc.Identity,
    space: AddressSpace,
    ranges: Ranges,
    sink: Drafts,
    into: memoryview | None = None,
) -> int:
    """Draft these pages of a process that stands still, by ``into``, a ``room``; say how many bytes
    they are.

    Raises:
        errors.ShortStopFailed: some cannot be read.
        errors.NotFound: the process has ended.
    """
    with opened(who) as memory:
        done = draft(sink, space, memory, ranges, standing=True, into=into)
    size_bytes = pagemap.size_bytes(ranges)
    if pagemap.size_bytes(done) != size_bytes:
        raise errors.ShortStopFailed(f"memory of process {who.pid} cannot be read", pid=who.pid)
    return size_bytes


@contextlib.contextmanager
def opened(who: proc.Identity) -> Iterator[ForeignMemory]:
    """The memory of a process; raises ``errors.NotFound``."""
    memory = ForeignMemory(who)
    try:
        yield memory
    finally:
        memory.close()


def draft(
    sink: Drafts,
    space: AddressSpace,
    memory: ForeignMemory,
    ranges: Ranges,
    pace: Pace | None = None,
    *,
    standing: bool = False,
    into: memoryview | None = None,
) -> Ranges:
    """Draft these pages, by ``into``, a ``room``; return those that could be read."""
    done = [pagemap.none()]
    for rows in _batches(ranges):
        batch = rows.tolist()
        size_bytes = int(rows[:, 1].sum())
        if pace is not None:
            pace.wait(size_bytes)
        data = memoryview(bytearray(size_bytes)) if into is None else into[:size_bytes]
        counts = memory.read_standing(rows, data) if standing else memory.read(batch, data)
        runs = []
        whole = sum(counts) == size_bytes
        for (address, length), count in zip(batch, counts, strict=True):
            if count == length:
                runs.append(PageRun(address, length // PAGE_BYTES, 0))
        if not whole:
            data = _closed_up(batch, counts, data)
        if runs:
            sink.draft(space, runs, data)
            there = [(run.address, run.address + run.pages * PAGE_BYTES) for run in runs]
            done.append(np.array(there, dtype=np.int64))
    return np.concatenate(done)


def _closed_up(
    batch: Sequence[tuple[int, int]], counts: Sequence[int], data: memoryview
) -> memoryview:
    """The data of the pieces that were read whole, one after the other; it may be written to."""
    kept, at = [], 0
    for (_, length), count in zip(batch, counts, strict=True):
        if count == length:
            kept.append(data[at : at + length])
        at += length
    return memoryview(bytearray().join(kept))


def _batches(ranges: Ranges) -> Iterator[Ranges]:
    """Rows of ``address, bytes`` of at most a buffer together."""
    ends = np.cumsum(ranges[:, 1] - ranges[:, 0])
    starts = ends - (ranges[:, 1] - ranges[:, 0])
    for low in range(0, pagemap.size_bytes(ranges), ROOM_BYTES):
        high = low + ROOM_BYTES
        first = int(np.searchsorted(ends, low, side="right"))
        last = int(np.searchsorted(starts, high, side="left"))
        rows = ranges[first:last].copy()
        rows[0, 0] += low - starts[first]
        rows[-1, 1] -= max(0, int(ends[last - 1]) - high)
        rows[:, 1] -= rows[:, 0]
        yield rows
