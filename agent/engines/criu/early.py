"""Reads what a tree needs before it runs while CRIU still makes the tree.

Promises: what it gives has been verified; it holds a bounded amount (32 MiB, or its part of it
where other members are restored as well), and nothing where there is more to read than that; once
``close`` returns nothing of it runs.
Does not: write anything.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from concurrent import futures

from agent.engines.criu import pour
from agent.model.streams import AddressSpace, MemberSource

_MOST_BYTES = 32 << 20


class Early:
    """The poured runs of ``shares``, being read by a thread of its own."""

    def __init__(self, source: MemberSource, shares: Mapping[AddressSpace, pour.Split]) -> None:
        self._source = source
        self._shares = shares
        self._over = threading.Event()
        self._pool = futures.ThreadPoolExecutor(1, "early")
        self._read = self._pool.submit(self._all)

    @classmethod
    def of(
        cls, source: MemberSource, shares: Mapping[AddressSpace, pour.Split], parties: int
    ) -> Early | None:
        """Begin, unless it is too much for one of so many members."""
        if sum(share.poured_bytes for share in shares.values()) > _MOST_BYTES // parties:
            return None
        return cls(source, shares)

    def take(self) -> dict[AddressSpace, list[pour.Piece]]:
        """Wait until all of it is there.

        Raises:
            errors.Corrupt | errors.Missing | errors.VolumeError: it cannot be had.
        """
        return self._read.result()

    def close(self) -> None:
        """End; safe to repeat."""
        self._over.set()
        self._pool.shutdown(cancel_futures=True)

    def _all(self) -> dict[AddressSpace, list[pour.Piece]]:
        source = self._source.beside()
        found: dict[AddressSpace, list[pour.Piece]] = {}
        for space, share in self._shares.items():
            pieces = found[space] = []
            for address, data, pages, fresh in pour.pieces(source, space, share):
                if self._over.is_set():
                    return found
                # What a source gives is valid until its next step.
                kept = None if data is None else memoryview(bytes(data))
                pieces.append((address, kept, pages, fresh))
        return found
