"""Reading an epoch whole and naming every part of it that is damaged.

Promises: every byte of every file that the epoch names is read and checked: digests, the plain
bytes' checksums, and that each page still has the tag by which later epochs find it. Goes on after
damage, so that the report is complete. The epoch is held meanwhile (``holding``).
Does not: repair. Packs that are found damaged are marked, so that later epochs do not build on
them (``suspects``); nothing else on the volume changes for good.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable
from concurrent import futures

from agent import errors
from agent.model.ids import EpochId, GroupName
from agent.store import (
    blocks,
    catalog,
    holding,
    layout,
    manifest,
    pack,
    pagetable,
    suspects,
    threads,
)
from agent.store.identity import Identity
from agent.volumes.base import Volume

_AHEAD = 16  # blocks being looked at, to bound memory

Progress = Callable[[int, int], None]


@dataclasses.dataclass(frozen=True)
class Damage:
    """One damaged part: the file on the volume, and what is wrong with it."""

    part: str
    problem: str


@dataclasses.dataclass(frozen=True)
class VerifyReport:
    """What was found; ``read_bytes`` of packs were read."""

    group: GroupName
    epoch: EpochId
    damaged: tuple[Damage, ...]
    read_bytes: int

    @property
    def good(self) -> bool:
        """Whether nothing is damaged."""
        return not self.damaged


def verify(
    volume: Volume, key: bytes, group: GroupName, epoch: EpochId, progress: Progress | None
) -> VerifyReport:
    """Verify one epoch. ``progress`` is told the bytes read so far, and all there are.

    Raises:
        errors.NotFound: there is no such epoch, or it was deleted meanwhile: that is no damage.
        errors.VolumeGone: the volume went away; nothing can be said then.
    """
    return _Verification(volume, key, progress).run(group, epoch)


class _Verification:
    def __init__(self, volume: Volume, key: bytes, progress: Progress | None) -> None:
        self._volume = volume
        self._key = key
        self._progress = progress
        self._damaged: list[Damage] = []
        self._read_bytes = 0
        self._whole: set[str] = set()  # packs of which everything was looked at
        self._per_thread = threading.local()

    def run(self, group: GroupName, epoch: EpochId) -> VerifyReport:
        try:
            found = catalog.read_epoch(self._volume, group, epoch)
        except errors.BlobNotFound as exc:
            raise errors.NotFound(f"there is no epoch {epoch} of {group}") from exc
        except (errors.DataError, errors.VolumeError) as exc:
            self._note(layout.epoch_name(group, epoch), exc)
        else:
            with holding.hold(self._volume, group, epoch, found.packs):
                self._blocks(self._indexes(found))
                if self._damaged and not catalog.exists(self._volume, group, epoch):
                    raise errors.NotFound(
                        f"epoch {epoch} of {group} was deleted while it was read",
                        hint="list shows what there is",
                    )
                self._remember(found.packs)
        return VerifyReport(group, epoch, tuple(self._damaged), self._read_bytes)

    def _note(self, part: str, exc: errors.CkptError) -> None:
        if isinstance(exc, errors.VolumeGone):
            raise exc
        self._damaged.append(Damage(part, exc.message))

    def _remember(self, packs: tuple[str, ...]) -> None:
        """Keep later epochs from building on damaged packs, and from avoiding good ones."""
        problems = {damage.part: damage.problem for damage in reversed(self._damaged)}
        known = suspects.known(self._volume)
        for name in packs:
            if name in problems and name not in known:
                suspects.mark(self._volume, name, problems[name])
            elif name in known and name not in problems and name in self._whole:
                suspects.clear(self._volume, name)

    def _indexes(
        self, found: manifest.EpochManifest
    ) -> list[tuple[manifest.PackRef, pack.PackIndex]]:
        """Verify all small files; return the packs whose blocks can be looked at."""
        refs: dict[manifest.PackRef, None] = {}
        for ref in found.members:
            part = layout.member_name(found.group, found.epoch, ref.member)
            try:
                member = catalog.read_member(self._volume, found, ref.member)
                refs.update(dict.fromkeys(member.packs))
                _check_tables(member, part)
            except (errors.DataError, errors.VolumeError) as exc:
                self._note(part, exc)
        readable = []
        for pack_ref in refs:
            try:
                readable.append((pack_ref, catalog.read_pack_index(self._volume, pack_ref)))
            except (errors.DataError, errors.VolumeError) as exc:
                self._note(pack_ref.name, exc)
        return readable

    def _blocks(self, packs: list[tuple[manifest.PackRef, pack.PackIndex]]) -> None:
        total = sum(int(index.stored_bytes.sum()) for _, index in packs)
        done = 0
        with futures.ThreadPoolExecutor(threads.workers(), "ckpt-verify") as pool:
            for ref, index in packs:
                table = blocks.BlockTable(ref, index)
                count = len(index.block_pages)
                for start in range(0, count, _AHEAD):
                    batch = range(start, min(start + _AHEAD, count))
                    jobs = [pool.submit(self._block, table, index, block) for block in batch]
                    for block, job in zip(batch, jobs, strict=True):
                        done += int(index.stored_bytes[block])
                        try:
                            self._read_bytes += job.result()
                        except (errors.DataError, errors.VolumeError) as exc:
                            self._note(ref.name, exc)
                    if self._progress is not None:
                        self._progress(done, total)
                self._whole.add(ref.name)

    def _block(self, table: blocks.BlockTable, index: pack.PackIndex, block: int) -> int:
        pages = table.load(self._volume, block)
        identity = getattr(self._per_thread, "identity", None)
        if identity is None:
            identity = self._per_thread.identity = Identity(self._key)
        first, count = table.starts[block], int(table.block_pages[block])
        if (identity.tags(memoryview(pages)) != index.tags[first : first + count]).any():
            raise errors.Corrupt(f"block {block} of {table.name} holds other pages than its index")
        return int(table.stored_bytes[block])


def _check_tables(member: manifest.MemberManifest, part: str) -> None:
    sizes = [ref.pages for ref in member.packs]
    try:
        for _, table in member.spaces:
            pagetable.decode(table, sizes)
        for stream in member.streams():
            pagetable.decode_stream(stream.table, sizes, stream.size_bytes)
    except errors.Corrupt as exc:
        raise errors.Corrupt(f"{part}: {exc.message}", part=part) from exc
