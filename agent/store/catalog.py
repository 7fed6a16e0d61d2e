"""Finding and reading the small files of a store, each checked against what names it.

Promises: what is returned was whole; a file that a manifest names and that is not there is
``errors.Missing``, one that does not match is ``errors.Corrupt``, and each error names the part.
Does not: read pages, write or cache.
"""

from __future__ import annotations

from collections.abc import Iterator

from agent import errors
from agent.model.ids import EpochId, GroupName, MemberName
from agent.store import decisions, layout, manifest, pack, summary
from agent.store.digest import digest
from agent.volumes.base import BlobInfo, Volume


def group_files(
    volume: Volume, group: GroupName | None = None
) -> Iterator[tuple[layout.EpochFile, BlobInfo]]:
    """Yield every file below ``groups/``, by name only: members' manifests, epochs' manifests and
    what takes their place where an epoch is abandoned.
    """
    prefix = layout.GROUPS if group is None else f"{layout.GROUPS}{group}/"
    for info in volume.list(prefix):
        found = layout.parse_group_file(info.name)
        if found is not None:
            yield found, info


def names(volume: Volume, group: GroupName) -> list[EpochId]:
    """Return the epochs of a group that are decided, either way, oldest first."""
    return [found.epoch for found, _ in group_files(volume, group) if found.member is None]


def committed(volume: Volume, group: GroupName | None = None) -> Iterator[layout.EpochFile]:
    """Yield the committed epochs, of one group or by group, oldest first, good or damaged."""
    for found, info in group_files(volume, group):
        if found.member is None and not decisions.listed_as_abandoned(
            volume, info, found.group, found.epoch
        ):
            yield found


def epochs(volume: Volume, group: GroupName) -> list[EpochId]:
    """Return the committed epochs of a group, oldest first."""
    return [found.epoch for found in committed(volume, group)]


def summaries(volume: Volume, group: GroupName | None = None) -> list[summary.EpochSummary]:
    """Return all epochs, of one group or by group, oldest first, damaged ones marked."""
    result = []
    for file in committed(volume, group):
        try:
            found = read_epoch(volume, file.group, file.epoch)
        except errors.DataError as exc:
            result.append(summary.damaged(file.group, file.epoch, exc.message))
        except errors.BlobNotFound:  # deleted since we listed it
            continue
        else:
            result.append(summary.of(found))
    return result


def exists(volume: Volume, group: GroupName, epoch: EpochId) -> bool:
    """Tell whether an epoch is committed, and not deleted."""
    try:
        info = volume.info(layout.epoch_name(group, epoch))
    except errors.BlobNotFound:
        return False
    return not decisions.listed_as_abandoned(volume, info, group, epoch)


def read_epoch(volume: Volume, group: GroupName, epoch: EpochId) -> manifest.EpochManifest:
    """Read the manifest of an epoch.

    Raises:
        errors.BlobNotFound: there is no such epoch, or it was abandoned.
        errors.Corrupt | errors.UnknownFormat: it cannot be used.
    """
    name = layout.epoch_name(group, epoch)
    sealed = volume.read(name)
    if decisions.is_abandonment(sealed, group, epoch):
        raise errors.BlobNotFound(f"epoch {epoch} of {group} was abandoned", blob=name)
    return manifest.decode_epoch(sealed, group, epoch)


def read_member(
    volume: Volume, of: manifest.EpochManifest, member: MemberName
) -> manifest.MemberManifest:
    """Read the manifest of one of an epoch's members.

    Raises:
        errors.Missing | errors.Corrupt | errors.UnknownFormat: it cannot be used.
    """
    ref = next(ref for ref in of.members if ref.member == member)
    part = layout.member_name(of.group, of.epoch, member)
    sealed = _read_named(volume, part, 0, ref.size_bytes + 1)
    if len(sealed) != ref.size_bytes or digest(sealed) != ref.digest:
        raise errors.Corrupt(f"{part} is not what its epoch names", part=part)
    found = manifest.decode_member(sealed, of.group, of.epoch, member)
    if not {pack_ref.name for pack_ref in found.packs} <= set(of.packs):
        # A prune goes by the epoch's list.
        raise errors.Corrupt(f"{part} needs a pack that its epoch does not name", part=part)
    return found


def read_pack_index(volume: Volume, ref: manifest.PackRef) -> pack.PackIndex:
    """Read a pack's header and index, and check the size of the file.

    Raises:
        errors.Missing | errors.Corrupt | errors.UnknownFormat: the pack cannot be used.
    """
    header = _read_named(volume, ref.name, 0, len(pack.HEADER))
    if header != pack.HEADER:
        raise errors.Corrupt(f"{ref.name} does not begin like a pack", part=ref.name)
    sealed = _read_named(volume, ref.name, ref.index_offset, ref.index_bytes + 1)
    if len(sealed) != ref.index_bytes:
        raise errors.Corrupt(f"{ref.name} has another size than when written", part=ref.name)
    if digest(sealed) != ref.digest:
        raise errors.Corrupt(f"the index of {ref.name} does not match", part=ref.name)
    index = pack.decode(sealed, part=ref.name)
    if index.pages != ref.pages or index.index_offset != ref.index_offset:
        raise errors.Corrupt(f"{ref.name} is not what a manifest describes", part=ref.name)
    return index


def _read_named(volume: Volume, name: str, offset: int, length: int) -> bytes:
    """Read what a manifest names, so that its absence is damage."""
    try:
        return volume.read(name, offset, length)
    except errors.BlobNotFound as exc:
        raise errors.Missing(f"{name} is not there", part=name) from exc
