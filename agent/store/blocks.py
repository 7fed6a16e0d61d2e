"""Reading blocks: each once, ahead of time, in parallel, verified.

Promises: a block that is returned matched its digest before it was decompressed; memory is
bounded (``Limits``).
Does not: know address spaces or files.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator
from concurrent import futures
from typing import ParamSpec, TypeVar

import numpy as np
from numpy import typing as npt

from agent import errors
from agent.model.streams import PAGE_BYTES
from agent.store import catalog, codec, pack, pagetable, threads
from agent.store.digest import digest
from agent.store.manifest import PackRef
from agent.volumes.base import Volume

# What one reader holds where it is alone: 24 MiB of blocks that pages keep coming back to, those
# with what changed last; a window of pages, which is given out while the blocks of the next one are
# being read, so that two of them fit into what is kept; and room to put a window together in.
_KEPT_BLOCKS, _WINDOW_BLOCKS, _WINDOW_PAGES = 24, 12, 2048
_LEAST_PAGES = 256
# Runs that are cut into windows at once, to bound temporary arrays.
_RUNS_AT_ONCE = 1 << 14
# Among neighbours with a cut of this many pages, copying costs more than small pieces do.
_WORTH_VIEWING = 128
_ZERO = -1

_P = ParamSpec("_P")
_T = TypeVar("_T")
_Key = tuple[int, int]
_Column = npt.NDArray[np.int64]


@dataclasses.dataclass(frozen=True, slots=True)
class Piece:
    """Consecutive pages; ``pages`` is None where they are zero, and valid until the next step."""

    page: int
    count: int
    pages: memoryview | None


@dataclasses.dataclass(frozen=True, slots=True)
class _Cuts:
    """Runs cut where blocks end, as columns: the first page's number, flags, how many, pack and
    block (``_ZERO`` for zero pages), and which page of the block comes first.
    """

    page: _Column
    flags: _Column
    count: _Column
    pack: _Column
    block: _Column
    first: _Column

    def part(self, start: int, stop: int) -> _Cuts:
        at = slice(start, stop)
        columns = (self.page, self.flags, self.count, self.pack, self.block, self.first)
        return _Cuts(*(column[at] for column in columns))


@dataclasses.dataclass(frozen=True, slots=True)
class _Window:
    """Cuts whose blocks are held or being read."""

    cuts: _Cuts
    blocks: dict[_Key, futures.Future[bytes]]


@dataclasses.dataclass(frozen=True, slots=True)
class Limits:
    """How many blocks a reader keeps, two windows' at least; how many blocks and pages a window has
    at most.
    """

    kept_blocks: int
    window_blocks: int
    window_pages: int

    @classmethod
    def among(cls, parties: int) -> Limits:
        """Those of the readers of each of so many members that are read at the same time."""
        return cls(
            max(2, _KEPT_BLOCKS // parties),
            max(1, _WINDOW_BLOCKS // parties),
            max(_LEAST_PAGES, _WINDOW_PAGES // parties),
        )


class BlockTable:
    """What a reader needs of one pack's index: everything but the tags."""

    def __init__(self, ref: PackRef, index: pack.PackIndex) -> None:
        self.name = ref.name
        self.block_pages = index.block_pages
        self.first_pages = index.first_pages
        self.offsets = index.offsets
        self.stored_bytes = index.stored_bytes
        # Where each block begins, and where the last one ends, for quick looking up.
        self.starts: list[int] = [*self.first_pages.tolist(), index.pages]
        self.codecs = index.codecs.copy()
        self._digests = index.digests

    def read(self, volume: Volume, block: int) -> bytes:
        """Return a block's stored bytes, verified.

        Raises:
            errors.Corrupt | errors.Missing: it is damaged or not there.
        """
        length = int(self.stored_bytes[block])
        try:
            stored = volume.read(self.name, int(self.offsets[block]), length)
        except errors.BlobNotFound as exc:
            raise errors.Missing(f"{self.name} is not there", part=self.name) from exc
        expected = self._digests[block * 32 : block * 32 + 32]
        if len(stored) != length or digest(stored) != expected:
            raise errors.Corrupt(
                f"block {block} of {self.name} does not match its digest",
                part=self.name,
                block=block,
            )
        return stored

    def load(self, volume: Volume, block: int) -> bytes:
        """Return a block's pages; raises as ``read``."""
        stored = self.read(volume, block)
        size_bytes = int(self.block_pages[block]) * PAGE_BYTES
        return codec.restore(int(self.codecs[block]), stored, size_bytes)


