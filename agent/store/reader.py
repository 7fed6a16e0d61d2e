"""The reading half: an epoch's members, their memory, metadata and files, verified.

Promises: every byte returned matched a chain of digests that begins in the epoch's manifest;
memory is bounded but for page tables and what the caller asks for in one piece.
Does not: write, or offer another epoch where one is damaged.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from agent import errors
from agent.model.ids import EpochId, GroupName, MemberName
from agent.model.streams import PAGE_BYTES, AddressSpace, FileEntry, PageRun
from agent.store import blocks, catalog, layout, manifest, pagetable, summary
from agent.volumes.base import Volume

# Zero pages of a file are given out in pieces of this size; read only, so one is enough.
_ZEROS = bytes(1 << 20)


class EpochReader:
    """A committed epoch: its ``summary``, ``facts``, ``members`` and the names of its ``packs``."""

    def __init__(self, volume: Volume, group: GroupName, epoch: EpochId) -> None:
        """Read the epoch's manifest.

        Raises:
            errors.NotFound: there is no such epoch.
            errors.Corrupt | errors.UnknownFormat: its manifest cannot be used.
        """
        self._volume = volume
        try:
            self._manifest = catalog.read_epoch(volume, group, epoch)
        except errors.BlobNotFound as exc:
            raise errors.NotFound(
                f"there is no epoch {epoch} of {group}", hint="list shows what there is"
            ) from exc
        self.summary = summary.of(self._manifest)
        self.facts: dict[str, Any] = self._manifest.facts
        self.packs = tuple(self._manifest.packs)
        self.members: tuple[MemberName, ...] = self.summary.members

    def member(self, name: MemberName, *, parties: int = 1) -> MemberReader:
        """Open a member's image; of so many that are read at the same time, which share what
        memory reading takes.

        Raises:
            errors.NotFound: the epoch has none of this name.
            errors.Missing | errors.Corrupt | errors.UnknownFormat: its manifest cannot be used.
        """
        if name not in self.members:
            raise errors.NotFound(
                f"epoch {self.summary.epoch} has no member {name}",
                hint=f"it has {', '.join(self.members)}",
            )
        found = catalog.read_member(self._volume, self._manifest, name)
        return MemberReader(self._volume, found, limits=blocks.Limits.among(parties))


class MemberReader:
    """The source of one member; see ``model.streams.MemberSource``."""

    def __init__(
        self,
        volume: Volume,
        found: manifest.MemberManifest,
        *,
        ahead: bool = True,
        limits: blocks.Limits | None = None,
        tables: dict[int, blocks.BlockTable] | None = None,
    ) -> None:
        self._volume = volume
        self._manifest = found
        self._part = layout.member_name(found.group, found.epoch, found.member)
        self._pack_pages = [ref.pages for ref in found.packs]
        self._limits = limits
        self._blocks = blocks.BlockSource(
            volume, found.packs, ahead=ahead, limits=limits, tables=tables
        )
        self._spaces = dict(found.spaces)
        self._metadata = dict(found.metadata)
        self._checked = self._present = False
        self._last_table: tuple[AddressSpace, pagetable.Table] | None = None
        self._files = {entry.path: stream for entry, stream in found.files}

    @property
    def totals(self) -> manifest.Totals:
        """What the member holds."""
        return self._manifest.totals

    def facts(self) -> dict[str, Any]:
        """What the sink was given."""
        return self._manifest.facts

    def metadata(self) -> Iterator[tuple[str, bytes]]:
        """All image files of the engine, in the order they were stored."""
        for name in self._metadata:
            yield name, self.metadata_file(name)

    def metadata_file(self, name: str) -> bytes:
        """One of them; raises ``errors.Missing`` if there is none of that name."""
        stream = self._metadata.get(name)
        if stream is None:
            raise errors.Missing(f"{self._part} has no image file {name!r}", part=self._part)
        return b"".join(self._content(stream))

    def files(self) -> Iterator[FileEntry]:
        """All ephemeral files, without their content."""
        for entry, _ in self._manifest.files:
            yield entry

    def file_content(self, path: str) -> Iterator[bytes]:
        """The content of one ephemeral file, in pieces of at most 1 MiB."""
        stream = self._files.get(path)
        if stream is None:
            raise errors.Missing(f"{self._part} has no content of {path!r}", part=self._part)
        return self._content(stream)

    def spaces(self) -> list[AddressSpace]:
        """All address spaces, in the order they were first stored."""
        return list(self._spaces)

    def runs(self, space: AddressSpace) -> list[PageRun]:
        """The runs of an address space, ascending, merged where neighbours have equal flags."""
        table = self._space(space)
        if not len(table):
            return []
        ends = table.start + table.pages
        apart = (table.start[1:] != ends[:-1]) | (table.flags[1:] != table.flags[:-1])
        heads = np.concatenate(([0], np.flatnonzero(apart) + 1))
        pages = np.add.reduceat(table.pages, heads)
        columns = (table.start[heads] * PAGE_BYTES, pages, table.flags[heads])
        return [PageRun(*run) for run in zip(*(c.tolist() for c in columns), strict=True)]

    def read(
        self, space: AddressSpace, runs: Sequence[PageRun] | None = None
    ) -> Iterator[tuple[int, memoryview | None, int]]:
        """Yield ``(address, data, pages)`` over ``runs`` or all; see ``MemberSource.read``."""
        table = self._space(space)
        if runs is not None:
            start = np.array([run.address // PAGE_BYTES for run in runs], dtype=np.int64)
            pages = np.array([run.pages for run in runs], dtype=np.int64)
            table = pagetable.clip(table, start, pages)
        for piece in self._blocks.pieces(table):
            yield piece.page * PAGE_BYTES, piece.pages, piece.count

    def check(self) -> None:
        """Read and verify every byte that a restore would need, without keeping it; once, for
        what is read later is verified then.
        """
        if self._checked:
            return
        tables = [self._table(table) for table in self._spaces.values()]
        tables += [self._stream_table(stream) for stream in self._streams()]
        self._blocks.verify(tables)
        self._checked = True

    def present(self) -> None:
        """Verify manifests and indexes, and that every pack is there in its full length; once."""
        if self._present:
            return
        for table in self._spaces.values():
            self._blocks.find(self._table(table))
        for stream in self._streams():
            self._blocks.find(self._stream_table(stream))
        self._present = True

    def beside(self) -> MemberReader:
        """Another reader of the same member, for another thread; for little at a time, without
        reading ahead.
        """
        tables = self._blocks.tables
        return MemberReader(
            self._volume, self._manifest, ahead=False, limits=self._limits, tables=tables
        )

    def _streams(self) -> list[manifest.Stream]:
        streams = (*self._metadata.values(), *self._files.values())
        return [stream for stream in streams if stream is not None]

    def _space(self, space: AddressSpace) -> pagetable.Table:
        """Return a space's table; the last one is kept, for callers that ask part by part."""
        if self._last_table is not None and self._last_table[0] == space:
            return self._last_table[1]
        encoded = self._spaces.get(space)
        if encoded is None:
            raise errors.Missing(
                f"{self._part} has no {space.kind} memory {space.id}", part=self._part
            )
        table = self._table(encoded)
        self._last_table = (space, table)
        return table

    def _table(self, encoded: bytes) -> pagetable.Table:
        try:
            return pagetable.decode(encoded, self._pack_pages)
        except errors.Corrupt as exc:
            raise errors.Corrupt(f"{self._part}: {exc.message}", part=self._part) from exc

    def _stream_table(self, stream: manifest.Stream) -> pagetable.Table:
        try:
            return pagetable.decode_stream(stream.table, self._pack_pages, stream.size_bytes)
        except errors.Corrupt as exc:
            raise errors.Corrupt(f"{self._part}: {exc.message}", part=self._part) from exc

    def _content(self, stream: manifest.Stream) -> Iterator[bytes]:
        left = stream.size_bytes
        for piece in self._blocks.pieces(self._stream_table(stream)):
            size_bytes = min(left, piece.count * PAGE_BYTES)
            left -= size_bytes
            if piece.pages is not None:
                yield bytes(piece.pages[:size_bytes])
                continue
            while size_bytes:
                zeros = _ZEROS[:size_bytes]
                size_bytes -= len(zeros)
                yield zeros
