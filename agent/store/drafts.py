"""Where the last drafts of one address space lie, by page.

Promises: eight bytes for each page of every 2 MiB that has a draft.
Does not: know what a row is but that it is not below -1.
"""

from __future__ import annotations

import numpy as np
from numpy import typing as npt

from agent import errors

Column = npt.NDArray[np.int64]

_CHUNK_PAGES = 512
_NO_DRAFT = -2


class Drafts:
    """The rows of pages, by their numbers."""

    def __init__(self) -> None:
        self._chunks: dict[int, Column] = {}

    def put(self, page: Column, row: Column) -> None:
        """Set the rows of pages; they take the place of earlier ones."""
        for number, chosen in _by_chunk(page):
            chunk = self._chunks.get(number)
            if chunk is None:
                chunk = np.full(_CHUNK_PAGES, _NO_DRAFT, dtype=np.int64)
                self._chunks[number] = chunk
            chunk[page[chosen] % _CHUNK_PAGES] = row[chosen]

    def rows(self, page: Column) -> Column:
        """The rows of pages.

        Raises:
            errors.InvalidInput: one was never drafted.
        """
        found = np.full(len(page), _NO_DRAFT, dtype=np.int64)
        for number, chosen in _by_chunk(page):
            chunk = self._chunks.get(number)
            if chunk is not None:
                found[chosen] = chunk[page[chosen] % _CHUNK_PAGES]
        if (found == _NO_DRAFT).any():
            raise errors.InvalidInput("a page is settled that was never drafted")
        return found


def _by_chunk(page: Column) -> list[tuple[int, slice]]:
    """Which parts of ``page`` lie in one chunk: neighbours in order, so that runs cost little."""
    if not len(page):
        return []
    number = page // _CHUNK_PAGES
    cuts = np.flatnonzero(np.diff(number)) + 1
    starts = [0, *cuts.tolist()]
    ends = [*cuts.tolist(), len(page)]
    return [(int(number[a]), slice(a, b)) for a, b in zip(starts, ends, strict=True)]
