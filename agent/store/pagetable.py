"""Where the pages of one address space or stream lie: runs of pages and their places in packs.

A table is a number of runs, 4 bytes, and one zstd frame with five columns, little-endian: *gap*
(8 bytes, pages between the end of the previous run and this one's start), *pages* (4), *flags*
(4), *pack* (4, 0 for zero pages, else 1 + the number in the member's list of packs), *ordinal* (4,
the first page's number in its pack less the number after the last page of the previous run that
is not zero pages, modulo 2^32; 0 for zero pages). What stays together costs almost nothing so.

Promises: a table that ``decode`` returns is ascending without overlap, within 64-bit addresses,
and points only into the packs it was given.
Does not: read packs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from numpy import typing as npt

from agent import errors
from agent.model.streams import PAGE_BYTES
from agent.store import codec

_COLUMNS = (("gap", 8), ("pages", 4), ("flags", 4), ("pack", 4), ("ordinal", 4))
_RUN_BYTES = sum(width for _, width in _COLUMNS)
MAX_RUNS = 1 << 24  # 64 GiB of memory where every second page differs from its neighbour's place
MAX_PAGE = 1 << 52  # of 4 KiB in 64-bit addresses
MAX_FLAGS = (1 << 32) - 1

Column = npt.NDArray[np.int64]


@dataclasses.dataclass(frozen=True)
class Table:
    """Runs as columns of equal length. ``start`` counts pages; ``pack`` is -1 for zero pages."""

    start: Column
    pages: Column
    flags: Column
    pack: Column
    ordinal: Column

    def __len__(self) -> int:
        return len(self.start)


def encode(table: Table) -> bytes:
    """Return the table's bytes.

    Raises:
        errors.InvalidInput: more runs than the format takes.
    """
    if len(table) > MAX_RUNS:
        raise errors.InvalidInput(
            f"an address space is cut into {len(table)} runs; the format takes {MAX_RUNS}"
        )
    stored = table.pack >= 0
    gap = table.start.copy()
    gap[1:] -= table.start[:-1] + table.pages[:-1]
    ordinal = np.zeros(len(table), dtype=np.int64)
    first = table.ordinal[stored]
    expected = np.zeros(len(first), dtype=np.int64)
    expected[1:] = first[:-1] + table.pages[stored][:-1]
    ordinal[stored] = (first - expected) & 0xFFFFFFFF
    raw = bytearray(len(table) * _RUN_BYTES)
    at = 0
    values = (gap, table.pages, table.flags, table.pack + 1, ordinal)
    for (_, width), column in zip(_COLUMNS, values, strict=True):
        np.frombuffer(raw, f"<u{width}", len(table), at)[:] = column
        at += len(table) * width
    return len(table).to_bytes(4, "little") + codec.compress(raw)


def decode(data: bytes | memoryview, pack_pages: Sequence[int]) -> Table:
    """Return the table; ``pack_pages`` are the numbers of pages of the member's packs.

    Raises:
        errors.Corrupt: it is not a table of such packs.
    """
    runs = int.from_bytes(data[:4], "little")
    if len(data) < 4 or runs > MAX_RUNS:
        raise errors.Corrupt("a page table states an impossible number of runs")
    raw = codec.decompress(data[4:], runs * _RUN_BYTES)
    columns: list[Column] = []
    offset = 0
    for _, width in _COLUMNS:
        column = np.frombuffer(raw, dtype=f"<u{width}", count=runs, offset=offset)
        offset += runs * width
        if width == 8 and runs and int(column.max()) > MAX_PAGE:
            raise errors.Corrupt("a page table leaves the address space")
        columns.append(column.astype(np.int64))
    gap, pages, flags, pack, delta = columns
    _check(gap, pages, pack, delta, len(pack_pages))
    stored = pack > 0
    end = np.cumsum(gap + pages)
    ordinal = np.zeros(runs, dtype=np.int64)
    step = delta[stored]
    step[1:] += pages[stored][:-1]
    ordinal[stored] = np.cumsum(step) & 0xFFFFFFFF
    sizes = np.asarray(pack_pages, dtype=np.int64)
    if (ordinal[stored] + pages[stored] > sizes[pack[stored] - 1]).any():
        raise errors.Corrupt("a page table points beyond the end of a pack")
    return Table(end - pages, pages, flags, pack - 1, ordinal)


def decode_stream(data: bytes, pack_pages: Sequence[int], size_bytes: int) -> Table:
    """Return the table of a stream of bytes: without holes, and just long enough; raises as
    ``decode``.
    """
    table = decode(data, pack_pages)
    ends = np.concatenate(([0], table.start + table.pages))
    if (table.start != ends[:-1]).any() or int(ends[-1]) != -(-size_bytes // PAGE_BYTES):
        raise errors.Corrupt("a page table of a file has holes or another length than the file")
    return table


def _check(gap: Column, pages: Column, pack: Column, delta: Column, packs: int) -> None:
    if not len(gap):
        return
    # In floating point, since the exact sum of hostile numbers may overflow.
    if float(gap.sum(dtype=np.float64)) + float(pages.sum(dtype=np.float64)) > MAX_PAGE:
        raise errors.Corrupt("a page table leaves the address space")
    if int(pages.min()) < 1:
        raise errors.Corrupt("a page table has a run without pages")
    if int(pack.max()) > packs:
        raise errors.Corrupt("a page table points to a pack that its manifest does not name")
    if delta[pack == 0].any():
        raise errors.Corrupt("a page table places zero pages in a pack")


def clip(table: Table, start: Column, pages: Column) -> Table:
    """Return the parts of ``table`` that lie in the given runs, ascending without overlap."""
    end = start + pages
    own_end = table.start + table.pages
    # Each wanted run meets the table's runs from ``first`` up to, not including, ``last``.
    first = np.searchsorted(own_end, start, side="right")
    last = np.searchsorted(table.start, end, side="left")
    count = np.maximum(last - first, 0)
    wanted = np.repeat(np.arange(len(start)), count)
    within = np.arange(int(count.sum())) - np.repeat(np.cumsum(count) - count, count)
    row = first[wanted] + within
    clipped = np.maximum(table.start[row], start[wanted])
    size = np.minimum(own_end[row], end[wanted]) - clipped
    moved = np.where(table.pack[row] < 0, 0, clipped - table.start[row])
    return Table(clipped, size, table.flags[row], table.pack[row], table.ordinal[row] + moved)


def covered(first: Column, count: Column, total: int) -> npt.NDArray[np.bool_]:
    """Return which of ``total`` positions lie in one of the runs."""
    change = np.zeros(total + 1, dtype=np.int32)
    np.add.at(change, first, 1)
    np.add.at(change, first + count, -1)
    return np.cumsum(change[:-1]) > 0


class TableBuilder:
    """Collects pages in ascending order as runs. About 40 bytes a run."""

    def __init__(self) -> None:
        self._parts: list[npt.NDArray[np.int64]] = []
        self.end = 0

    def add(self, page: Column, flags: Column, row: Column) -> None:
        """Append pages: the number of each, its flags, and its place, -1 for a zero page."""
        if not len(page):
            return
        heads = _heads(page, np.ones(len(page), dtype=np.int64), flags, row)
        part = np.stack([page[heads], np.diff(heads, append=len(page)), flags[heads], row[heads]])
        self._parts.append(part)
        self.end = int(page[-1]) + 1

    def runs(self) -> npt.NDArray[np.int64]:
        """Return start, pages, flags and row of all runs, shape (4, runs), neighbours joined."""
        if not self._parts:
            return np.empty((4, 0), dtype=np.int64)
        joined = np.concatenate(self._parts, axis=1)
        heads = _heads(joined[0], joined[1], joined[2], joined[3])
        if len(heads) < joined.shape[1]:
            pages = np.add.reduceat(joined[1], heads)
            joined = joined[:, heads]
            joined[1] = pages
        self._parts = [joined]
        return joined


def _heads(start: Column, pages: Column, flags: Column, row: Column) -> Column:
    """Return where runs begin that do not continue the one before."""
    zero = row < 0
    follows = np.where(zero[1:], zero[:-1], ~zero[:-1] & (row[1:] == row[:-1] + pages[:-1]))
    follows &= (start[1:] == start[:-1] + pages[:-1]) & (flags[1:] == flags[:-1])
    return np.concatenate(([0], np.flatnonzero(~follows) + 1))
