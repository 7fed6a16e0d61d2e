"""A checkpoint archive becomes a member's image: pages as pages, everything else as metadata.

Promises: the sink gets what the ``container`` engine would have given it of the same processes:
memory as runs in the order of CRIU's page maps, so that equal pages are stored once whichever
engine saw them; CRIU's other images under CRIU's names; the runtime's parts (``spec.dump``, ...)
under theirs; what changed in the root file system as ``model.container`` says. Every page file is
used once and to its last byte. Memory does not grow with the container's but for the list of
members.
Does not: restore, or look into parts that only a restore needs.
"""

from __future__ import annotations

import dataclasses
import re
import struct
from collections.abc import Callable, Iterator
from typing import Any

from google.protobuf.message import DecodeError

from agent.engines.criu import images, tcpends
from agent.engines.kubelet import imagefacts, layer
from agent.engines.kubelet.archive import (
    CONFIG,
    DELETED,
    LOG,
    ROOTFS_DIFF,
    SPEC,
    STATS,
    STATUS,
    Archive,
)
from agent.engines.kubelet.tarindex import Member, corrupt
from agent.model import container
from agent.model.streams import (
    PAGE_BYTES,
    AddressSpace,
    FileEntry,
    MemberSink,
    PageRun,
    SpaceKind,
)

# No leading zeros: two names must not be one address space.
_NUMBER = r"(0|[1-9][0-9]{0,18})"
_PAGEMAP = re.compile(rf"pagemap-(shmem-)?{_NUMBER}\.img")
_PAGES = re.compile(rf"pages-{_NUMBER}\.img")
_MEMORY = re.compile(rf"{_PAGEMAP.pattern}|{_PAGES.pattern}")
# As large as the page server's pieces: few system calls, still in a core's cache level.
_PIECE_BYTES = 2 << 20
# An image of all descriptors or mappings of a container; the limit only bounds damage.
_IMAGE_BYTES = 256 << 20
# criu/include/magic.h and images/pagemap.proto
_FRAME = struct.Struct("<II")
_LENGTH = struct.Struct("<I")
_PAGEMAP_MAGIC = (0x54564319, 0x56084025)
_RECORD_BYTES = 1 << 10
_DIFF_ENTRY = FileEntry(container.ROOTFS_DIFF, "file", 0o100600, 0, 0, 0, 0, "include")
# criu/include/pagemap.h
_PE_PARENT = 1
_PE_LAZY = 2
_PE_PRESENT = 4
# Addresses of user space end below 2^57 with five-level page tables; shared objects start at 0.
_ADDRESS_END = 1 << 57


@dataclasses.dataclass(frozen=True)
class Taken:
    """What was taken from an archive. Sizes are bytes; ``facts`` are what the sink was given."""

    memory_bytes: int
    metadata_bytes: int
    pids: tuple[int, ...]
    facts: dict[str, Any]


def ingest(
    source: Archive,
    sink: MemberSink,
    node_facts: dict[str, Any],
    check: Callable[[], None] = lambda: None,
) -> Taken:
    """Give all of ``source`` to ``sink``; ``node_facts`` (what kernel and CPU it ran on) go into
    the facts; ``check`` is called often and gives up by raising.

    Raises:
        errors.Corrupt: the archive cannot be used. What the sink has by then is worthless.
        errors.VolumeError: from the sink.
    """
    return _Ingest(source, sink, check).run(node_facts)


