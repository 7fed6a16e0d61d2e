"""All pages of one epoch attempt: those that its base has, and those that it stores.

Promises: a page is stored once, however many members and addresses hold it; memory is bounded but
for about 40 bytes a page of bookkeeping. Safe from several threads: members share it.
Does not: know members, address spaces or manifests.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Sequence

import numpy as np
from numpy import typing as npt

from agent import errors
from agent.model.streams import PAGE_BYTES
from agent.store import pack
from agent.store.baseline import Baseline
from agent.store.dedup import PageIndex, Rows, differ
from agent.store.identity import Tags
from agent.store.manifest import PackRef
from agent.store.packing import Buffer, Packer

Pages = npt.NDArray[np.uint8]

# In place of a page's row; -1 is the zero page's.
NO_ROW = -2


@dataclasses.dataclass(frozen=True)
class Places:
    """Where rows are: in which of ``refs``, and where in it."""

    refs: list[PackRef]
    first_rows: Rows

    def packs(self, rows: Rows) -> Rows:
        """Return the number of each row's pack; rows are not negative and durable."""
        return np.searchsorted(self.first_rows, rows, side="right") - 1


class EpochPages:
    """Places pages, by row. A row is a pack and a place in it; see ``places``."""

    def __init__(self, baseline: Baseline, packer: Packer, zero: Tags) -> None:
        self._packer = packer
        self._zero = zero
        self._index = PageIndex(zero, baseline.pages + len(baseline.packs))
        self._lock = threading.Lock()
        self._whole = True
        # The first row of each pack: the base's, those ended, and the open one.
        self._first_rows: list[int] = []
        self._base_refs: list[PackRef] = []
        for base in baseline.packs:
            tags = np.where(base.reusable[:, np.newaxis], base.index.tags, zero)
            self._first_rows.append(self._index.rows)
            self._base_refs.append(base.ref)
            self._index.extend(tags)
            self._index.leave_out()
        self._open_row = self._index.rows
        self._open_pages = 0
        self._block: Buffer | None = None
        self._block_pages = 0

    def place(self, pages: Pages, tags: Tags) -> tuple[Rows, int]:
        """Store what is new of ``pages``, shape (n, PAGE_BYTES), and return the row of each page,
        -1 for zero pages, and how many were new.

        Raises:
            errors.VolumeError: the volume failed, now or earlier.
        """
        rows = np.full(len(tags), -1, dtype=np.int64)
        full = np.flatnonzero(differ(tags, self._zero))
        if not len(full):
            return rows, 0
        with self._lock:
            self._whole = False
            found = self._index.find(tags[full])
            unknown = np.flatnonzero(found < 0)
            new, copy_of = _distinct(tags[full[unknown]])
            if len(new):
                stored = self._store(pages, full[unknown[new]], tags)
                found[unknown] = stored[copy_of]
            self._whole = True
        rows[full] = found
        return rows, len(new)

    def recalled(self, packs: Sequence[str], pack: Rows, ordinal: Rows) -> Rows:
        """The rows of pages by the numbers of their ``packs``, -1 for zero pages, and their places
        there; ``NO_ROW`` for those that the epoch must not refer to.
        """
        known = {ref.name: row for ref, row in zip(self._base_refs, self._first_rows, strict=False)}
        first = np.array([*(known.get(name, NO_ROW) for name in packs), -1], dtype=np.int64)
        rows = first[pack]
        here = np.flatnonzero(rows >= 0)
        rows[here] += ordinal[here]
        with self._lock:
            rows[here[~self._index.findable(rows[here])]] = NO_ROW
        return rows

    def flush(self) -> tuple[list[PackRef], int]:
        """End the open pack and wait until everything placed is durable; return the packs that
        this attempt made so far, and their bytes.

        Raises:
            errors.VolumeError: the volume failed, now or earlier.
            errors.DumpFailed: storing was broken off somewhere, whoever caught that.
        """
        with self._lock:
            self._packer.check()
            if not self._whole:
                raise errors.DumpFailed("the epoch lacks pages whose storing was broken off")
            self._end_pack()
            return self._packer.wait()

    def places(self, made: list[PackRef]) -> Places:
        """Return where rows are; ``made`` is what ``flush`` returned."""
        refs = self._base_refs + made
        return Places(refs, np.array(self._first_rows[: len(refs)], dtype=np.int64))

    def _store(self, pages: Pages, chosen: Rows, tags: Tags) -> Rows:
        rows = np.empty(len(chosen), dtype=np.int64)
        done = 0
        while done < len(chosen):
            if self._block is None:
                self._block = self._packer.buffer()
                self._block_pages = 0
            room = min(pack.BLOCK_PAGES - self._block_pages, pack.PACK_PAGES - self._open_pages)
            part = chosen[done : done + room]
            at = self._block_pages
            # Neighbours are copied at once, which is what most of a first dump consists of.
            if int(part[-1]) - int(part[0]) == len(part) - 1:
                self._block[at : at + len(part)] = pages[part[0] : part[-1] + 1]
            else:
                np.take(pages, part, axis=0, out=self._block[at : at + len(part)], mode="clip")
            first = self._index.extend(tags[part])
            rows[done : done + len(part)] = np.arange(first, first + len(part))
            done += len(part)
            self._block_pages += len(part)
            self._open_pages += len(part)
            if self._block_pages == pack.BLOCK_PAGES:
                self._end_block()
            if self._open_pages == pack.PACK_PAGES:
                self._end_pack()
        return rows

    def _end_block(self) -> None:
        if self._block is not None:
            self._packer.add(self._block, self._block_pages)
            self._block = None

    def _end_pack(self) -> None:
        self._end_block()
        if self._open_pages:
            self._packer.end_pack(self._index.tags(self._open_row, self._open_pages))
            self._first_rows.append(self._open_row)
            self._index.leave_out()
            self._open_row = self._index.rows
            self._open_pages = 0


def as_pages(data: memoryview) -> Pages:
    """See whole pages as an array, without copying."""
    return np.frombuffer(data, dtype=np.uint8).reshape(-1, PAGE_BYTES)


def _distinct(tags: Tags) -> tuple[Rows, Rows]:
    """Return the positions of the first of each kind, ascending, and for every tag the number of
    its kind. Kinds are told by half a tag; if that fails, every tag is a kind of its own.
    """
    _, first, kind = np.unique(tags[:, 0], return_index=True, return_inverse=True)
    if (tags[first[kind], 1] != tags[:, 1]).any():
        return np.arange(len(tags)), np.arange(len(tags))
    order = np.argsort(first)
    rank = np.empty(len(first), dtype=np.int64)
    rank[order] = np.arange(len(first))
    return first[order], rank[kind]
