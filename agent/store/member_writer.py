"""Takes the content of one member apart into pages and notes where each came to lie.

Promises: what ``model.streams.MemberSink`` promises; memory is a fixed buffer and about 40 bytes a
run. One thread at a time; several members of an epoch may be written at once.
Does not: decide which pages are new (``pages``), nor commit anything.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, BinaryIO

import numpy as np
from numpy import typing as npt

from agent import errors
from agent.model.ids import EpochId, GroupName, MemberName
from agent.model.streams import PAGE_BYTES, AddressSpace, FileEntry, PageRun
from agent.store import fields, layout, manifest, pagetable
from agent.store.digest import digest
from agent.store.drafts import Drafts
from agent.store.identity import Identity
from agent.store.pages import NO_ROW, EpochPages, Pages, Places, as_pages
from agent.store.recall import Recall
from agent.volumes.base import Volume

# Pages looked at in one step: enough to make numpy's calls cheap, few enough to stay in cache.
_STEP_PAGES = 512
# Of settled runs only numbers are moved.
_SETTLED_PAGES = 1 << 16
# Shorter runs are collected first; longer ones are taken from the caller's buffer as they are.
_DIRECT_PAGES = 64

MemberTotals = manifest.Totals
_Builder = pagetable.TableBuilder


class MemberWriter:
    """The sink of one member; see ``model.streams.MemberSink``."""

    def __init__(
        self, volume: Volume, pages: EpochPages, key: bytes, group: GroupName, epoch: EpochId,
        name: MemberName, base: EpochId | None = None,
    ) -> None:  # fmt: skip
        """``base`` is the epoch that the new one builds on."""
        self._volume = volume
        self._pages = pages
        self._identity = Identity(key)
        self._group = group
        self._epoch = epoch
        self.name = name
        self._recall = Recall(volume, group, base, name)
        self._spaces: dict[AddressSpace, _Builder] = {}
        self._drafts: dict[AddressSpace, Drafts] = {}
        self._metadata: dict[str, tuple[int, _Builder]] = {}
        self._files: dict[str, tuple[FileEntry, _Builder | None]] = {}
        self._facts: dict[str, Any] | None = None
        self._staged = np.empty((_STEP_PAGES, PAGE_BYTES), dtype=np.uint8)
        self._staged_pages = 0
        self._staged_runs: list[tuple[int, int, int]] = []
        self._staged_for: _Builder | None = None
        self._new_pages = 0
        self._stream_bytes = 0
        self.ref: manifest.MemberRef | None = None
        self.packs: tuple[str, ...] = ()
        self._totals = MemberTotals()

    def pages(self, space: AddressSpace, run: PageRun, data: memoryview) -> None:
        """Store a run of pages of an address space."""
        self._check_open()
        builder = self._spaces.setdefault(space, _Builder())
        first = _first_page(run)
        if len(data) != run.pages * PAGE_BYTES:
            raise errors.InvalidInput("a run of pages has a wrong length")
        if first < self._end(builder):
            raise errors.InvalidInput("runs of pages do not ascend within the address space")
        if not 0 <= run.flags <= pagetable.MAX_FLAGS:
            raise errors.InvalidInput("flags of a run of pages do not fit into 32 bits")
        pages = as_pages(data)
        if run.pages >= _DIRECT_PAGES:
            self._flush_staged()
            for at in range(0, run.pages, _STEP_PAGES):
                part = pages[at : at + _STEP_PAGES]
                self._place(builder, part, [(first + at, len(part), run.flags)])
            return
        if self._staged_for is not builder or self._staged_pages + run.pages > _STEP_PAGES:
            self._flush_staged()
            self._staged_for = builder
        self._staged[self._staged_pages : self._staged_pages + run.pages] = pages
        self._staged_pages += run.pages
        self._staged_runs.append((first, run.pages, run.flags))

    def draft(self, space: AddressSpace, runs: Sequence[PageRun], data: memoryview) -> None:
        """Store pages that may still change; see ``model.streams.MemberSink``."""
        self._check_open()
        numbers = [np.arange(run.pages) + _first_page(run) for run in runs]
        if sum(map(len, numbers)) * PAGE_BYTES != len(data):
            raise errors.InvalidInput("runs of pages have a wrong length")
        if not numbers:
            return
        page, pages = np.concatenate(numbers), as_pages(data)
        drafts = self._drafts.setdefault(space, Drafts())
        for at in range(0, len(page), _STEP_PAGES):
            part = pages[at : at + _STEP_PAGES]
            drafts.put(page[at : at + _STEP_PAGES], self._rows(part))

    def recall(self, epoch: str, space: AddressSpace) -> list[PageRun]:
        """Take what the base has in its place for drafts; see ``model.streams.MemberSink``."""
        self._check_open()
        if epoch != self._recall.epoch:
            return []
        drafts = self._drafts.setdefault(space, Drafts())
        taken = _Builder()
        packs = self._recall.packs
        for page, pack, ordinal in self._recall.pages(space):
            rows = self._pages.recalled(packs, pack, ordinal)
            known = rows != NO_ROW
            drafts.put(page[known], rows[known])
            # Only which ones: all that are neighbours are one run.
            nothing = np.zeros(len(rows), dtype=np.int64)[known]
            taken.add(page[known], nothing, nothing - 1)
        start, pages, _, _ = taken.runs().tolist()
        return [
            PageRun(first * PAGE_BYTES, count, 0) for first, count in zip(start, pages, strict=True)
        ]

    def settle(self, space: AddressSpace, runs: Sequence[PageRun]) -> None:
        """Take drafts for what they became; see ``model.streams.MemberSink``."""
        self._check_open()
        self._flush_staged()
        builder = self._spaces.setdefault(space, _Builder())
        drafts = self._drafts.get(space, Drafts())
        pages: list[npt.NDArray[np.int64]] = []
        flags: list[npt.NDArray[np.int64]] = []

        def add() -> None:
            page = np.concatenate(pages)
            builder.add(page, np.concatenate(flags), drafts.rows(page))
            pages.clear()
            flags.clear()

        end = builder.end
        collected = 0
        for run in runs:
            first = _first_page(run)
            if first < end or not 0 <= run.flags <= pagetable.MAX_FLAGS:
                raise errors.InvalidInput(
                    "settled runs do not ascend, or their flags are too large"
                )
            end = first + run.pages
            for at in range(first, end, _SETTLED_PAGES):
                pages.append(np.arange(at, min(at + _SETTLED_PAGES, end)))
                flags.append(np.full(len(pages[-1]), run.flags))
                collected += len(pages[-1])
                if collected >= _SETTLED_PAGES:
                    add()
                    collected = 0
        if pages:
            add()

    def metadata(self, name: str, content: BinaryIO) -> None:
        """Store an image file of the engine."""
        self._check_open()
        if not manifest.is_file_name(name) or name in self._metadata:
            raise errors.InvalidInput(f"metadata name {name!r} is impossible or was used before")
        size_bytes, builder = self._stream(content)
        if size_bytes > manifest.MAX_METADATA_BYTES:
            raise errors.InvalidInput(f"image file {name} is too large", name=name)
        self._metadata[name] = (size_bytes, builder)

    def file(self, entry: FileEntry, content: BinaryIO | None) -> None:
        """Store an ephemeral file. Its size is what was read, whatever the entry says."""
        self._check_open()
        if not manifest.is_absolute_path(entry.path) or entry.path in self._files:
            raise errors.InvalidInput(f"file {entry.path!r} is impossible or was stored before")
        if (entry.kind == "file") != (content is not None):
            raise errors.InvalidInput("a regular file needs content, and nothing else has any")
        if content is None:
            self._files[entry.path] = (entry, None)
            return
        size_bytes, builder = self._stream(content)
        entry = dataclasses.replace(entry, size_bytes=size_bytes)
        self._files[entry.path] = (entry, builder)

    def facts(self, facts: dict[str, Any]) -> None:
        """Store what is to be known of the member."""
        self._check_open()
        if self._facts is not None:
            raise errors.InvalidInput("facts of a member are given once")
        fields.encode(facts)
        self._facts = facts

    def finish(self) -> MemberTotals:
        """Make the member's image durable, still invisible; again: a no-op."""
        if self.ref is not None:
            return self._totals
        self._flush_staged()
        made, _ = self._pages.flush()
        found = self._manifest(made)
        sealed = manifest.encode_member(found)
        self._volume.put(layout.member_name(self._group, self._epoch, self.name), sealed)
        self._totals = found.totals
        self.packs = tuple(ref.name for ref in found.packs)
        self.ref = manifest.MemberRef(self.name, len(sealed), digest(sealed))
        return self._totals

    def _check_open(self) -> None:
        if self.ref is not None:
            raise errors.InvalidInput(f"member {self.name} is finished")

    def _end(self, builder: _Builder) -> int:
        if self._staged_for is builder and self._staged_runs:
            first, pages, _ = self._staged_runs[-1]
            return first + pages
        return builder.end

    def _stream(self, content: BinaryIO) -> tuple[int, _Builder]:
        """Store bytes as pages from 0."""
        self._flush_staged()
        builder = _Builder()
        size_bytes = 0
        room = self._staged.reshape(-1).data
        while filled := _fill(content, room):
            pages = -(-filled // PAGE_BYTES)
            room[filled : pages * PAGE_BYTES] = bytes(pages * PAGE_BYTES - filled)
            first = size_bytes // PAGE_BYTES
            self._place(builder, self._staged[:pages], [(first, pages, 0)])
            size_bytes += filled
            if filled < len(room):
                break
        self._stream_bytes += size_bytes
        return size_bytes, builder

    def _flush_staged(self) -> None:
        if self._staged_for is not None and self._staged_pages:
            part = self._staged[: self._staged_pages]
            self._place(self._staged_for, part, self._staged_runs)
        self._staged_pages = 0
        self._staged_runs = []
        self._staged_for = None

    def _place(self, builder: _Builder, pages: Pages, runs: list[tuple[int, int, int]]) -> None:
        rows = self._rows(pages)
        first, count, flags = np.array(runs, dtype=np.int64).T
        within = np.arange(len(pages)) - np.repeat(np.cumsum(count) - count, count)
        builder.add(np.repeat(first, count) + within, np.repeat(flags, count), rows)

    def _rows(self, pages: Pages) -> npt.NDArray[np.int64]:
        tags = self._identity.tags(pages.reshape(-1).data)
        rows, new = self._pages.place(pages, tags)
        self._new_pages += new
        return rows

    def _manifest(self, made: list[manifest.PackRef]) -> manifest.MemberManifest:
        builders = list(self._spaces.values())
        builders += [builder for _, builder in self._metadata.values()]
        builders += [builder for _, builder in self._files.values() if builder is not None]
        places = self._pages.places(made)
        used = np.zeros(len(places.refs), dtype=np.bool_)
        memory = np.zeros(2, dtype=np.int64)
        for number, builder in enumerate(builders):
            _, pages, _, row = builder.runs()
            used[places.packs(row[row >= 0])] = True
            if number < len(self._spaces):
                memory += pages.sum(), pages[row < 0].sum()
        tables = {id(builder): _encode(builder, places, used) for builder in builders}

        def stream(size_bytes: int, builder: _Builder | None) -> manifest.Stream | None:
            if builder is None:
                return None
            return manifest.Stream(size_bytes, tables[id(builder)])

        pages_count, zero_count = memory.tolist()
        totals = MemberTotals(
            pages_count * PAGE_BYTES + self._stream_bytes,
            self._new_pages * PAGE_BYTES,
            pages_count,
            zero_count,
        )
        return manifest.MemberManifest(
            self._group,
            self._epoch,
            self.name,
            tuple(ref for ref, needed in zip(places.refs, used, strict=True) if needed),
            tuple((space, tables[id(builder)]) for space, builder in self._spaces.items()),
            tuple(
                (name, manifest.Stream(size_bytes, tables[id(builder)]))
                for name, (size_bytes, builder) in self._metadata.items()
            ),
            tuple((entry, stream(entry.size_bytes, b)) for entry, b in self._files.values()),
            totals,
            self._facts or {},
        )


def _first_page(run: PageRun) -> int:
    first, odd = divmod(run.address, PAGE_BYTES)
    if odd or first < 0 or run.pages < 1 or first + run.pages > pagetable.MAX_PAGE:
        raise errors.InvalidInput("a run of pages has an odd address or an impossible length")
    return first


def _encode(builder: _Builder, places: Places, used: npt.NDArray[np.bool_]) -> bytes:
    """Return a table whose packs are numbered among those used."""
    start, pages, flags, row = builder.runs()
    stored = row >= 0
    pack = np.full(len(row), -1, dtype=np.int64)
    pack[stored] = places.packs(row[stored])
    ordinal = np.where(stored, row - places.first_rows[pack], 0) if len(used) else row * 0
    renumbered = np.append(np.cumsum(used) - 1, -1)  # the last one stands for zero pages
    return pagetable.encode(pagetable.Table(start, pages, flags, renumbered[pack], ordinal))


def _fill(content: BinaryIO, room: memoryview) -> int:
    """Read until ``room`` is full or the end comes; return how much there was."""
    filled = 0
    while filled < len(room) and (piece := content.read(len(room) - filled)):
        room[filled : filled + len(piece)] = piece
        filled += len(piece)
    return filled