class _Ingest:
    def __init__(self, source: Archive, sink: MemberSink, check: Callable[[], None]) -> None:
        self._source = source
        self._sink = sink
        self._check = check
        self._pages_left: dict[int, Member] = {}
        self._pages_of: dict[AddressSpace, int] = {}
        self._metadata_bytes = 0

    def run(self, node_facts: dict[str, Any]) -> Taken:
        # First what is small, so that a useless archive costs nothing.
        facts = self._facts()
        diff = self._source.parts.get(ROOTFS_DIFF)
        deleted = self._source.parts.get(DELETED)
        checked = layer.check(self._source, diff, deleted, self._check)
        self._memory()
        for name, member in sorted(self._source.images.items()):
            if name not in (STATS, LOG) and not _MEMORY.fullmatch(name):
                self._metadata(name, member)
        for name in self._source.kept_parts:
            self._metadata(name, self._source.parts[name])
        if diff or deleted:
            self._check()
            converted = layer.converted(self._source, diff, checked, self._check)
            self._sink.file(_DIFF_ENTRY, converted)
        for process in facts["processes"]:
            process["memory"] = {
                "anon_bytes": self._pages_of.get(AddressSpace("process", process["pid"]), 0)
                * PAGE_BYTES
            }
        facts = {
            "layout": container.LAYOUT,
            **node_facts,
            **facts,
            "spaces": [[space.kind, space.id] for space in self._pages_of],
            "rootfs": _about(checked) if diff or deleted else None,
            "volumes": [],
            "archive_parts": self._source.kept_parts,
        }
        self._sink.facts(facts)
        return Taken(
            sum(self._pages_of.values()) * PAGE_BYTES,
            self._metadata_bytes,
            tuple(each["pid"] for each in facts["processes"]),
            facts,
        )

    def image(self, name: str) -> bytes:
        """See ``imagefacts.Source``."""
        member = self._source.images.get(name)
        if member is None:
            raise corrupt(f"it has no {name}")
        return self._source.read(member, _IMAGE_BYTES)

    def _facts(self) -> dict[str, Any]:
        stdio = self._source.images.get(imagefacts.DESCRIPTORS)
        tree = imagefacts.of_tree(self)
        about = imagefacts.of_container(
            self._source.json(SPEC),
            self._source.json(CONFIG),
            self._source.json(STATUS),
            imagefacts.streams(self._source.read(stdio, _IMAGE_BYTES)) if stdio else [],
        )
        about["capabilities"] = tree.pop("capabilities")
        return {**tree, "container": about, "tcp_ends": self._tcp_ends()}

    def _tcp_ends(self) -> list[dict[str, Any]]:
        name = "files.img"
        entries = images.load("files", name, self.image(name), images.messages.file_entry)
        return [dataclasses.asdict(end) for end in tcpends.of(entries, self._head)]

    def _head(self, name: str) -> bytes | None:
        member = self._source.images.get(name)
        return self._source.stream(member).read(tcpends.HEAD_BYTES) if member else None

    def _metadata(self, name: str, member: Member) -> None:
        self._check()
        self._metadata_bytes += member.size_bytes
        self._sink.metadata(name, self._source.stream(member))

    def _memory(self) -> None:
        maps: list[tuple[AddressSpace, Member]] = []
        for name, member in self._source.images.items():
            if found := _PAGEMAP.fullmatch(name):
                kind: SpaceKind = "shmem" if found[1] else "process"
                maps.append((AddressSpace(kind, int(found[2])), member))
            elif found := _PAGES.fullmatch(name):
                if member.size_bytes % PAGE_BYTES:
                    raise corrupt(f"{name} does not consist of pages")
                self._pages_left[int(found[1])] = member
        buffer = memoryview(bytearray(_PIECE_BYTES))
        for space, member in sorted(maps, key=_order):
            self._pages_of[space] = self._space(space, member, buffer)
        if self._pages_left:
            raise corrupt(f"no page map belongs to pages-{min(self._pages_left)}.img")

    def _space(self, space: AddressSpace, member: Member, buffer: memoryview) -> int:
        """Give the sink one address space; return how many pages it has."""
        records = self._records(member)
        head = next(records, None)
        if head is None:
            raise corrupt(f"{member.name} is empty")
        pages_id = _parsed(member, images.messages.pagemap_head, head).pages_id
        pages = self._pages_left.pop(pages_id, None)
        if pages is None:
            raise corrupt(f"{member.name} has no pages-{pages_id}.img of its own")
        content = _Pages(self._source, pages, buffer)
        next_address = 0
        for record in records:
            run = _run(member, record)
            if run.address < next_address:
                raise corrupt(f"{member.name} is out of order")
            next_address = run.address + run.pages * PAGE_BYTES
            address, left = run.address, run.pages
            while left:
                self._check()
                data = content.next(left)
                count = len(data) // PAGE_BYTES
                self._sink.pages(space, PageRun(address, count, run.flags), data)
                address += len(data)
                left -= count
        return content.finish()

    def _records(self, member: Member) -> Iterator[bytes]:
        """The records of an image, one by one: page maps of large containers are large."""
        stream = self._source.stream(member)
        if stream.read(_FRAME.size) != _FRAME.pack(*_PAGEMAP_MAGIC):
            raise corrupt(f"{member.name} is not what CRIU writes")
        while size := stream.read(_LENGTH.size):
            if len(size) != _LENGTH.size:
                raise corrupt(f"{member.name} is cut short")
            (length,) = _LENGTH.unpack(size)
            record = stream.read(length) if length <= _RECORD_BYTES else b""
            if len(record) != length:
                raise corrupt(f"{member.name} is cut short")
            yield record


