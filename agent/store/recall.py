"""What a member of an epoch had in its address spaces, to be taken over into the next epoch.

Promises: names only pages that the epoch's good manifests name; of what cannot be read, none.
Does not: read pages, or say which of them may be referred to (``pages``).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator

import numpy as np

from agent import errors
from agent.model.ids import EpochId, GroupName, MemberName
from agent.model.streams import AddressSpace
from agent.store import catalog, manifest, pagetable
from agent.store.pagetable import Column
from agent.volumes.base import Volume

log = logging.getLogger(__name__)

# Looked at in one step: bounds temporary arrays.
_STEP_PAGES = 1 << 16


class Recall:
    """One member of ``epoch``, None for none at all; its manifest is read when first needed."""

    def __init__(
        self, volume: Volume, group: GroupName, epoch: EpochId | None, member: MemberName
    ) -> None:
        self.epoch = epoch
        self._volume = volume
        self._group = group
        self._name = member
        self._found: manifest.MemberManifest | None = None
        self._read = False

    @property
    def packs(self) -> list[str]:
        """The packs that ``pages`` speaks of, by their numbers."""
        member = self._member()
        return [ref.name for ref in member.packs] if member else []

    def pages(self, space: AddressSpace) -> Iterator[tuple[Column, Column, Column]]:
        """Yield the numbers of pages of ``space``, ascending, the number of the pack where each
        lies, -1 for zero pages, and its place in there.
        """
        member = self._member()
        encoded = dict(member.spaces).get(space) if member else None
        if member is None or encoded is None:
            return
        table = pagetable.decode(encoded, [ref.pages for ref in member.packs])
        runs = np.stack([table.start, table.pages, table.pack, table.ordinal])
        ends = np.cumsum(table.pages)
        for done in range(0, int(ends[-1]) if len(ends) else 0, _STEP_PAGES):
            number = np.arange(done, min(done + _STEP_PAGES, int(ends[-1])))
            run = np.searchsorted(ends, number, side="right")
            start, pages, pack, ordinal = runs[:, run]
            within = number - (ends[run] - pages)
            yield start + within, pack, ordinal + within

    def _member(self) -> manifest.MemberManifest | None:
        if not self._read and self.epoch is not None:
            self._read = True
            try:
                epoch = catalog.read_epoch(self._volume, self._group, self.epoch)
                if any(ref.member == self._name for ref in epoch.members):
                    self._found = catalog.read_member(self._volume, epoch, self._name)
            except (errors.DataError, errors.BlobNotFound) as exc:
                log.warning("nothing is taken over from %s: %s", self.epoch, exc.message)
        return self._found
