"""The writing half: an epoch from its beginning to its commit, or to nothing.

Promises: an epoch can be restored once ``commit`` returned, and not at all if the context is left
without it; what was written for it is then removed as far as the volume still works, and by a
later prune otherwise. Writers of one group do not wait for each other.
Does not: read pages back.
"""

from __future__ import annotations

import contextlib
import enum
import logging
import threading
from collections.abc import Iterator
from typing import Any

from agent import errors
from agent.model.ids import EpochId, GroupName, MemberName
from agent.store import baseline, catalog, epoch_ids, intents, layout, manifest, summary
from agent.store.identity import Identity
from agent.store.member_writer import MemberWriter
from agent.store.packing import Packer
from agent.store.pages import EpochPages
from agent.volumes.base import Volume

log = logging.getLogger(__name__)

# How often the base of a beginning writer may vanish before something is really wrong.
_BASE_RACES = 16
# Where the writer's own warnings go among the facts of an epoch.
WARNINGS = "store_warnings"


@contextlib.contextmanager
def begin(volume: Volume, key: bytes, group: GroupName, *, now_s: float) -> Iterator[EpochWriter]:
    """Open a new epoch of ``group``; ``key`` is the store's page key, ``now_s`` wall time.

    Raises:
        errors.VolumeError: the volume failed.
        errors.Conflict: whatever it would build on is being deleted.
    """
    epoch = epoch_ids.next_epoch(catalog.epochs(volume, group), now_s)
    attempt = epoch_ids.new_attempt(epoch)
    age = intents.Age()
    base = _settle(volume, group, attempt)
    writer = EpochWriter(volume, key, group, epoch, attempt, base, age, now_s)
    del base  # its tags are in the writer's own index now
    try:
        yield writer
    finally:
        writer.close()


def _settle(volume: Volume, group: GroupName, attempt: str) -> baseline.Baseline:
    """Choose a base and announce it, such that no prune can take its packs away.

    A prune lists intents after it has deleted manifests. So if the base is still there after the
    intent was put, then a prune that did not see the intent sees the base.
    """
    for _ in range(_BASE_RACES):
        base = baseline.load(volume, group)
        packs = tuple(pack.ref.name for pack in base.packs)
        owner = intents.Owner.myself()
        intent = intents.Intent(attempt, "write", owner, group, base.epoch, packs)
        intents.announce(volume, intent)
        if base.epoch is None or catalog.exists(volume, group, base.epoch):
            return base
        intents.withdraw(volume, attempt)
    raise errors.Conflict(
        f"every epoch of {group} to build on is being deleted", hint="try again later"
    )


class _Seen(enum.Enum):
    """Whether others may have seen the epoch."""

    NEVER = enum.auto()
    PERHAPS = enum.auto()
    PERHAPS_STILL = enum.auto()
    COMMITTED = enum.auto()


class EpochWriter:
    """One attempt to write an epoch of ``group``, called ``epoch``. Members may be written from
    several threads; everything else comes from one.
    """

    def __init__(
        self,
        volume: Volume,
        key: bytes,
        group: GroupName,
        epoch: EpochId,
        attempt: str,
        base: baseline.Baseline,
        age: intents.Age,
        now_s: float,
    ) -> None:
        self.group = group
        self.epoch = epoch
        self._volume = volume
        self._key = key
        self._attempt = attempt
        self._warnings = base.warnings
        self._age = age
        self._created_s = now_s
        self._members: dict[MemberName, MemberWriter] = {}
        self._lock = threading.Lock()
        self._packer = Packer(volume, attempt)
        self._pages = EpochPages(base, self._packer, Identity(key).zero)
        self._seen = _Seen.NEVER

    def member(self, name: MemberName) -> MemberWriter:
        """Begin a member of the epoch.

        Raises:
            errors.InvalidInput: the epoch has one of this name already, or is committed.
        """
        with self._lock:
            if self._seen is not _Seen.NEVER or name in self._members:
                raise errors.InvalidInput(f"member {name} cannot be added to epoch {self.epoch}")
            writer = MemberWriter(
                self._volume, self._pages, self._key, self.group, self.epoch, name
            )
            self._members[name] = writer
        return writer

    def commit(self, facts: dict[str, Any]) -> summary.EpochSummary:
        """Finish all members and make the epoch restorable; durable when this returns.

        Raises:
            errors.VolumeError | errors.Conflict | errors.DeadlineExceeded: it is not committed.
            errors.InvalidInput: it has no members, or was committed before.
        """
        if self._seen is not _Seen.NEVER or not self._members:
            raise errors.InvalidInput("an epoch is committed once, with at least one member")
        totals = manifest.Totals()
        refs = []
        members = list(self._members.values())
        for member in members:
            totals += member.finish()
            if member.ref is not None:
                refs.append(member.ref)
        _, pack_bytes = self._pages.flush()
        if self._warnings:
            facts = facts | {WARNINGS: list(self._warnings)}
        found = manifest.EpochManifest(
            self.group,
            self.epoch,
            self._attempt,
            self._created_s,
            tuple(refs),
            tuple(sorted({name for member in members for name in member.packs})),
            totals,
            pack_bytes + sum(ref.size_bytes for ref in refs),
            facts,
        )
        sealed = manifest.encode_epoch(found)
        self._age.check()
        self._put(sealed)
        self._seen = _Seen.COMMITTED
        return summary.of(found)

    def close(self) -> None:
        """Let go of everything; without a commit, remove what was written."""
        packs = self._packer.close()
        if self._seen is _Seen.PERHAPS_STILL:
            log.warning(
                "it is not known whether the epoch was committed; nothing of it was removed",
                extra={"group": self.group, "epoch": self.epoch},
            )
            return
        try:
            if self._seen is _Seen.NEVER:
                for name in self._members:
                    self._volume.delete(layout.member_name(self.group, self.epoch, name))
                for pack in packs:
                    self._volume.delete(pack)
            intents.withdraw(self._volume, self._attempt)
        except errors.VolumeError as exc:
            log.warning(
                "leftovers of the epoch stay on the volume until a prune",
                extra={"group": self.group, "epoch": self.epoch, "reason": exc.message},
            )

    def _put(self, sealed: bytes) -> None:
        name = layout.epoch_name(self.group, self.epoch)
        try:
            self._volume.put(name, sealed)
        except errors.BlobExists as exc:
            if self._volume.read(name) == sealed:
                return  # an earlier try of the volume's own succeeded
            raise errors.Conflict(
                f"epoch {self.epoch} of {self.group} was committed by somebody else",
                hint="dump again",
            ) from exc
        except errors.VolumeError:
            # It may be visible all the same (a reply that was lost), and somebody may have begun
            # to build on it. So its packs stay for a prune to judge, and if even the name cannot
            # be removed, then everything stays.
            self._seen = _Seen.PERHAPS_STILL
            self._volume.delete(name)
            self._seen = _Seen.PERHAPS
            raise
