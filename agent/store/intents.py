"""What writers, readers and deleters announce, so that a prune spares what they use.

A writer's intent names the packs of its base that it may refer to, and by its attempt every pack
that it makes. A reader's intent names the image that it reads, and its packs (``holding``). A
deleter's intent lets two deleters notice each other. All are removed at the end; one whose process
died is *stale*. Whether it died is known on the same boot of the same host and
pid namespace, and elsewhere concluded from its age on the volume's clock.

Promises: an intent is never called stale while its process lives, as long as the process ends or
gives up within ``STALE_S``, a reader's ``READER_STALE_S``; writers refuse to commit after half of
that, and readers put theirs anew long before.
Does not: decide what is deleted; ``prune`` does.
"""

from __future__ import annotations

import dataclasses
import os
from typing import Literal, cast, get_args

from agent import errors
from agent.host import clock, proc, system
from agent.model import ids
from agent.model.ids import EpochId, GroupName
from agent.store import envelope, layout
from agent.store.fields import Fields, encode
from agent.volumes.base import Volume

# A day: longer than any dump, and short against what an abandoned one costs in space.
STALE_S = 24 * 3600.0
# The other half is room for clocks that differ and for a commit on its way.
WRITER_LIMIT_S = STALE_S / 2
# An image is not kept from going for longer than this by a reader elsewhere that died.
READER_STALE_S = 2 * 3600.0

Purpose = Literal["write", "delete", "read"]
_PURPOSES: tuple[str, ...] = get_args(Purpose)


@dataclasses.dataclass(frozen=True)
class Owner:
    """A process, and where its number means anything."""

    boot_id: str
    pid_namespace: int
    pid: int
    start_ticks: int

    @classmethod
    def myself(cls) -> Owner:
        """This process."""
        pid = os.getpid()
        me = proc.identity(pid)
        return cls(system.boot_id(), proc.namespaces(pid)["pid"], me.pid, me.start_ticks)

    def same_place(self, other: Owner) -> bool:
        """Tell whether the other's number means the same here."""
        return (self.boot_id, self.pid_namespace) == (other.boot_id, other.pid_namespace)


@dataclasses.dataclass(frozen=True)
class Intent:
    """What one attempt is up to. ``packs`` are those of its base, or of all that it commits; of a
    reader, ``base`` is what it reads.
    ``joint``: others may commit the epoch after this attempt's process has died.
    """

    attempt: str
    purpose: Purpose
    owner: Owner
    group: GroupName | None = None
    base: EpochId | None = None
    packs: tuple[str, ...] = ()
    joint: bool = False


@dataclasses.dataclass(frozen=True)
class Announced:
    """An intent as a listing finds it; ``intent`` is None if it cannot be read."""

    attempt: str
    modified_s: float
    intent: Intent | None

    def stale(self, here: Owner, now_s: float) -> bool:
        """Tell whether its process has certainly ended, or will do nothing more with it."""
        if self.intent is not None and self.intent.owner.same_place(here):
            owner = self.intent.owner
            if not proc.alive(proc.Identity(owner.pid, owner.start_ticks)):
                return True
        reads = self.intent is not None and self.intent.purpose == "read"
        return now_s - self.modified_s > (READER_STALE_S if reads else STALE_S)

    def joins(self, group: GroupName, epoch: EpochId) -> bool:
        """Tell whether it is of somebody who has to do with this joint epoch."""
        mine = self.intent is not None and self.intent.joint and self.intent.group == group
        return mine and layout.attempt_epoch(self.attempt) == epoch

    def reads(self, group: GroupName, epoch: EpochId) -> bool:
        """Tell whether it is of somebody who reads this epoch."""
        found = self.intent
        return found is not None and (found.purpose, found.group, found.base) == (
            "read",
            group,
            epoch,
        )


def announce(volume: Volume, intent: Intent) -> None:
    """Make an intent known; durable when this returns."""
    body = dataclasses.asdict(intent) | {"packs": list(intent.packs)}
    del body["joint"]
    sealed = envelope.seal(_kind(intent.joint), encode(body))
    volume.put(layout.intent_name(intent.attempt), sealed)


def withdraw(volume: Volume, attempt: str) -> None:
    """Remove an intent."""
    volume.delete(layout.intent_name(attempt))


def _kind(joint: bool) -> envelope.Kind:
    """A joint writer's intent is of a kind of its own: a version of this program that does not
    know about abandoning cannot read it, and so deletes no pack while it is young.
    """
    return envelope.Kind.JOINT_INTENT if joint else envelope.Kind.INTENT


def decode(sealed: bytes, attempt: str) -> Intent:
    """Return what was announced; raises ``errors.Corrupt`` or ``errors.UnknownFormat``."""
    part = layout.intent_name(attempt)
    joint = envelope.claims(envelope.Kind.JOINT_INTENT, sealed)
    body = Fields.parse(envelope.unseal(_kind(joint), sealed, part=part), part)
    purpose, packs = body.text("purpose"), tuple(body.texts("packs"))
    if body.text("attempt") != attempt or purpose not in _PURPOSES:
        raise errors.Corrupt(f"{part} is not what its name says", part=part)
    for name in packs:
        layout.pack_attempt(name)
    owner = Fields(body.mapping("owner"), part)
    try:
        group = ids.group_name(body.text("group")) if body.has("group") else None
        base = ids.epoch_id(body.text("base")) if body.has("base") else None
    except errors.InvalidInput as exc:
        raise errors.Corrupt(f"{part} names something impossible", part=part) from exc
    return Intent(
        attempt,
        cast(Purpose, purpose),
        Owner(
            owner.text("boot_id"),
            owner.integer("pid_namespace"),
            owner.integer("pid", least=1, most=1 << 31),
            owner.integer("start_ticks"),
        ),
        group,
        base,
        packs,
        joint,
    )


def all_announced(volume: Volume) -> list[Announced]:
    """Read every intent there is."""
    found = []
    for info in volume.list(layout.INTENTS):
        attempt = info.name.removeprefix(layout.INTENTS)
        if not layout.is_attempt(attempt):
            continue
        try:
            intent: Intent | None = decode(volume.read(info.name), attempt)
        except errors.BlobNotFound:
            continue
        except errors.DataError:
            intent = None
        found.append(Announced(attempt, info.modified_s, intent))
    return found


class Age:
    """How long an attempt has been going on, sleep included."""

    def __init__(self) -> None:
        self._begun_s = clock.boottime_s()

    def check(self) -> None:
        """Raise ``errors.DeadlineExceeded`` if the attempt may be taken for dead."""
        if clock.boottime_s() - self._begun_s > WRITER_LIMIT_S:
            raise errors.DeadlineExceeded(
                f"the epoch has been open for more than {WRITER_LIMIT_S / 3600:.0f} hours",
                hint="dump again; a prune may have removed what it builds on",
            )
