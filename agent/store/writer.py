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
from collections.abc import Iterator
from typing import Any

from agent import errors
from agent.model.ids import EpochId, GroupName
from agent.store import (
    attempt,
    baseline,
    catalog,
    epoch_ids,
    intents,
    layout,
    manifest,
    parts,
    summary,
)
from agent.volumes.base import Volume

log = logging.getLogger(__name__)


@contextlib.contextmanager
def begin(volume: Volume, key: bytes, group: GroupName, *, now_s: float) -> Iterator[EpochWriter]:
    """Open a new epoch of ``group``; ``key`` is the store's page key, ``now_s`` wall time.

    Raises:
        errors.VolumeError: the volume failed.
        errors.Conflict: whatever it would build on is being deleted.
    """
    epoch = epoch_ids.next_epoch(catalog.names(volume, group), now_s)
    mine = epoch_ids.new_attempt(epoch)
    age = intents.Age()
    base = attempt.announce(volume, group, mine)
    writer = EpochWriter(volume, key, group, epoch, mine, base, age, now_s)
    del base  # its tags are in the writer's own index now
    try:
        yield writer
    finally:
        writer.close()


class _Seen(enum.Enum):
    """Whether others may have seen the epoch."""

    NEVER = enum.auto()
    PERHAPS = enum.auto()
    PERHAPS_STILL = enum.auto()
    COMMITTED = enum.auto()


class EpochWriter(attempt.Attempt):
    """An attempt that commits its epoch itself."""

    def __init__(
        self,
        volume: Volume,
        key: bytes,
        group: GroupName,
        epoch: EpochId,
        mine: str,
        base: baseline.Baseline,
        age: intents.Age,
        now_s: float,
    ) -> None:
        super().__init__(volume, key, group, epoch, mine, base, age)
        self._created_s = now_s
        self._seen = _Seen.NEVER

    def commit(self, facts: dict[str, Any]) -> summary.EpochSummary:
        """Finish all members and make the epoch restorable; durable when this returns.

        Raises:
            errors.VolumeError | errors.Conflict | errors.DeadlineExceeded: it is not committed.
            errors.InvalidInput: it has no members, or was committed before.
        """
        if self._seen is not _Seen.NEVER or not self._members:
            raise errors.InvalidInput("an epoch is committed once, with at least one member")
        found = parts.assemble(self._attempt, [self._finish()], facts, self._created_s)
        self._put(manifest.encode_epoch(found))
        self._seen = _Seen.COMMITTED
        return summary.of(found)

    def close(self) -> None:
        """Let go of everything; without a commit, remove what was written."""
        packs = self._stop()
        if self._seen is _Seen.PERHAPS_STILL:
            log.warning(
                "it is not known whether the epoch was committed; nothing of it was removed",
                extra={"group": self.group, "epoch": self.epoch},
            )
            return
        try:
            if self._seen is _Seen.NEVER:
                self._delete(list(self._members), packs)
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
                f"epoch {self.epoch} of {self.group} was decided by somebody else",
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
