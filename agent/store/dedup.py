"""The pages that a writer may refer to, found by tag.

One row a page, in the order of packs and of pages in them; one row is left out after each pack, so
that neighbouring rows are always neighbours in one pack. A row that must not be referred to holds
the zero page's tag, which is never looked up.

An open-addressing hash table over numpy arrays: 16 bytes a page for tags and 8 to 16 for slots,
where a dictionary would take 200. Tags are uniform under their key, so their low bits are the
hash, and nobody can choose pages that collide in the table either.

Promises: ``find`` returns only rows whose whole tag is equal.
Does not: know packs, members or volumes. Not for several threads at once.
"""

from __future__ import annotations

import numpy as np
from numpy import typing as npt

from agent import errors
from agent.store.identity import Tags

Rows = npt.NDArray[np.int64]

_FIRST_ROWS = 1 << 12
_MAX_LOAD = 0.5  # of the slots; probes stay short
_GROWTH = 1.5  # of the tags; each growth copies, and old and new exist at once
_MAX_ROWS = (1 << 32) - 2  # slots are 32 bits wide; 16 TiB of different pages in one epoch
_BATCH = 1 << 16  # rows put into slots at once, to bound temporary arrays


def differ(tags: Tags, one: Tags) -> npt.NDArray[np.bool_]:
    """Return which tags are not equal to one tag; much faster by column."""
    different: npt.NDArray[np.bool_] = (tags[:, 0] != one[0]) | (tags[:, 1] != one[1])
    return different


class PageIndex:
    """Tags by row, and rows by tag."""

    def __init__(self, zero: Tags, expected_rows: int = _FIRST_ROWS) -> None:
        self._zero = zero
        self._rows = 0
        self._tags: Tags = np.empty((max(expected_rows, _FIRST_ROWS), 2), dtype=np.uint64)
        self._slots = self._empty_slots(expected_rows)

    @property
    def rows(self) -> int:
        """Rows so far, those left out included."""
        return self._rows

    @property
    def memory_bytes(self) -> int:
        """What the table takes."""
        return int(self._tags.nbytes + self._slots.nbytes)

    def tags(self, first: int, count: int) -> Tags:
        """Return a copy of the tags of some rows."""
        return self._tags[first : first + count].copy()

    def findable(self, rows: Rows) -> npt.NDArray[np.bool_]:
        """Return which rows are of pages; those with the zero page's tag are of none."""
        return differ(self._tags[rows], self._zero)

    def leave_out(self) -> None:
        """Leave out a row, at the end of a pack."""
        self._append(self._zero.reshape(1, 2))

    def extend(self, tags: Tags) -> int:
        """Append rows and return the first one's number. Tags equal to the zero page's get a row
        that is never found; where a tag is there twice, either row may be found.
        """
        first = self._append(tags)
        if self._rows > len(self._slots) * _MAX_LOAD:
            self._slots = self._empty_slots(self._rows * 2)
            first = 0
        for start in range(first, self._rows, _BATCH):
            self._claim(start, min(start + _BATCH, self._rows))
        return self._rows - len(tags)

    def find(self, tags: Tags) -> Rows:
        """Return the row of each tag, or -1."""
        position = self._home(tags)
        mask = len(self._slots) - 1
        # Nearly all end at the first slot: found there, or it is empty.
        rows, other = self._look(position, tags)
        pending = np.flatnonzero(other)
        while pending.size:
            position[pending] = (position[pending] + 1) & mask
            found, other = self._look(position[pending], tags[pending])
            rows[pending] = found
            pending = pending[other]
        return rows

    def _look(self, position: Rows, tags: Tags) -> tuple[Rows, npt.NDArray[np.bool_]]:
        """Return the row in each slot if its tag is equal, else -1, and whether another tag is
        in the way.
        """
        rows = self._slots[position].astype(np.int64) - 1
        there = self._tags[rows]  # of an empty slot: some row
        same = (there[:, 0] == tags[:, 0]) & (there[:, 1] == tags[:, 1])
        taken = rows >= 0
        return np.where(same & taken, rows, -1), taken & ~same

    def _append(self, tags: Tags) -> int:
        first, self._rows = self._rows, self._rows + len(tags)
        if self._rows > _MAX_ROWS:
            raise errors.InvalidInput("more than 16 TiB of different pages in one epoch")
        if self._rows > len(self._tags):
            bigger = np.empty((max(self._rows, int(len(self._tags) * _GROWTH)), 2), np.uint64)
            bigger[:first] = self._tags[:first]
            self._tags = bigger
        self._tags[first : self._rows] = tags
        return first

    def _claim(self, start: int, stop: int) -> None:
        """Give rows their slots. All take the next free one at once; where several took the
        same, one has it and the others go on.
        """
        pending = np.arange(start, stop)
        pending = pending[differ(self._tags[start:stop], self._zero)]
        position = self._home(self._tags[pending])
        mask = len(self._slots) - 1
        while pending.size:
            free = self._slots[position] == 0
            self._slots[position[free]] = (pending[free] + 1).astype(np.uint32)
            lost = self._slots[position] != pending + 1
            pending, position = pending[lost], (position[lost] + 1) & mask

    def _home(self, tags: Tags) -> Rows:
        return (tags[:, 0] & np.uint64(len(self._slots) - 1)).astype(np.int64)

    def _empty_slots(self, rows: int) -> npt.NDArray[np.uint32]:
        wanted = int(max(rows, _FIRST_ROWS) / _MAX_LOAD)
        return np.zeros(1 << (wanted - 1).bit_length(), dtype=np.uint32)
