"""A store on a volume: the door for everybody outside this package.

Promises: several processes on several machines may use one store at once: readers, writers and
prunes; none waits for another. FORMAT.md says how.
Does not: run engines, show progress or decide what to keep.
"""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

from agent import errors
from agent.model import ids
from agent.model.ids import EpochId, GroupName
from agent.model.protocol import Decision
from agent.store import (
    catalog,
    decisions,
    diff,
    envelope,
    epoch_ids,
    holding,
    identity,
    joint,
    layout,
    parts,
    prune,
    reader,
    reserve,
    summary,
    verify,
    writer,
)
from agent.store.fields import Fields, encode
from agent.store.retention import Retention
from agent.volumes.base import Volume

EpochDiff = diff.EpochDiff
EpochReader = reader.EpochReader
EpochSummary = summary.EpochSummary
EpochWriter = writer.EpochWriter
JointWriter = joint.JointWriter
MemberDiff = diff.MemberDiff
MemberReader = reader.MemberReader
Part = parts.Part
PruneReport = prune.PruneReport
VerifyReport = verify.VerifyReport

_PAGE_KEY = "page_key"
_ID = "id"


class Store:
    """All epochs of all groups on one volume."""

    def __init__(self, volume: Volume, store_id: str, key: bytes) -> None:
        self.volume = volume
        self.id = store_id
        self._key = key

    @classmethod
    def open(cls, volume: Volume, *, create: bool = False) -> Store:
        """Open the store on a volume, or make one there if ``create`` and there is none.

        Raises:
            errors.NotFound: there is none.
            errors.UnknownFormat: another version of this program made it.
            errors.Corrupt: its first file is damaged.
            errors.VolumeError: the volume failed.
        """
        try:
            sealed = volume.read(layout.STORE)
        except errors.BlobNotFound as exc:
            if not create:
                raise errors.NotFound(
                    f"there is no store at {volume.url}",
                    hint="check --store; the first dump makes one",
                ) from exc
            body = {_ID: secrets.token_hex(16), _PAGE_KEY: identity.new_key().hex()}
            # If somebody else made one meanwhile, that is the store.
            with contextlib.suppress(errors.BlobExists):
                volume.put(layout.STORE, envelope.seal(envelope.Kind.STORE, encode(body)))
            reserve.set_aside(volume)
            sealed = volume.read(layout.STORE)
        fields = Fields.parse(
            envelope.unseal(envelope.Kind.STORE, sealed, part=layout.STORE), layout.STORE
        )
        key = fields.blob(_PAGE_KEY, identity.KEY_BYTES)
        return cls(volume, fields.text(_ID), key)

    def begin(self, group: GroupName, *, now_s: float) -> AbstractContextManager[EpochWriter]:
        """Open a new epoch; leaving the context without ``commit`` leaves nothing restorable."""
        return writer.begin(self.volume, self._key, group, now_s=now_s)

    def new_epoch(self, group: GroupName, *, now_s: float) -> EpochId:
        """Return a name for an epoch that several writers will write together; it sorts after all
        that are decided in the group. Nothing is written.
        """
        return epoch_ids.next_epoch(catalog.names(self.volume, group), now_s)

    def join(
        self, group: GroupName, epoch: EpochId, *, now_s: float
    ) -> AbstractContextManager[JointWriter]:
        """Write members of an epoch that others write, too; leaving the context before ``finish``
        leaves nothing, after it everything, unless ``keep`` or ``drop`` was called.

        Raises:
            errors.Conflict: the epoch is decided already.
            errors.DeadlineExceeded: its name is older than a writer may become.
        """
        return joint.join(self.volume, self._key, group, epoch, now_s=now_s)

    def commit_joint(
        self,
        group: GroupName,
        epoch: EpochId,
        given: Sequence[Part],
        facts: dict[str, Any],
        *,
        now_s: float,
    ) -> EpochSummary:
        """Make an epoch of these parts restorable; durable when this returns, idempotent.

        Raises:
            errors.Conflict: it was abandoned, committed with other parts, or a part was dropped.
            errors.DeadlineExceeded: a part is so old that it may be taken for dead.
            errors.VolumeError: it may be committed all the same; ``abandon`` tells.
        """
        return joint.commit(self.volume, group, epoch, given, facts, now_s=now_s)

    def abandon(self, group: GroupName, epoch: EpochId) -> Decision:
        """Decide that an epoch is never committed, unless it is decided; return what it is.

        Raises:
            errors.DataError: it is decided, but the file that says how is damaged.
            errors.VolumeError: it is not known whether it is decided; asking again tells.
        """
        return decisions.abandon(self.volume, group, epoch)

    def decision(self, group: GroupName, epoch: EpochId) -> Decision | None:
        """Return what an epoch is decided to be, None if it is not; raises as ``abandon``. A
        deleted epoch is undecided again, but nobody can commit it.
        """
        return decisions.decision(self.volume, group, epoch)

    def epochs(self, group: GroupName | None = None) -> list[EpochSummary]:
        """Return all epochs, of one group or by group, oldest first. One whose manifest is
        damaged is listed with ``damage`` set.
        """
        return catalog.summaries(self.volume, group)

    def resolve(self, image: str) -> tuple[GroupName, EpochId]:
        """Return what ``group`` (its newest epoch), ``group@epoch``, or an unambiguous beginning
        of the epoch names.

        Raises:
            errors.NotFound: nothing, or several.
            errors.InvalidInput: it is no name of an image.
        """
        group, matching = self.matching(image)
        at = "@" in image
        if not matching:
            raise errors.NotFound(
                f"there is no image {image} at {self.volume.url}", hint="list shows what there is"
            )
        if at and len(matching) > 1:
            raise errors.NotFound(
                f"{image} may be any of {len(matching)} epochs",
                hint=f"for instance {ids.image_name(group, matching[-1])}",
            )
        return group, matching[-1]

    def matching(self, image: str) -> tuple[GroupName, list[EpochId]]:
        """Return the group that ``image`` names and which of its epochs may be meant, oldest
        first; none is no error.

        Raises:
            errors.InvalidInput: it is no name of an image.
        """
        name, at, start = image.partition("@")
        group = ids.group_name(name)
        if at and not start:
            raise errors.InvalidInput(f"image {image!r} lacks its epoch after '@'")
        epochs = catalog.epochs(self.volume, group)
        return group, [epoch for epoch in epochs if epoch.startswith(start)]

    def read(self, group: GroupName, epoch: EpochId) -> EpochReader:
        """Open a committed epoch; raises ``errors.NotFound`` and ``errors.DataError``."""
        return reader.EpochReader(self.volume, group, epoch)

    def hold(self, reader: EpochReader) -> AbstractContextManager[bool]:
        """Keep what is being read from being deleted; gives whether the volume allows that.

        Raises:
            errors.NotFound: it is being deleted.
        """
        found = reader.summary
        return holding.hold(self.volume, found.group, found.epoch, reader.packs)

    def diff(self, group: GroupName, older: EpochId, newer: EpochId) -> EpochDiff:
        """Compare two epochs of a group, by their page tables; raises ``errors.NotFound`` and
        ``errors.DataError``.
        """
        return diff.diff(self.volume, group, older, newer)

    def delete(self, group: GroupName, epoch: EpochId) -> PruneReport:
        """Remove one epoch, also a damaged one, and what only it needed.

        Raises:
            errors.NotFound: there is none.
            errors.Conflict: somebody else is removing epochs right now, or reading this one.
        """
        return prune.delete(self.volume, group, epoch)

    def prune(
        self,
        keep: Retention,
        *,
        group: GroupName | None = None,
        now_s: float,
        dry_run: bool = False,
    ) -> PruneReport:
        """Remove what ``keep`` does not keep, of one group or of each, and what is left over from
        attempts that were never committed; or only say what would go.

        Raises:
            errors.Conflict: somebody else is removing epochs right now.
        """
        return prune.prune(self.volume, keep, group=group, now_s=now_s, dry_run=dry_run)

    def verify(
        self,
        group: GroupName,
        epoch: EpochId,
        progress: verify.Progress | None = None,
    ) -> VerifyReport:
        """Read an epoch whole and list every damaged part; raises ``errors.NotFound``."""
        return verify.verify(self.volume, self._key, group, epoch, progress)
