"""What two epochs of a group have in common, from their page tables.

Pages that lie in the same place are equal; of others the packs' indexes tell by their tags. No
page is read.

Promises: counts are exact for an undamaged store; memory is the page tables of one address space
of both epochs, and a pack's index or two.
Does not: look at flags of pages, or verify what it does not need.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import TypeVar

import numpy as np
from numpy import typing as npt

from agent import errors
from agent.model.ids import EpochId, GroupName, MemberName
from agent.store import catalog, manifest, pagetable
from agent.volumes.base import Volume

# Pages compared by their tags in one step.
_STEP_PAGES = 1 << 18

_Column = npt.NDArray[np.int64]


@dataclasses.dataclass(frozen=True)
class PageChanges:
    """Pages by what became of them: where both epochs have one, or only one of them does."""

    same: int = 0
    changed: int = 0
    added: int = 0
    removed: int = 0

    def __add__(self, other: PageChanges) -> PageChanges:
        return PageChanges(
            self.same + other.same,
            self.changed + other.changed,
            self.added + other.added,
            self.removed + other.removed,
        )

    @property
    def none(self) -> bool:
        """Whether nothing is different."""
        return not (self.changed or self.added or self.removed)


@dataclasses.dataclass(frozen=True)
class NameChanges:
    """Names of files that differ in content or in what is known of them, and that only the newer
    or only the older epoch has; each sorted.
    """

    changed: tuple[str, ...] = ()
    added: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class MemberDiff:
    """One member: its memory, its ephemeral files, the engine's own files. A member that only one
    epoch has is all added or all removed; ``in_older`` and ``in_newer`` tell.
    """

    member: MemberName
    in_older: bool
    in_newer: bool
    memory: PageChanges
    files: NameChanges
    metadata: NameChanges


@dataclasses.dataclass(frozen=True)
class EpochDiff:
    """What ``newer`` has that ``older`` has not, and the other way round, by member."""

    group: GroupName
    older: EpochId
    newer: EpochId
    members: tuple[MemberDiff, ...]


def diff(volume: Volume, group: GroupName, older: EpochId, newer: EpochId) -> EpochDiff:
    """Compare two epochs of a group.

    Raises:
        errors.NotFound: one of them is not there.
        errors.DataError: one of them is damaged in what is needed here.
        errors.VolumeError: the volume failed.
    """
    before, after = _epoch(volume, group, older), _epoch(volume, group, newer)
    names = sorted({ref.member for of in (before, after) for ref in of.members})
    comparison = _Comparison(volume)
    members = tuple(
        comparison.member(name, _member(volume, before, name), _member(volume, after, name))
        for name in names
    )
    return EpochDiff(group, older, newer, members)


def _epoch(volume: Volume, group: GroupName, epoch: EpochId) -> manifest.EpochManifest:
    try:
        return catalog.read_epoch(volume, group, epoch)
    except errors.BlobNotFound as exc:
        raise errors.NotFound(
            f"there is no epoch {epoch} of {group}", hint="list shows what there is"
        ) from exc


def _member(
    volume: Volume, of: manifest.EpochManifest, name: MemberName
) -> manifest.MemberManifest | None:
    if all(ref.member != name for ref in of.members):
        return None
    return catalog.read_member(volume, of, name)


_Side = tuple[pagetable.Table, tuple[manifest.PackRef, ...]]
_EMPTY = pagetable.Table(*(np.empty(0, dtype=np.int64) for _ in range(5)))
_Value = TypeVar("_Value")


class _Comparison:
    def __init__(self, volume: Volume) -> None:
        self._tags = functools.lru_cache(8)(lambda ref: catalog.read_pack_index(volume, ref).tags)

    def member(
        self,
        name: MemberName,
        before: manifest.MemberManifest | None,
        after: manifest.MemberManifest | None,
    ) -> MemberDiff:
        spaces = [dict(each.spaces) if each else {} for each in (before, after)]
        memory = PageChanges()
        for space in {**spaces[0], **spaces[1]}:
            memory += self._pages(
                _table(spaces[0].get(space), before), _table(spaces[1].get(space), after)
            )
        streams = [dict(each.metadata) if each else {} for each in (before, after)]
        entries = [
            {entry.path: (entry, stream) for entry, stream in each.files} if each else {}
            for each in (before, after)
        ]
        files = _names(
            entries[0],
            entries[1],
            lambda old, new: old[0] == new[0] and self._equal(old[1], before, new[1], after),
        )
        metadata = _names(
            streams[0], streams[1], lambda old, new: self._equal(old, before, new, after)
        )
        return MemberDiff(name, before is not None, after is not None, memory, files, metadata)

    def _equal(
        self,
        old: manifest.Stream | None,
        before: manifest.MemberManifest | None,
        new: manifest.Stream | None,
        after: manifest.MemberManifest | None,
    ) -> bool:
        if old is None or new is None or old.size_bytes != new.size_bytes:
            return old is new
        return self._pages(_table(old.table, before), _table(new.table, after)).none

    def _pages(self, before: _Side, after: _Side) -> PageChanges:
        old, new = before[0], after[0]
        edges = [old.start, old.start + old.pages, new.start, new.start + new.pages]
        cuts = np.unique(np.concatenate(edges))
        if not len(cuts):
            return PageChanges()
        first, pages = cuts[:-1], np.diff(cuts)
        in_old, in_new = _runs_at(old, first), _runs_at(new, first)
        both = (in_old >= 0) & (in_new >= 0)
        added, removed = (in_old < 0) & (in_new >= 0), (in_old >= 0) & (in_new < 0)
        same = self._same(before, after, first[both], pages[both], in_old[both], in_new[both])
        return PageChanges(
            same, int(pages[both].sum()) - same, int(pages[added].sum()), int(pages[removed].sum())
        )

    def _same(
        self,
        before: _Side,
        after: _Side,
        first: _Column,
        pages: _Column,
        in_old: _Column,
        in_new: _Column,
    ) -> int:
        """Count equal pages of stretches that both have, each within one run of both."""
        (old, old_refs), (new, new_refs) = before, after
        place = {ref: number for number, ref in enumerate(dict.fromkeys(old_refs + new_refs))}
        refs = list(place)
        old_pack = _renumbered(old.pack[in_old], [place[ref] for ref in old_refs])
        new_pack = _renumbered(new.pack[in_new], [place[ref] for ref in new_refs])
        old_at = old.ordinal[in_old] + first - old.start[in_old]
        new_at = new.ordinal[in_new] + first - new.start[in_new]
        zero = (old_pack < 0) & (new_pack < 0)
        equal = zero | ((old_pack == new_pack) & (old_at == new_at))
        count = int(pages[equal].sum())
        unknown = ~equal & (old_pack >= 0) & (new_pack >= 0)
        pairs = old_pack * len(refs) + new_pack
        for pair in np.unique(pairs[unknown]).tolist():
            mine = unknown & (pairs == pair)
            old_tags, new_tags = (self._tags(refs[number]) for number in divmod(pair, len(refs)))
            for a, b in _steps(old_at[mine], new_at[mine], pages[mine]):
                count += int((old_tags[a] == new_tags[b]).all(axis=1).sum())
        return count


def _names(
    before: Mapping[str, _Value],
    after: Mapping[str, _Value],
    equal: Callable[[_Value, _Value], bool],
) -> NameChanges:
    both = before.keys() & after.keys()
    return NameChanges(
        tuple(sorted(name for name in both if not equal(before[name], after[name]))),
        tuple(sorted(after.keys() - before.keys())),
        tuple(sorted(before.keys() - after.keys())),
    )


def _steps(old_at: _Column, new_at: _Column, pages: _Column) -> Iterator[tuple[_Column, _Column]]:
    """Yield the numbers of the pages of all stretches in both packs, so many at once."""
    ends = np.cumsum(pages)
    begun = ends - pages
    for at in range(0, int(ends[-1]), _STEP_PAGES):
        page = np.arange(at, min(at + _STEP_PAGES, int(ends[-1])))
        stretch = np.searchsorted(ends, page, side="right")
        within = page - begun[stretch]
        yield old_at[stretch] + within, new_at[stretch] + within


def _table(encoded: bytes | None, of: manifest.MemberManifest | None) -> _Side:
    if encoded is None or of is None:
        return _EMPTY, ()
    return pagetable.decode(encoded, [ref.pages for ref in of.packs]), of.packs


def _runs_at(table: pagetable.Table, page: _Column) -> _Column:
    """Return which run each page is in, or -1."""
    found = np.searchsorted(table.start, page, side="right") - 1
    ends = np.append(table.start + table.pages, 0)  # the last one stands for none
    return np.where(page < ends[found], found, -1)


def _renumbered(pack: _Column, places: list[int]) -> _Column:
    return np.array([*places, -1], dtype=np.int64)[pack]