class BlockSource:
    """The blocks of the packs that one member names. Not for several threads at once. Without
    ``ahead``, each is read when it is wanted, by nobody else. ``tables`` are those of the packs
    whose indexes were read: several may share them.
    """

    def __init__(
        self,
        volume: Volume,
        refs: tuple[PackRef, ...],
        *,
        ahead: bool = True,
        limits: Limits | None = None,
        tables: dict[int, BlockTable] | None = None,
    ) -> None:
        threads.switch_often()
        self._volume = volume
        self._refs = refs
        self._ahead = ahead
        self._limits = limits or Limits.among(1)
        self.tables: dict[int, BlockTable] = {} if tables is None else tables
        self._cache: collections.OrderedDict[_Key, futures.Future[bytes]] = (
            collections.OrderedDict()
        )

    def pieces(self, table: pagetable.Table) -> Iterator[Piece]:
        """Yield the pages of a table in order. Neighbours of equal flags that lie in different
        places are put together, so that pages changed here and there do not make many pieces.

        Raises:
            errors.Corrupt | errors.Missing: a block cannot be had whole.
        """
        pool = (
            futures.ThreadPoolExecutor(threads.workers(), "ckpt-read") if self._ahead else _AtOnce()
        )
        scratch = np.empty((0, PAGE_BYTES), dtype=np.uint8)
        try:
            windows = (self._request(pool, cuts) for cuts in self._windows(table))
            window = next(windows, None)
            while window is not None:
                # Is being read while this one is used.
                following = next(windows, None) if self._ahead else None
                if len(window.cuts.page) > 1 and not len(scratch):
                    scratch = np.empty((self._limits.window_pages, PAGE_BYTES), dtype=np.uint8)
                yield from _emit(window, scratch)
                window = following if self._ahead else next(windows, None)
        finally:
            pool.shutdown(cancel_futures=True)

    def find(self, table: pagetable.Table) -> None:
        """See to it that every pack that the table needs is there in its full length, and its index
        verified; raises as ``pieces``.
        """
        for number in _distinct(table.pack[table.pack >= 0]):
            self._table(int(number))

    def verify(self, tables: Iterable[pagetable.Table]) -> int:
        """Read every block that one of the tables needs, keep nothing, and return how many bytes
        that were; raises as ``pieces``.
        """
        needed = [np.zeros(len(self._table(n).block_pages), bool) for n in range(len(self._refs))]
        for table in tables:
            for number in _distinct(table.pack[table.pack >= 0]):
                mine = table.pack == number
                first = table.ordinal[mine]
                last = first + table.pages[mine] - 1
                starts = self._table(number).first_pages
                from_block = np.searchsorted(starts, first, side="right") - 1
                to_block = np.searchsorted(starts, last, side="right") - 1
                needed[number] |= pagetable.covered(
                    from_block, to_block - from_block + 1, len(starts)
                )
        jobs = [(n, int(b)) for n, mask in enumerate(needed) for b in np.flatnonzero(mask)]
        # Twice as many: a digest takes no time against what a disk does (measured, 0.6 GB that
        # were not cached: 1.1 s with two reads at a time, 0.5 s with four).
        pool = futures.ThreadPoolExecutor(2 * threads.workers(), "ckpt-check")
        try:
            return sum(pool.map(self._verify_block, jobs))
        finally:
            pool.shutdown(cancel_futures=True)

    def _verify_block(self, key: _Key) -> int:
        number, block = key
        return len(self.tables[number].read(self._volume, block))

    def _table(self, number: int) -> BlockTable:
        if number not in self.tables:
            index = catalog.read_pack_index(self._volume, self._refs[number])
            self.tables[number] = BlockTable(self._refs[number], index)
        return self.tables[number]

    def _windows(self, table: pagetable.Table) -> Iterator[_Cuts]:
        """Cut a table into windows of few pages and few blocks."""
        for start in range(0, len(table), _RUNS_AT_ONCE):
            cuts = self._cut(table, slice(start, start + _RUNS_AT_ONCE))
            cost = np.where(cuts.pack == _ZERO, 0, cuts.count)
            ends = np.cumsum(cost)
            at, total = 0, len(cuts.page)
            while at < total:
                spent = int(ends[at - 1]) if at else 0
                stop = int(np.searchsorted(ends, spent + self._limits.window_pages, side="right"))
                stop = max(at + 1, min(stop, at + self._limits.window_pages))
                keys = cuts.pack[at:stop] << 32 | cuts.block[at:stop]
                _, first_use = np.unique(keys, return_index=True)
                if len(first_use) > self._limits.window_blocks:
                    stop = at + int(np.sort(first_use)[self._limits.window_blocks])
                yield cuts.part(at, stop)
                at = stop

    def _cut(self, table: pagetable.Table, runs: slice) -> _Cuts:
        """Cut some runs where blocks end."""
        pack, ordinal, pages = table.pack[runs], table.ordinal[runs], table.pages[runs]
        from_block = np.zeros(len(pack), dtype=np.int64)
        to_block = np.zeros(len(pack), dtype=np.int64)
        numbers = [int(number) for number in _distinct(pack) if number != _ZERO]
        for number in numbers:
            mine = pack == number
            starts = self._table(number).first_pages
            last = ordinal[mine] + pages[mine] - 1
            from_block[mine] = np.searchsorted(starts, ordinal[mine], side="right") - 1
            to_block[mine] = np.searchsorted(starts, last, side="right") - 1
        parts = to_block - from_block + 1
        run = np.repeat(np.arange(len(pack)), parts)
        block = from_block[run] + np.arange(len(run)) - np.repeat(np.cumsum(parts) - parts, parts)
        cut_pack = pack[run]
        block_start, block_end = ordinal[run], (ordinal + pages)[run]
        for number in numbers:
            mine = cut_pack == number
            found = self._table(number)
            block_start[mine] = found.first_pages[block[mine]]
            block_end[mine] = block_start[mine] + found.block_pages[block[mine]]
        start = np.maximum(ordinal[run], block_start)
        count = np.minimum((ordinal + pages)[run], block_end) - start
        page = table.start[runs][run] + start - ordinal[run]
        block[cut_pack == _ZERO] = _ZERO
        flags = table.flags[runs][run]
        return _Cuts(page, flags, count, cut_pack, block, start - block_start)

    def _request(self, pool: futures.Executor, cuts: _Cuts) -> _Window:
        wanted = dict.fromkeys(zip(cuts.pack.tolist(), cuts.block.tolist(), strict=True))
        wanted.pop((_ZERO, _ZERO), None)
        return _Window(cuts, {key: self._block(pool, key) for key in wanted})

    def _block(self, pool: futures.Executor, key: _Key) -> futures.Future[bytes]:
        block = self._cache.get(key)
        # What could not be read may be there the next time.
        if block is None or block.cancelled() or (block.done() and block.exception()):
            number, at = key
            block = pool.submit(self.tables[number].load, self._volume, at)
            self._cache[key] = block
            if len(self._cache) > self._limits.kept_blocks:
                self._cache.popitem(last=False)
        self._cache.move_to_end(key)
        return block


