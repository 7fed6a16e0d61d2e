"""Epochs that several writers on several machines write together, and that somebody commits.

Each writer makes its members durable and hands out a *part*; whoever has all parts commits the
epoch, exclusively, or anybody abandons it (``decisions``). A writer's intent stays until its
epoch is decided and the writer knows, whatever becomes of its process: until then somebody may
still commit what it wrote.

Promises: an epoch is committed only with every byte of its parts protected; what is handed out is
removed only after the epoch was abandoned; what never was, as soon as the writer ends.
Does not: decide by itself.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from typing import Any

from agent import errors
from agent.model.ids import EpochId, GroupName
from agent.model.protocol import Decision
from agent.store import (
    attempt,
    baseline,
    catalog,
    decisions,
    epoch_ids,
    intents,
    layout,
    manifest,
    parts,
    reserve,
    summary,
)
from agent.store.parts import Part
from agent.volumes.base import Volume

log = logging.getLogger(__name__)


@contextlib.contextmanager
def join(
    volume: Volume, key: bytes, group: GroupName, epoch: EpochId, *, now_s: float
) -> Iterator[JointWriter]:
    """Write members of an epoch that others write, too; ``key`` is the store's page key, ``now_s``
    wall time.

    Raises:
        errors.VolumeError: the volume failed.
        errors.Conflict: the epoch is decided already, or what it would build on is being deleted.
        errors.DeadlineExceeded: its name is older than a writer may become.
    """
    if now_s - epoch_ids.named_s(epoch) > intents.WRITER_LIMIT_S:
        raise errors.DeadlineExceeded(f"epoch {epoch} of {group} is too old", hint="dump again")
    mine = epoch_ids.new_attempt(epoch)
    age = intents.Age()
    try:
        base = attempt.announce(volume, group, mine, joint=True)
        # Only now: so no intent of a writer at work is younger than its epoch's abandonment.
        if decisions.decision(volume, group, epoch) is not None:
            raise errors.Conflict(f"epoch {epoch} of {group} is over", hint="dump again")
    except errors.CkptError:
        _withdraw(volume, mine)
        raise
    writer = JointWriter(volume, key, group, epoch, mine, base, age)
    del base  # its tags are in the writer's own index now
    try:
        yield writer
    finally:
        writer.close()


class JointWriter(attempt.Attempt):
    """An attempt whose epoch others commit or abandon."""

    def __init__(
        self,
        volume: Volume,
        key: bytes,
        group: GroupName,
        epoch: EpochId,
        mine: str,
        base: baseline.Baseline,
        age: intents.Age,
    ) -> None:
        super().__init__(volume, key, group, epoch, mine, base, age)
        self._part: Part | None = None
        self._over = False

    def finish(self) -> Part:
        """Make all members durable, still invisible, and hand them out; again: the same.

        Raises:
            errors.VolumeError | errors.DeadlineExceeded: this writer has no part in the epoch.
            errors.InvalidInput: it has no members, or was dropped.
        """
        if self._over or not self._members:
            raise errors.InvalidInput("a part of an epoch has at least one member")
        if self._part is None:
            self._part = self._finish()
        return self._part

    def keep(self) -> None:
        """The epoch is committed: nothing of it needs protection any more.

        Raises:
            errors.VolumeError: the volume failed; try again, or leave it to a prune.
        """
        if not self._over:
            intents.withdraw(self._volume, self._attempt)
            self._over = True

    def drop(self) -> None:
        """The epoch is not to be committed: see to it, and remove what was written.

        Raises:
            errors.Conflict: it is committed; everything stays, and ``keep`` is due.
            errors.VolumeError: the volume failed; try again, or leave it to a prune.
        """
        if self._over:
            return
        if self._part is not None:
            decided = decisions.abandon(self._volume, self.group, self.epoch, use_reserve=True)
            if decided is Decision.COMMITTED:
                raise errors.Conflict(f"epoch {self.epoch} of {self.group} is committed")
        packs = self._stop()
        # Another attempt may have a member of the same name, which is not to be touched.
        mine = [name for name, member in self._members.items() if member.ref is not None]
        self._delete(mine, packs)
        intents.withdraw(self._volume, self._attempt)
        self._over = True
        reserve.set_aside(self._volume)

    def close(self) -> None:
        """Let go of everything. What was not handed out is removed; what was, stays with its
        intent, unless ``keep`` or ``drop`` settled it.
        """
        self._stop()
        if self._over:
            return
        if self._part is not None:
            log.warning(
                "it is not known what became of the epoch; nothing of it was removed",
                extra={"group": self.group, "epoch": self.epoch},
            )
            return
        try:
            self.drop()
        except errors.VolumeError as exc:
            log.warning(
                "leftovers of the epoch stay on the volume until a prune",
                extra={"group": self.group, "epoch": self.epoch, "reason": exc.message},
            )


def commit(
    volume: Volume,
    group: GroupName,
    epoch: EpochId,
    given: Sequence[Part],
    facts: dict[str, Any],
    *,
    now_s: float,
) -> summary.EpochSummary:
    """Make an epoch of these parts restorable; durable when this returns. Again, by anybody: the
    same, if the parts are.

    Raises:
        errors.InvalidInput: the parts do not make this epoch.
        errors.Conflict: it was abandoned, committed with other parts, or a part was dropped.
        errors.DeadlineExceeded: a part is so old that it may be taken for dead.
        errors.VolumeError: it may be committed all the same; ``decisions.abandon`` tells.
    """
    found = parts.assemble(epoch_ids.new_attempt(epoch), given, facts, now_s)
    if (found.group, found.epoch) != (group, epoch):
        raise errors.InvalidInput(f"these are no parts of epoch {epoch} of {group}")
    owner = intents.Owner.myself()
    mine = intents.Intent(found.attempt, "write", owner, group, None, found.packs, joint=True)
    try:
        # As long as it is there, the epoch cannot be deleted under a commit that is on its way.
        intents.announce(volume, mine)
        return _put(volume, found, given, now_s)
    finally:
        _withdraw(volume, found.attempt)


def _put(
    volume: Volume, found: manifest.EpochManifest, given: Sequence[Part], now_s: float
) -> summary.EpochSummary:
    group, epoch = found.group, found.epoch
    decided = _decided(volume, found)
    if decided is not None:
        return decided
    for part in given:
        _check_protected(volume, part, now_s)
    try:
        volume.put(layout.epoch_name(group, epoch), manifest.encode_epoch(found))
    except errors.BlobExists as exc:
        decided = _decided(volume, found)
        if decided is None:
            raise errors.Conflict(f"epoch {epoch} of {group} was deleted meanwhile") from exc
        return decided
    return summary.of(found)


def _decided(volume: Volume, wanted: manifest.EpochManifest) -> summary.EpochSummary | None:
    """Return the epoch if it is committed with the same parts, None if it is not decided."""
    group, epoch = wanted.group, wanted.epoch
    decided = decisions.decision(volume, group, epoch)
    if decided is None:
        return None
    if decided is Decision.COMMITTED:
        there = catalog.read_epoch(volume, group, epoch)
        if _content(there) == _content(wanted):
            return summary.of(there)
    raise errors.Conflict(f"epoch {epoch} of {group} is {decided.value} already", hint="dump again")


def _content(of: manifest.EpochManifest) -> tuple[frozenset[manifest.MemberRef], tuple[str, ...]]:
    return frozenset(of.members), of.packs


def _check_protected(volume: Volume, part: Part, now_s: float) -> None:
    """Raise unless the part's intent is there, and for some time to come."""
    try:
        info = volume.info(layout.intent_name(part.attempt))
    except errors.BlobNotFound as exc:
        raise errors.Conflict(
            f"a part of epoch {part.epoch} of {part.group} was dropped", hint="dump again"
        ) from exc
    if now_s - info.modified_s > intents.WRITER_LIMIT_S:
        raise errors.DeadlineExceeded(
            f"a part of epoch {part.epoch} of {part.group} is too old", hint="dump again"
        )


def _withdraw(volume: Volume, mine: str) -> None:
    try:
        intents.withdraw(volume, mine)
    except errors.VolumeError as exc:
        # It protects what needs no protection, until a prune.
        log.warning("an intent stays on the volume until a prune", extra={"reason": exc.message})
