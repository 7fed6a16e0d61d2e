"""What every writer does: find a base, announce itself, take members in, make them durable.

Promises: no prune takes away what an announced attempt builds on or writes.
Does not: commit (``writer``, ``joint``).
"""

from __future__ import annotations

import threading

from agent import errors
from agent.model.ids import EpochId, GroupName, MemberName
from agent.store import baseline, catalog, intents, layout, manifest
from agent.store.identity import Identity
from agent.store.member_writer import MemberWriter
from agent.store.packing import Packer
from agent.store.pages import EpochPages
from agent.store.parts import Part
from agent.volumes.base import Volume

# How often the base of a beginning writer may vanish before something is really wrong.
_BASE_RACES = 16


def announce(
    volume: Volume, group: GroupName, attempt: str, *, joint: bool = False
) -> baseline.Baseline:
    """Choose a base and announce it, such that no prune can take its packs away.

    A prune lists intents after it has deleted manifests. So if the base is still there after the
    intent was put, then a prune that did not see the intent sees the base.

    Raises:
        errors.VolumeError: the volume failed.
        errors.Conflict: whatever it would build on is being deleted.
    """
    for _ in range(_BASE_RACES):
        base = baseline.load(volume, group)
        packs = tuple(pack.ref.name for pack in base.packs)
        owner = intents.Owner.myself()
        intent = intents.Intent(attempt, "write", owner, group, base.epoch, packs, joint)
        intents.announce(volume, intent)
        if base.epoch is None or catalog.exists(volume, group, base.epoch):
            return base
        intents.withdraw(volume, attempt)
    raise errors.Conflict(
        f"every epoch of {group} to build on is being deleted", hint="try again later"
    )


class Attempt:
    """One writer's work on an epoch of ``group``, called ``epoch``. Members may be written from
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
    ) -> None:
        self.group = group
        self.epoch = epoch
        self._volume = volume
        self._key = key
        self._attempt = attempt
        self._base = base.epoch
        self._warnings = base.warnings
        self._age = age
        self._members: dict[MemberName, MemberWriter] = {}
        self._lock = threading.Lock()
        self._sealed = False
        self._packs: list[str] | None = None
        self._packer = Packer(volume, attempt)
        self._pages = EpochPages(base, self._packer, Identity(key).zero)

    def member(self, name: MemberName) -> MemberWriter:
        """Begin a member of the epoch.

        Raises:
            errors.InvalidInput: the epoch has one of this name already, or is finished.
        """
        with self._lock:
            if self._sealed or name in self._members:
                raise errors.InvalidInput(f"member {name} cannot be added to epoch {self.epoch}")
            writer = MemberWriter(
                self._volume, self._pages, self._key, self.group, self.epoch, name, self._base
            )
            self._members[name] = writer
        return writer

    def _finish(self) -> Part:
        """Make all members durable; none can be added any more."""
        with self._lock:
            self._sealed = True
        totals = manifest.Totals()
        refs = []
        members = list(self._members.values())
        for member in members:
            totals += member.finish()
            if member.ref is not None:
                refs.append(member.ref)
        _, pack_bytes = self._pages.flush()
        self._age.check()
        return Part(
            self.group,
            self.epoch,
            self._attempt,
            tuple(refs),
            tuple(sorted({name for member in members for name in member.packs})),
            totals,
            pack_bytes + sum(ref.size_bytes for ref in refs),
            self._warnings,
        )

    def _stop(self) -> list[str]:
        """Let the threads go; return the names of all packs that may exist. Again: the same."""
        if self._packs is None:
            self._packs = self._packer.close()
        return self._packs

    def _delete(self, members: list[MemberName], packs: list[str]) -> None:
        """Delete what was written."""
        for name in members:
            self._volume.delete(layout.member_name(self.group, self.epoch, name))
        for pack in packs:
            self._volume.delete(pack)
