"""What a new epoch builds on: the packs of its group's newest good epoch, and their pages.

Only the group's own pages are looked at: finding pages of other groups would tell one tenant what
another one's memory holds (by what its dump costs), and would tie their epochs' lives together.

Promises: never fails for damage: a pack that is missing, cut short or has a damaged index is left
out, so that its pages are stored again, and a warning says so.
Does not: read the pages themselves, nor write.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from agent import errors
from agent.model.ids import EpochId, GroupName
from agent.store import catalog, copyforward, manifest, pack, pagetable, suspects
from agent.volumes.base import Volume


@dataclasses.dataclass(frozen=True)
class BasePack:
    """One pack, its index, and which of its pages may be referred to."""

    ref: manifest.PackRef
    index: pack.PackIndex
    reusable: copyforward.Mask


@dataclasses.dataclass(frozen=True)
class Baseline:
    """The base of a new epoch; without epoch and packs for a first one."""

    epoch: EpochId | None = None
    packs: tuple[BasePack, ...] = ()
    warnings: tuple[str, ...] = ()

    @property
    def pages(self) -> int:
        """Pages in all packs."""
        return sum(base.ref.pages for base in self.packs)


def load(volume: Volume, group: GroupName) -> Baseline:
    """Return the newest epoch whose manifest is good as a baseline.

    Raises:
        errors.VolumeError: the volume failed, beyond a part that cannot be read.
    """
    warnings: list[str] = []
    for epoch in reversed(catalog.epochs(volume, group)):
        try:
            found = catalog.read_epoch(volume, group, epoch)
        except (errors.DataError, errors.BlobNotFound) as exc:
            warnings.append(f"not built on {epoch}: {exc.message}")
            continue
        packs = _packs(volume, found, warnings)
        return Baseline(epoch, tuple(packs), tuple(warnings))
    return Baseline(warnings=tuple(warnings))


def _packs(volume: Volume, found: manifest.EpochManifest, warnings: list[str]) -> list[BasePack]:
    refs: dict[str, manifest.PackRef] = {}
    used: dict[str, copyforward.Mask] = {}
    for ref in found.members:
        try:
            member = catalog.read_member(volume, found, ref.member)
            _mark(member, refs, used)
        except (errors.DataError, errors.VolumeError) as exc:
            warnings.append(f"not built on {ref.member} of {found.epoch}: {exc.message}")
    packs = []
    damaged = suspects.known(volume) if refs else set()
    for name, pack_ref in sorted(refs.items()):
        if name in damaged:
            warnings.append(f"not built on {name}: a verification found it damaged")
            continue
        try:
            index = catalog.read_pack_index(volume, pack_ref)
        except (errors.DataError, errors.VolumeError) as exc:
            warnings.append(f"not built on {name}: {exc.message}")
            continue
        reusable = copyforward.reusable_pages(used[name], index.block_pages)
        if reusable.any():
            packs.append(BasePack(pack_ref, index, reusable))
    return packs


def _mark(
    member: manifest.MemberManifest,
    refs: dict[str, manifest.PackRef],
    used: dict[str, copyforward.Mask],
) -> None:
    """Note which pages a member uses, in packs that it may share with others."""
    sizes = [ref.pages for ref in member.packs]
    for ref in member.packs:
        if refs.setdefault(ref.name, ref) != ref:
            raise errors.Corrupt(f"{ref.name} is described in two ways", part=ref.name)
        used.setdefault(ref.name, np.zeros(ref.pages, dtype=np.bool_))
    for encoded in member.tables():
        table = pagetable.decode(encoded, sizes)
        for number, ref in enumerate(member.packs):
            mine = table.pack == number
            used[ref.name] |= pagetable.covered(table.ordinal[mine], table.pages[mine], ref.pages)
