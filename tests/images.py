"""Small images to store and to compare with what comes back.

An image is plain data, so that a dictionary is the model of a store. Pages are named by small
numbers: equal numbers are equal pages, 0 is the zero page.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import io
from collections.abc import Mapping
from typing import Any

from agent.model import ids
from agent.model.ids import MemberName
from agent.model.streams import PAGE_BYTES, AddressSpace, FileEntry, PageRun
from agent.store import intents, layout
from agent.store.repository import EpochReader, EpochWriter, JointWriter, MemberReader
from agent.volumes.base import Volume

NOW_S = 1_790_000_000.0
GROUP = ids.group_name("group")
MEMBER = ids.member_name("member")

EMPTY = [layout.RESERVE, layout.STORE]  # the files of a store without epochs

Runs = tuple[tuple[int, int, tuple[int, ...]], ...]  # first page, flags, pages by number


@functools.lru_cache(4096)
def page(number: int) -> bytes:
    """A page that is half noise, so that it compresses like memory; page 0 is zero."""
    if number == 0:
        return bytes(PAGE_BYTES)
    noise = hashlib.shake_128(number.to_bytes(8, "little")).digest(PAGE_BYTES // 2)
    return noise + number.to_bytes(8, "little") * (PAGE_BYTES // 16)


@dataclasses.dataclass(frozen=True)
class MemberImage:
    """What one member holds."""

    spaces: Mapping[AddressSpace, Runs] = dataclasses.field(default_factory=dict)
    metadata: Mapping[str, bytes] = dataclasses.field(default_factory=dict)
    files: Mapping[str, bytes] = dataclasses.field(default_factory=dict)
    facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)


Image = Mapping[MemberName, MemberImage]


def simple(first: int = 1, pages: int = 40) -> Image:
    """One member with one process, whose pages are numbered from ``first``."""
    numbers = tuple(range(first, first + pages))
    space = AddressSpace("process", 7)
    member = MemberImage(
        {space: ((16, 1, numbers[: pages // 2]), (1 << 30, 2, (*numbers[pages // 2 :], 0, 0)))},
        {"core-7.img": b"registers", "empty.img": b""},
        {"/data/log": b"line\n" * 3000},
        {"engine": "test"},
    )
    return {MEMBER: member}


def file_entry(path: str) -> FileEntry:
    return FileEntry(path, "file", 0o100600, 1, 2, 3, 0, "open", xattrs=(("user.x", b"\0\xff"),))


def write(epoch: EpochWriter | JointWriter, image: Image) -> None:
    """Write all members, run by run, without committing."""
    for name, member in image.items():
        sink = epoch.member(name)
        for space, runs in member.spaces.items():
            for first, flags, numbers in runs:
                data = bytearray(b"".join(map(page, numbers)))
                sink.pages(
                    space, PageRun(first * PAGE_BYTES, len(numbers), flags), memoryview(data)
                )
                data[:] = b"\xaa" * len(data)  # a sink must not look at it any more
        for file_name, content in member.metadata.items():
            sink.metadata(file_name, io.BytesIO(content))
        for path, content in member.files.items():
            sink.file(file_entry(path), io.BytesIO(content))
        sink.file(FileEntry("/data", "directory", 0o40755, 0, 0, 0, 0, "include"), None)
        sink.facts(dict(member.facts))


def bury(volume: Volume, attempt: str) -> None:
    """Have an attempt announced by a process of this machine that has ended."""
    name = layout.intent_name(attempt)
    intent = intents.decode(volume.read(name), attempt)
    me = intents.Owner.myself()
    dead = dataclasses.replace(me, start_ticks=me.start_ticks + 1)
    volume.delete(name)
    intents.announce(volume, dataclasses.replace(intent, owner=dead))


def memory(runs: Runs) -> dict[int, tuple[int, int]]:
    """Each page's flags and number, by page number."""
    return {
        first + at: (flags, number)
        for first, flags, numbers in runs
        for at, number in enumerate(numbers)
    }


def assert_member(source: MemberReader, expected: MemberImage) -> None:
    """Everything that a source gives is what was stored."""
    source.check()
    assert source.facts() == expected.facts
    assert source.spaces() == [space for space, runs in expected.spaces.items() if runs]
    for space in source.spaces():
        wanted = memory(expected.spaces[space])
        flags = {
            run.address // PAGE_BYTES + at: run.flags
            for run in source.runs(space)
            for at in range(run.pages)
        }
        assert flags == {number: flag for number, (flag, _) in wanted.items()}
        seen = []
        for address, data, pages in source.read(space):
            assert data is None or len(data) == pages * PAGE_BYTES
            for at in range(pages):
                number = address // PAGE_BYTES + at
                seen.append(number)
                content = page(0) if data is None else data[at * PAGE_BYTES :][:PAGE_BYTES]
                assert content == page(wanted[number][1])
        assert seen == sorted(wanted)
    assert dict(source.metadata()) == expected.metadata
    entries = {entry.path: entry for entry in source.files()}
    assert set(entries) == {*expected.files, "/data"}
    for path, content in expected.files.items():
        assert b"".join(source.file_content(path)) == content
        assert entries[path] == dataclasses.replace(file_entry(path), size_bytes=len(content))


def assert_epoch(reader: EpochReader, expected: Image) -> None:
    """All members of an epoch are what was stored."""
    assert set(reader.members) == set(expected)
    for name, member in expected.items():
        assert_member(reader.member(name), member)