class _AtOnce(futures.Executor):
    """Does what is submitted before it returns."""

    def submit(
        self, fn: Callable[_P, _T], /, *args: _P.args, **kwargs: _P.kwargs
    ) -> futures.Future[_T]:
        future: futures.Future[_T] = futures.Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except Exception as exc:  # noqa: BLE001 - carried to whoever asks for the result
            future.set_exception(exc)
        return future


def _emit(window: _Window, scratch: npt.NDArray[np.uint8]) -> Iterator[Piece]:
    """Yield a window's pages, neighbours together."""
    cuts = window.cuts
    zero = cuts.pack == _ZERO
    joins = (cuts.page[1:] == (cuts.page + cuts.count)[:-1]) & ~zero[1:] & ~zero[:-1]
    joins &= cuts.flags[1:] == cuts.flags[:-1]
    heads = np.concatenate(([0], np.flatnonzero(~joins) + 1, [len(zero)])).tolist()
    for start, stop in itertools.pairwise(heads):
        page, count = int(cuts.page[start]), int(cuts.count[start:stop].sum())
        if zero[start]:
            yield Piece(page, count, None)
        elif stop == start + 1 or int(cuts.count[start:stop].max()) >= _WORTH_VIEWING:
            for at in range(start, stop):
                key = int(cuts.pack[at]), int(cuts.block[at])
                first, pages = int(cuts.first[at]) * PAGE_BYTES, int(cuts.count[at])
                content = memoryview(window.blocks[key].result())
                yield Piece(int(cuts.page[at]), pages, content[first : first + pages * PAGE_BYTES])
        else:
            _gather(cuts.part(start, stop), window, scratch)
            yield Piece(page, count, scratch[:count].reshape(-1).data)


def _gather(cuts: _Cuts, window: _Window, out: npt.NDArray[np.uint8]) -> None:
    """Copy pages to where they belong, one block after the other."""
    ends = np.cumsum(cuts.count)
    within = np.arange(int(ends[-1])) - np.repeat(ends - cuts.count, cuts.count)
    source = np.repeat(cuts.first, cuts.count) + within
    keys = np.repeat(cuts.pack << 32 | cuts.block, cuts.count)
    for key in _distinct(keys).tolist():
        mine = np.flatnonzero(keys == key)
        content = window.blocks[key >> 32, key & 0xFFFFFFFF].result()
        block = np.frombuffer(content, dtype=np.uint8).reshape(-1, PAGE_BYTES)
        out[mine] = block[source[mine]]


def _distinct(values: _Column) -> _Column:
    # Asked for nothing but the values, it would load numpy.ma: a megabyte that stays.
    return np.unique(values, return_index=True)[0]