class _Pages:
    """The pages of a page file in order, through a buffer."""

    def __init__(self, source: Archive, member: Member, buffer: memoryview) -> None:
        self._source = source
        self._member = member
        self._buffer = buffer
        self._ready = buffer[:0]
        self._at = 0

    def next(self, pages: int) -> memoryview:
        """At least one and at most ``pages`` pages; valid until the next call."""
        if not self._ready:
            left = self._member.size_bytes - self._at
            if not left:
                raise corrupt(f"{self._member.name} is cut short")
            self._ready = self._buffer[: min(left, len(self._buffer))]
            self._source.fill(self._member, self._at, self._ready)
            self._at += len(self._ready)
        data = self._ready[: pages * PAGE_BYTES]
        self._ready = self._ready[len(data) :]
        return data

    def finish(self) -> int:
        """The number of pages, all of which must have been used."""
        if self._ready or self._at != self._member.size_bytes:
            raise corrupt(f"{self._member.name} has pages that are in no page map")
        return self._at // PAGE_BYTES


def _about(checked: layer.Layer) -> dict[str, Any]:
    """What a restore reads of a tar; as the ``container`` engine."""
    return {
        "name": container.ROOTFS_DIFF,
        "entries": checked.entries,
        "content_bytes": checked.content_bytes,
        "skipped": list(checked.skipped),
    }


def _order(each: tuple[AddressSpace, Member]) -> tuple[bool, int]:
    """Processes before shared memory, as CRIU dumps them."""
    return each[0].kind == "shmem", each[0].id


def _parsed(member: Member, make: Callable[[], Any], record: bytes) -> Any:
    message = make()
    try:
        message.ParseFromString(record)
    except DecodeError as exc:
        raise corrupt(f"{member.name} is not what CRIU writes") from exc
    if not message.IsInitialized():
        raise corrupt(f"{member.name} is not what CRIU writes")
    return message


def _run(member: Member, record: bytes) -> PageRun:
    entry = _parsed(member, images.messages.pagemap_entry, record)
    # Before 4.2 the count was the 32-bit one; since then that one is 0 or the same.
    pages = entry.nr_pages if entry.HasField("nr_pages") else entry.compat_nr_pages
    flags = entry.flags if entry.HasField("flags") else _PE_PRESENT
    if entry.in_parent or flags & _PE_PARENT:
        raise corrupt(f"{member.name} needs the images of an earlier dump")
    if flags not in (_PE_PRESENT, _PE_PRESENT | _PE_LAZY):
        raise corrupt(f"{member.name} has a run with flags {flags:#x}")
    end = entry.vaddr + pages * PAGE_BYTES
    if not pages or entry.vaddr % PAGE_BYTES or end > _ADDRESS_END:
        raise corrupt(f"{member.name} has a run of {pages} pages at {entry.vaddr:#x}")
    return PageRun(entry.vaddr, pages, flags)
