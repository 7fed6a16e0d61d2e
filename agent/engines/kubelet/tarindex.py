"""The headers of a tar file that nobody vouches for: what is in it and where, without its content.

A checkpoint archive comes from a node's directory or from a person; whoever wrote it may be
hostile. So this reader knows only what such archives need (ustar, PAX records for long names and
sizes, GNU long names, base-256 numbers) and refuses everything else instead of guessing.

Promises: reads headers only and seeks over content; memory is bounded by ``Limits``; every member's
content lies within the file and overlaps no other; a name is relative, normal and used once;
anything else is ``errors.Corrupt``, naming the member.
Does not: extract, follow links, or decompress.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from typing import BinaryIO, Literal

from agent import errors

BLOCK_BYTES = 512

Kind = Literal["file", "directory", "symlink", "hardlink", "device", "fifo"]

_REGULAR = (b"0", b"\0")
_KINDS: dict[bytes, Kind] = {
    b"1": "hardlink",
    b"2": "symlink",
    b"3": "device",
    b"4": "device",
    b"5": "directory",
    b"6": "fifo",
}
_PAX = b"x"
_GNU_NAME = b"L"
_GNU_LINK = b"K"
# What a writer may put after the two blocks of zeros that end an archive: GNU tar fills up to
# 10 KiB by default, others up to their own block size.
_PADDING_BYTES = 1 << 20
_NAME_BYTES = 4096
_READ_BYTES = 64 << 10


@dataclasses.dataclass(frozen=True)
class Limits:
    """What an archive may ask of its reader."""

    members: int = 100_000
    extension_bytes: int = 1 << 20
    content_bytes: int = 1 << 42


LIMITS = Limits()


@dataclasses.dataclass(frozen=True)
class Member:
    """One member: ``size_bytes`` of content at ``offset`` of the file. ``link`` is the target of a
    link as it was written, neither checked nor to be followed.
    """

    name: str
    kind: Kind
    offset: int
    size_bytes: int
    link: str = ""


def members(stream: BinaryIO, limits: Limits = LIMITS) -> list[Member]:
    """The members of the archive that ``stream`` holds from its beginning to its end. Offsets are
    positions of the stream, which need only be able to seek forward.

    Raises:
        errors.Corrupt: it is no such archive, is cut short, or has something in it that no
            checkpoint archive has.
    """
    found: list[Member] = []
    names: set[str] = set()
    left_bytes = limits.content_bytes
    for member in _Reader(stream, limits).members():
        if member.name in names:
            raise corrupt(f"{member.name!r} is in it twice")
        names.add(member.name)
        left_bytes -= member.size_bytes
        if left_bytes < 0:
            raise corrupt(f"it holds more than {limits.content_bytes} bytes")
        if len(found) >= limits.members:
            raise corrupt(f"it has more than {limits.members} members")
        found.append(member)
    return found


def corrupt(what: str) -> errors.Corrupt:
    """The error for an archive that cannot be used."""
    return errors.Corrupt(
        f"the checkpoint archive cannot be used: {what}",
        hint="take the checkpoint again, or copy the archive again from where it came from",
    )


@dataclasses.dataclass
class _Extension:
    """What the headers before a member said about it."""

    name: str | None = None
    link: str | None = None
    size_bytes: int | None = None

    @property
    def empty(self) -> bool:
        return self.name is None and self.link is None and self.size_bytes is None


class _Reader:
    def __init__(self, stream: BinaryIO, limits: Limits) -> None:
        self._stream = stream
        self._limits = limits
        self._at = 0

    def members(self) -> Iterator[Member]:
        extension = _Extension()
        while (header := self._block()) is not None:
            _check_sum(header)
            kind = header[156:157]
            size_bytes = _number(header[124:136])
            if kind in (_PAX, _GNU_NAME, _GNU_LINK):
                self._extend(extension, kind, self._extension_content(size_bytes))
                continue
            yield self._member(header, kind, size_bytes, extension)
            extension = _Extension()
        if not extension.empty:
            raise corrupt("it ends where a member should begin")
        self._check_end()

    def _block(self) -> bytes | None:
        """The next header; None at the block of zeros that ends an archive."""
        block = self._read(BLOCK_BYTES)
        return block if any(block) else None

    def _read(self, count_bytes: int) -> bytes:
        raw = self._stream.read(count_bytes)
        if len(raw) != count_bytes:
            raise corrupt("it is cut short")
        self._at += count_bytes
        return raw

    def _skip_content(self, size_bytes: int) -> None:
        # Behind the end of the file there is no next header, which is noticed then.
        if size_bytes > self._limits.content_bytes:
            raise corrupt(f"a member of {size_bytes} bytes")
        self._at += -(-size_bytes // BLOCK_BYTES) * BLOCK_BYTES
        self._stream.seek(self._at)

    def _extension_content(self, size_bytes: int) -> bytes:
        if size_bytes > self._limits.extension_bytes:
            raise corrupt(f"a header of {size_bytes} bytes")
        content = self._read(-(-size_bytes // BLOCK_BYTES) * BLOCK_BYTES)
        return content[:size_bytes]

    @staticmethod
    def _extend(extension: _Extension, kind: bytes, content: bytes) -> None:
        if kind == _GNU_NAME:
            extension.name = _text(content.rstrip(b"\0"))
        elif kind == _GNU_LINK:
            extension.link = _text(content.rstrip(b"\0"))
        else:
            for key, value in _pax_records(content):
                if key == "path":
                    extension.name = _text(value)
                elif key == "linkpath":
                    extension.link = _text(value)
                elif key == "size":
                    extension.size_bytes = _decimal(value)
                elif key.startswith("GNU.sparse."):
                    raise corrupt("a sparse member")

    def _member(
        self, header: bytes, raw_kind: bytes, size_bytes: int, extension: _Extension
    ) -> Member:
        raw_name = extension.name if extension.name is not None else _ustar_name(header)
        kind: Kind
        if raw_kind in _REGULAR:
            # Before POSIX a directory was a file whose name ends with a slash.
            kind = "directory" if raw_name.endswith("/") else "file"
        elif raw_kind in _KINDS:
            kind = _KINDS[raw_kind]
        else:
            raise corrupt(f"{raw_name!r} is of the unknown kind {raw_kind!r}")
        if extension.size_bytes is not None:
            size_bytes = extension.size_bytes
        if kind != "file" and size_bytes:
            raise corrupt(f"{raw_name!r} is a {kind} with content")
        offset = self._at
        self._skip_content(size_bytes)
        link = extension.link if extension.link is not None else _text(_field(header[157:257]))
        return Member(normal_name(raw_name, kind), kind, offset, size_bytes, link)

    def _check_end(self) -> None:
        """Only zeros may follow, at least one block of them, and not many."""
        left = _PADDING_BYTES
        self._read(BLOCK_BYTES)
        while piece := self._stream.read(min(left + 1, _READ_BYTES)):
            left -= len(piece)
            if any(piece) or left < 0:
                raise corrupt("something follows its end")


def normal_name(raw: str, kind: Kind) -> str:
    """``raw`` without a leading ``./`` and a directory's slash; "." for the root itself.

    Raises:
        errors.Corrupt: it is absolute, leads out, or is not normal.
    """
    name = raw
    while name.startswith("./"):
        name = name[2:]
    if kind == "directory":
        name = name.rstrip("/") if name.strip("/") else name
    if name in ("", ".") and kind == "directory" and not raw.startswith("/"):
        return "."
    if name.startswith("/"):
        raise corrupt(f"the name {raw!r} is absolute")
    if any(part in ("", ".", "..") for part in name.split("/")):
        raise corrupt(f"the name {raw!r} is not normal or leads out of the archive")
    if "\0" in name or len(os.fsencode(name)) > _NAME_BYTES:
        raise corrupt("a name is impossible")
    return name


def _check_sum(header: bytes) -> None:
    if header[257:262] != b"ustar":
        raise corrupt("a header is missing: it is not a tar file, is compressed, or is damaged")
    stated = _number(header[148:156])
    if stated != sum(header) - sum(header[148:156]) + 8 * ord(" "):
        raise corrupt("a header is damaged")


def _number(field: bytes) -> int:
    """An octal number, or one to the base 256 as GNU tar writes large ones."""
    if field[0] & 0x80:
        # 0xff would be a negative number, and more than 63 bits are no size.
        if field[0] != 0x80 or any(field[1:-8]):
            raise corrupt("a number in a header is impossible")
        value = int.from_bytes(field[-8:], "big")
        if value >= 1 << 63:
            raise corrupt("a number in a header is impossible")
        return value
    digits = field.strip(b" \0")
    if not digits:
        return 0
    if any(digit not in b"01234567" for digit in digits):
        raise corrupt("a number in a header is impossible")
    return int(digits, 8)


def _decimal(raw: bytes) -> int:
    if not raw.isdigit() or len(raw) > 18:
        raise corrupt("a size in a header is impossible")
    return int(raw)


def _field(raw: bytes) -> bytes:
    return raw.split(b"\0", 1)[0]


def _ustar_name(header: bytes) -> str:
    name, prefix = _field(header[:100]), b""
    if header[257:263] == b"ustar\0":  # GNU's own format has times there
        prefix = _field(header[345:500])
    return _text(prefix + b"/" + name if prefix else name)


def _text(raw: bytes) -> str:
    return os.fsdecode(raw)


def _pax_records(content: bytes) -> Iterator[tuple[str, bytes]]:
    """Lines of ``LENGTH KEY=VALUE``, the length counting all of the line."""
    at = 0
    while at < len(content):
        space = content.find(b" ", at, at + 20)
        length = content[at:space]
        if space < 0 or not length.isdigit():
            raise corrupt("a header is damaged")
        end = at + int(length)
        if end > len(content) or end <= space + 1 or content[end - 1 : end] != b"\n":
            raise corrupt("a header is damaged")
        key, equals, value = content[space + 1 : end - 1].partition(b"=")
        if not equals:
            raise corrupt("a header is damaged")
        yield key.decode("utf-8", "replace"), value
        at = end
