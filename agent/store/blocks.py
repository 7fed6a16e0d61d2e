"""Reading blocks: each once, ahead of time, in parallel, verified.

Promises: a block that is returned matched its digest before it was decompressed; memory is
bounded by ``_CACHED_BLOCKS`` and ``_AHEAD_BLOCKS``.
Does not: know address spaces or files.
"""

from __future__ import annotations

import bisect
import collections
import dataclasses
from collections.abc import Iterable, Iterator
from concurrent import futures

import numpy as np

from agent import errors
from agent.model.streams import PAGE_BYTES
from agent.store import catalog, codec, pack, pagetable
from agent.store.digest import digest
from agent.store.manifest import PackRef
from agent.volumes.base import Volume

_WORKERS = 2
# 32 MiB of blocks that pages keep coming back to: those with what changed last.
_CACHED_BLOCKS = 32
_AHEAD_BLOCKS = 8
_AHEAD_PIECES = 1024

_Key = tuple[int, int]


@dataclasses.dataclass(frozen=True, slots=True)
class Piece:
    """Consecutive pages; ``pages`` is None where they are zero, and valid until the next step."""

    page: int
    count: int
    pages: memoryview | None


@dataclasses.dataclass(frozen=True, slots=True)
class _Cut:
    """A piece to be read: which block, and which page of it comes first."""

    page: int
    count: int
    key: _Key | None
    first: int


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
    """The blocks of the packs that one member names. Not for several threads at once."""

    def __init__(self, volume: Volume, refs: tuple[PackRef, ...]) -> None:
        self._volume = volume
        self._refs = refs
        self._tables: dict[int, BlockTable] = {}
        self._cache: collections.OrderedDict[_Key, futures.Future[bytes]] = (
            collections.OrderedDict()
        )

    def pieces(self, table: pagetable.Table) -> Iterator[Piece]:
        """Yield the pages of a table in order, in pieces of one block or of zero pages.

        Raises:
            errors.Corrupt | errors.Missing: a block cannot be had whole.
        """
        ahead: collections.deque[tuple[_Cut, futures.Future[bytes] | None]] = collections.deque()
        waiting: collections.Counter[_Key] = collections.Counter()
        cuts = self._cut(table)
        more = True
        pool = futures.ThreadPoolExecutor(_WORKERS, "ckpt-read")
        try:
            while more or ahead:
                while more and len(waiting) < _AHEAD_BLOCKS and len(ahead) < _AHEAD_PIECES:
                    cut = next(cuts, None)
                    if cut is None:
                        more = False
                    elif cut.key is None:
                        ahead.append((cut, None))
                    else:
                        ahead.append((cut, self._request(pool, cut.key)))
                        waiting[cut.key] += 1
                if not ahead:
                    return
                cut, block = ahead.popleft()
                if block is None or cut.key is None:
                    yield Piece(cut.page, cut.count, None)
                    continue
                waiting[cut.key] -= 1
                if not waiting[cut.key]:
                    del waiting[cut.key]
                first = cut.first * PAGE_BYTES
                pages = memoryview(block.result())[first : first + cut.count * PAGE_BYTES]
                yield Piece(cut.page, cut.count, pages)
        finally:
            pool.shutdown(cancel_futures=True)

    def verify(self, tables: Iterable[pagetable.Table]) -> int:
        """Read every block that one of the tables needs, keep nothing, and return how many bytes
        that were; raises as ``pieces``.
        """
        needed = [np.zeros(len(self._table(n).block_pages), bool) for n in range(len(self._refs))]
        for table in tables:
            for number in np.unique(table.pack[table.pack >= 0]):
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
        pool = futures.ThreadPoolExecutor(_WORKERS, "ckpt-check")
        try:
            return sum(pool.map(self._verify_block, jobs))
        finally:
            pool.shutdown(cancel_futures=True)

    def _verify_block(self, key: _Key) -> int:
        number, block = key
        return len(self._tables[number].read(self._volume, block))

    def _table(self, number: int) -> BlockTable:
        if number not in self._tables:
            index = catalog.read_pack_index(self._volume, self._refs[number])
            self._tables[number] = BlockTable(self._refs[number], index)
        return self._tables[number]

    def _cut(self, table: pagetable.Table) -> Iterator[_Cut]:
        """Cut runs where blocks end."""
        rows = zip(
            table.start.tolist(),
            table.pages.tolist(),
            table.pack.tolist(),
            table.ordinal.tolist(),
            strict=True,
        )
        for page, count, number, ordinal in rows:
            if number < 0:
                yield _Cut(page, count, None, 0)
                continue
            starts = self._table(number).starts
            while count:
                block = bisect.bisect_right(starts, ordinal) - 1
                part = min(count, starts[block + 1] - ordinal)
                yield _Cut(page, part, (number, block), ordinal - starts[block])
                page, count, ordinal = page + part, count - part, ordinal + part

    def _request(self, pool: futures.Executor, key: _Key) -> futures.Future[bytes]:
        block = self._cache.get(key)
        if block is None or block.cancelled():
            number, at = key
            block = pool.submit(self._tables[number].load, self._volume, at)
            self._cache[key] = block
            if len(self._cache) > _CACHED_BLOCKS:
                self._cache.popitem(last=False)
        self._cache.move_to_end(key)
        return block
