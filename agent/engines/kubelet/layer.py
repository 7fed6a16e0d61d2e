"""The difference of a container's root file system, as an archive carries it: a layer, that is a
tar with whiteouts, plain (CRI-O) or gzipped (containerd).

Promises: a layer that ``check`` let pass has only relative, normal names, hard links within itself
and nothing behind its end, and unpacks to at most ``LAYER_BYTES``.
Does not: apply it. Whoever does must still not follow the symbolic links in it.
"""

from __future__ import annotations

import gzip
import io
import os
import zlib
from typing import TYPE_CHECKING, BinaryIO, cast

from agent.engines.kubelet import tarindex
from agent.engines.kubelet.archive import Archive
from agent.engines.kubelet.tarindex import Member, corrupt

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

# The most that the store keeps as one image file.
LAYER_BYTES = 4 << 30
_GZIP = b"\x1f\x8b"
_BUFFER_BYTES = 256 << 10


def opened(source: Archive, member: Member) -> BinaryIO:
    """The layer's tar, unpacked; reading raises ``errors.Corrupt`` where it is damaged."""
    raw = source.stream(member)
    if member.size_bytes < len(_GZIP) or raw.read(len(_GZIP)) != _GZIP:
        return source.stream(member)
    raw.seek(0)
    return cast("BinaryIO", io.BufferedReader(_Unpacked(raw, member), _BUFFER_BYTES))


def check(source: Archive, member: Member) -> None:
    """Read the layer through.

    Raises:
        errors.Corrupt: it cannot be used, or would reach outside of a root file system.
    """
    if not member.size_bytes:
        return  # nothing changed
    if member.size_bytes > LAYER_BYTES:
        raise corrupt(f"{member.name} has {member.size_bytes} bytes")
    limits = tarindex.Limits(members=1_000_000, content_bytes=LAYER_BYTES)
    for each in tarindex.members(opened(source, member), limits):
        if each.kind == "hardlink":
            tarindex.normal_name(each.link, "file")


class _Unpacked(io.RawIOBase):
    """Unpacks gzip, forward only."""

    def __init__(self, raw: BinaryIO, member: Member) -> None:
        self._member = member
        self._stream = gzip.GzipFile(fileobj=raw, mode="rb")
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        if whence == os.SEEK_CUR:
            offset += self._at
        elif whence != os.SEEK_SET:
            raise io.UnsupportedOperation("the end is not known")
        if offset < self._at:
            raise io.UnsupportedOperation("only forward")
        room = bytearray(min(_BUFFER_BYTES, offset - self._at))
        while self._at < offset and self.readinto(memoryview(room)[: offset - self._at]):
            pass
        return offset

    def tell(self) -> int:
        return self._at

    def readinto(self, target: WriteableBuffer) -> int:
        try:
            count = self._stream.readinto(target)
        except (EOFError, zlib.error, gzip.BadGzipFile) as exc:
            raise corrupt(f"{self._member.name} is not a whole gzip file") from exc
        self._at += count
        if self._at > LAYER_BYTES + (1 << 20):
            raise corrupt(f"{self._member.name} unpacks to more than {LAYER_BYTES} bytes")
        return count
