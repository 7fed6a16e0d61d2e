"""Removing epochs, and then every pack that nobody needs: safe beside writers and readers.

No locks and no clocks decide what is alive. The order of steps does: (1) delete manifests of
epochs, (2) list packs and members' manifests, (3) list intents, (4) list manifests of epochs, (5)
delete what was listed in 2 and is named neither in 3 nor in 4. A writer announces its base's packs
before it looks whether the base is still there, writes packs only then, and withdraws the intent
only after its commit; so at 3 or at 4 it is seen. Deleters exclude each other: each announces
itself, then looks for others; of two at once, at least one sees the other and gives up. What is
held by a reader is not deleted in step 1; one that comes later looks whether its epoch is still
there after it announced itself, and so its packs are named in 3. What a
joint writer left that died may still be committed by others: so its epoch is abandoned between 3
and 4, unless it is decided. FORMAT.md has the whole argument.

Promises: a crash or an error at any point loses nothing that is committed; what is left over goes
with the next prune. Where a manifest or an intent cannot be read, no pack is deleted.
Does not: rewrite packs; ``copyforward`` lets them die.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools

from agent import errors
from agent.host import clock
from agent.model import ids
from agent.model.ids import EpochId, GroupName
from agent.store import (
    catalog,
    decisions,
    epoch_ids,
    intents,
    layout,
    reserve,
    retention,
    summary,
)
from agent.volumes.base import BlobInfo, Volume

Image = tuple[GroupName, EpochId]


@dataclasses.dataclass(frozen=True)
class PruneReport:
    """What went, or would go, and what stayed. ``freed_bytes`` counts all files that went;
    ``leftovers`` are those of them that no epoch needed any more before. ``blocked`` says why no
    pack was removed, part by part, if so.
    """

    removed: tuple[Image, ...]
    kept: tuple[Image, ...]
    freed_bytes: int
    leftovers: int
    blocked: tuple[str, ...] = ()


def prune(
    volume: Volume,
    keep: retention.Retention,
    *,
    group: GroupName | None,
    now_s: float,
    dry_run: bool,
) -> PruneReport:
    """Remove what ``keep`` does not keep, of one group or of each, and all leftovers."""
    run = _Run(volume, now_s, dry_run)
    with run:
        expired: list[Image] = []
        of_group = itertools.groupby(catalog.summaries(volume, group), lambda found: found.group)
        for _, epochs in of_group:
            going: list[summary.EpochSummary] = retention.expired(list(epochs), keep, now_s)
            expired += [(found.group, found.epoch) for found in going]
        in_use = run.in_use(expired) | run.read(expired)
        return run.remove([image for image in expired if image not in in_use])


def delete(volume: Volume, group: GroupName, epoch: EpochId) -> PruneReport:
    """Remove one epoch, whether good or damaged, and all leftovers.

    Raises:
        errors.NotFound: there is none.
        errors.Conflict: its writers have not all heard that it is committed, or it is being read.
    """
    if not catalog.exists(volume, group, epoch):
        raise errors.NotFound(f"there is no epoch {epoch} of {group}")
    run = _Run(volume, clock.wall_s(), dry_run=False)
    with run:
        if run.in_use([(group, epoch)]):
            raise errors.Conflict(
                f"epoch {epoch} of {group} is still being finished by those who wrote it",
                hint="try again later",
            )
        if run.read([(group, epoch)]):
            raise errors.Conflict(
                f"epoch {epoch} of {group} is still being read, by a restore, an export or a"
                " verification",
                hint="try again when that is complete",
            )
        return run.remove([(group, epoch)])


class _Run:
    """One deleter, announced while its context lasts unless it only looks."""

    def __init__(self, volume: Volume, now_s: float, dry_run: bool) -> None:
        self._volume = volume
        self._now_s = now_s
        self._dry_run = dry_run
        self._age = intents.Age()
        self._here = intents.Owner.myself()
        self._attempt = epoch_ids.new_attempt(epoch_ids.next_epoch([], now_s))
        self._freed_bytes = 0
        self._leftovers = 0
        self._gone_packs: set[str] = set()

    def __enter__(self) -> None:
        if self._dry_run:
            return
        self._announce()
        try:
            self._exclude_others()
        except BaseException:
            intents.withdraw(self._volume, self._attempt)
            raise

    def __exit__(self, *_: object) -> None:
        if not self._dry_run:
            intents.withdraw(self._volume, self._attempt)
            reserve.set_aside(self._volume)

    def in_use(self, images: list[Image]) -> set[Image]:
        """Return which epochs somebody who wrote or commits them has still to do with. Of the
        others nothing is announced afterwards, so nobody can commit them again.
        """
        found = self._joined(images, stale=False)
        if self._dry_run:
            return {image for image, _ in found}
        for _, attempt in self._joined(images, stale=True) - found:
            intents.withdraw(self._volume, attempt)
        return {image for image, _ in self._joined(images, stale=True)}

    def read(self, images: list[Image]) -> set[Image]:
        """Return which epochs somebody who lives reads."""
        announced = intents.all_announced(self._volume)
        reading = [each for each in announced if not each.stale(self._here, self._now_s)]
        return {image for image in images if any(each.reads(*image) for each in reading)}

    def _joined(self, images: list[Image], *, stale: bool) -> set[tuple[Image, str]]:
        """Return the intents of these joint epochs; without ``stale``, living ones only."""
        return {
            (image, found.attempt)
            for found in intents.all_announced(self._volume)
            for image in images
            if found.joins(*image) and (stale or not found.stale(self._here, self._now_s))
        }

    def remove(self, going: list[Image]) -> PruneReport:
        """Do the five steps."""
        gone = set(going)
        had_packs, _ = self._live_packs(going)
        files = list(self._volume.list(layout.GROUPS))
        for image in going:
            self._delete_epoch(image, files)
        packs = list(self._volume.list(layout.PACKS))
        files = list(self._volume.list(layout.GROUPS))
        announced = intents.all_announced(self._volume)
        living = self._living(announced, gone)
        committed = [
            (found.group, found.epoch)
            for found in catalog.committed(self._volume)
            if (found.group, found.epoch) not in gone
        ]
        live_packs, blocked = self._live_packs(committed)
        live_attempts = {found.attempt for found in living}
        for found in living:
            if found.intent is None:
                blocked.append(f"{layout.intent_name(found.attempt)} cannot be read")
            else:
                live_packs.update(found.intent.packs)
        self._sweep_members(files, {*committed, *gone}, live_attempts)
        if not blocked:
            for info in packs:
                self._sweep_pack(info, live_packs, live_attempts, had_packs)
            self._sweep_suspects({info.name for info in packs})
        if not self._dry_run:
            if not blocked:
                self._sweep_announced(announced, live_attempts)
                self._sweep_abandonments(announced)
            self._volume.sweep(intents.STALE_S)
        return PruneReport(
            tuple(going), tuple(committed), self._freed_bytes, self._leftovers, tuple(blocked)
        )

    def _living(
        self, announced: list[intents.Announced], gone: set[Image]
    ) -> list[intents.Announced]:
        """Return the intents that protect what they name, other than this deleter's; of the rest
        nobody can make any use any more.
        """
        others = [found for found in announced if found.attempt != self._attempt]
        stale = [found for found in others if found.stale(self._here, self._now_s)]
        living = [found for found in others if found not in stale]
        alive = list(living)
        for found in stale:
            intent = found.intent
            if intent is None or not intent.joint or intent.group is None:
                continue
            image = (intent.group, layout.attempt_epoch(found.attempt))
            if image not in gone and not self._is_over(image, alive):
                living.append(found)
        return living

    def _is_over(self, image: Image, alive: list[intents.Announced]) -> bool:
        """Tell whether nobody can commit a joint epoch any more, or has done so; see to it if none
        of those who work on it is alive.
        """
        try:
            if decisions.decision(self._volume, *image) is not None:
                return True
            if any(found.joins(*image) for found in alive):
                return False
            if not self._dry_run:
                self._age.check()
                decisions.abandon(self._volume, *image, use_reserve=True)
        except errors.DataError:
            return True  # decided; what it needs is looked for with all epochs
        except errors.VolumeFull:
            return False
        return True

    def _announce(self) -> None:
        intent = intents.Intent(self._attempt, "delete", self._here)
        try:
            intents.announce(self._volume, intent)
        except errors.VolumeFull:
            reserve.give_up(self._volume)
            # If it is there after all, then because the first try succeeded.
            with contextlib.suppress(errors.BlobExists):
                intents.announce(self._volume, intent)

    def _exclude_others(self) -> None:
        for found in intents.all_announced(self._volume):
            other = found.intent is not None and found.intent.purpose == "delete"
            if other and found.attempt != self._attempt:
                if found.stale(self._here, self._now_s):
                    continue
                raise errors.Conflict(
                    "somebody else is removing epochs of this store",
                    hint="try again when that has ended",
                )

    def _delete_epoch(self, image: Image, files: list[BlobInfo]) -> None:
        """Delete an epoch's manifest first, so that it can never be seen half there."""
        group, epoch = image
        name = layout.epoch_name(group, epoch)
        folder = name.removesuffix("epoch")
        mine = [info for info in files if info.name.startswith(folder)]
        for info in sorted(mine, key=lambda info: info.name != name):
            self._delete(info)

    def _live_packs(self, committed: list[Image]) -> tuple[set[str], list[str]]:
        live: set[str] = set()
        blocked: list[str] = []
        for group, epoch in committed:
            try:
                live.update(catalog.read_epoch(self._volume, group, epoch).packs)
            except errors.BlobNotFound:
                # Only this deleter deletes: somebody removed the file by hand.
                continue
            except errors.DataError as exc:
                image = ids.image_name(group, epoch)
                blocked.append(f"{exc.message}; to go on, delete {image}")
        return live, blocked

    def _sweep_members(
        self, files: list[BlobInfo], known: set[Image], live_attempts: set[str]
    ) -> None:
        """Delete members' manifests of epochs that were never committed."""
        for info in files:
            found = layout.parse_group_file(info.name)
            if found is None or found.member is None or (found.group, found.epoch) in known:
                continue
            if not any(attempt.startswith(f"{found.epoch}-") for attempt in live_attempts):
                self._delete(info)
                self._leftovers += 1

    def _sweep_pack(
        self, info: BlobInfo, live_packs: set[str], live_attempts: set[str], had_packs: set[str]
    ) -> None:
        try:
            attempt = layout.pack_attempt(info.name)
        except errors.Corrupt:  # not ours: left alone
            return
        if info.name not in live_packs and attempt not in live_attempts:
            self._delete(info)
            self._gone_packs.add(info.name)
            self._leftovers += info.name not in had_packs

    def _sweep_suspects(self, packs: set[str]) -> None:
        """Delete the marks of damaged packs that are no more."""
        for info in list(self._volume.list(layout.SUSPECTS)):
            pack = layout.PACKS + info.name.removeprefix(layout.SUSPECTS)
            if pack not in packs or pack in self._gone_packs:
                self._delete(info)

    def _sweep_announced(self, announced: list[intents.Announced], live_attempts: set[str]) -> None:
        """Delete stale intents, after what they had protected is gone."""
        for found in announced:
            if found.attempt not in {self._attempt, *live_attempts}:
                intents.withdraw(self._volume, found.attempt)

    def _sweep_abandonments(self, announced: list[intents.Announced]) -> None:
        """Delete old abandonments of epochs that nobody has anything to do with."""
        at_work = {layout.attempt_epoch(found.attempt) for found in announced}
        for found, info in list(catalog.group_files(self._volume)):
            old = self._now_s - info.modified_s > intents.STALE_S
            if found.member is not None or not old or found.epoch in at_work:
                continue
            if decisions.listed_as_abandoned(self._volume, info, found.group, found.epoch):
                self._delete(info)

    def _delete(self, info: BlobInfo) -> None:
        self._freed_bytes += info.size_bytes
        if not self._dry_run:
            self._age.check()
            self._volume.delete(info.name)
