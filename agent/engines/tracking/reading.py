"""Reading pages of a process into drafts.

Promises: what is held at once is one buffer of ``_BUFFER_BYTES``.
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
_BUFFER_BYTES = 2 << 20


class Drafts(Protocol):
    """What takes pages: the part of a ``MemberSink`` that is needed."""

    def draft(self, space: AddressSpace, runs: Sequence[PageRun], data: memoryview) -> None:
        """As ``MemberSink.draft``."""


def whole(who: proc.Identity, space: AddressSpace, ranges: Ranges, sink: Drafts) -> int:
    """Draft these pages of a process that stands still; say how many bytes they are.

    Raises:
        errors.ShortStopFailed: some cannot be read.
        errors.NotFound: the process has ended.
    """
    with opened(who) as memory:
        done = draft(sink, space, memory, ranges, standing=True)
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
) -> Ranges:
    """Draft these pages; return those that could be read."""
    done = [pagemap.none()]
    for batch in _batches(ranges):
        size_bytes = sum(length for _, length in batch)
        if pace is not None:
            pace.wait(size_bytes)
        data = memoryview(bytearray(size_bytes))
        counts = (memory.read_standing if standing else memory.read)(batch, data)
        runs = []
        whole = sum(counts) == size_bytes
        for (address, length), count in zip(batch, counts, strict=True):
            if count == length:
                runs.append(PageRun(address, length // PAGE_BYTES, 0))
        if not whole:
            data = _closed_up(batch, counts, data)
        if runs:
            sink.draft(space, runs, data)
            rows = [(run.address, run.address + run.pages * PAGE_BYTES) for run in runs]
            done.append(np.array(rows, dtype=np.int64))
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


def _batches(ranges: Ranges) -> Iterator[list[tuple[int, int]]]:
    """Pieces of ``address, bytes`` of at most a buffer together."""
    batch: list[tuple[int, int]] = []
    room = _BUFFER_BYTES
    for start, end in ranges.tolist():
        at = start
        while at < end:
            length = min(end - at, room)
            batch.append((at, length))
            at += length
            room -= length
            if not room:
                yield batch
                batch, room = [], _BUFFER_BYTES
    if batch:
        yield batch
