"""The difference of a container's root file system: from the layer that a runtime archives to the
tar that an image holds.

A runtime's layer is a tar, plain (CRI-O) or gzipped (containerd), where ``.wh.NAME`` says that NAME
was deleted and ``.wh..wh..opq`` that a directory was emptied; CRI-O lists deletions beside it
(``deleted.files``). An image's (``model.container.ROOTFS_DIFF``) says the same as overlayfs does,
with character devices 0:0 and ``trusted.overlay.opaque``.

Promises: ``check`` reads the layer through and refuses what no layer holds: names that lead out,
links to outside of it, sparse members, more than ``CONTENT_BYTES``; only a layer that passed is
converted. Memory does not grow with the content.
Does not: apply it, or look where its symbolic links lead: whoever applies it must not follow them.
"""

from __future__ import annotations

import dataclasses
import gzip
import io
import json
import os
import posixpath
import re
import tarfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, BinaryIO, cast

from agent.engines.kubelet import tarindex
from agent.engines.kubelet.archive import Archive
from agent.engines.kubelet.tarindex import Member, corrupt

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

# More than any writable layer that a node's disk takes; bounds what a small file can unpack to.
CONTENT_BYTES = 1 << 40
_MEMBERS = 1_000_000
_DELETED_BYTES = 64 << 20

_GZIP = b"\x1f\x8b"
_BUFFER_BYTES = 256 << 10
_PIECE_BYTES = 1 << 20
# opencontainers/image-spec, layer.md
_WHITEOUT = ".wh."
_OPAQUE_MARK = ".wh..wh..opq"
_OPAQUE = "SCHILY.xattr.trusted.overlay.opaque"
_KEPT_XATTRS = (
    "SCHILY.xattr.user.",
    "SCHILY.xattr.system.posix_acl_",
    "SCHILY.xattr.security.capability",
)
# A time with nanoseconds, for which a number of the header has no room.
_FRACTION = re.compile(r"[0-9]{1,12}\.[0-9]{1,9}")
_KEPT_KINDS = (
    *(tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.DIRTYPE),
    *(tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE),
)


@dataclasses.dataclass(frozen=True)
class Layer:
    """A layer that was checked: ``rooted`` if it has an entry of the root itself, and the devices
    that it loses, which no image holds.
    """

    changes: int
    content_bytes: int
    skipped: tuple[str, ...]
    emptied: frozenset[str]
    deleted: tuple[str, ...]
    rooted: bool

    @property
    def adds_root(self) -> bool:
        """Whether its conversion begins with an entry of the root: a tar with one entry is one of
        nothing but that for whoever restores it.
        """
        return self.changes == 1 and not self.rooted

    @property
    def entries(self) -> int:
        """How many entries its conversion has."""
        return self.changes + self.adds_root


def check(
    source: Archive,
    member: Member | None,
    deleted: Member | None,
    go_on: Callable[[], None] = lambda: None,
) -> Layer:
    """Read a layer and the list of deletions through; either may be missing. ``go_on`` is called
    often and gives up by raising: a small layer may unpack for hours.

    Raises:
        errors.Corrupt: it cannot be used, or would reach outside of a root file system.
    """
    gone = _deleted(source, deleted) if deleted else ()
    if member is None or not member.size_bytes:  # nothing was added or changed
        return Layer(len(gone), 0, (), frozenset(), gone, rooted=False)
    limits = tarindex.Limits(members=_MEMBERS, content_bytes=CONTENT_BYTES)
    entries, content_bytes = len(gone), 0
    skipped, emptied, folders = [], set(), set()
    for each in tarindex.members(opened(source, member, go_on), limits):
        folder, _, name = each.name.rpartition("/")
        if each.kind == "hardlink":
            tarindex.normal_name(each.link, "file")
        if each.kind == "directory":
            folders.add(each.name)
        if name == _OPAQUE_MARK:
            emptied.add(folder or ".")
            continue
        if name in (_WHITEOUT, _WHITEOUT + ".", _WHITEOUT + ".."):
            raise corrupt(f"{each.name!r} deletes nothing that has a name")
        if name.startswith(_WHITEOUT):
            entries += 1
        elif each.kind == "device":
            skipped.append(each.name)
        else:
            entries += 1
            content_bytes += each.size_bytes
    if emptied - folders:
        raise corrupt(f"{min(emptied - folders)!r} is emptied in it, but not a directory in it")
    return Layer(
        entries, content_bytes, tuple(skipped), frozenset(emptied), gone, rooted="." in folders
    )


def _deleted(source: Archive, member: Member) -> tuple[str, ...]:
    """The paths that CRI-O lists as deleted, relative to the root."""
    raw = source.read(member, _DELETED_BYTES)
    try:
        paths = json.loads(raw) if raw.strip() else []
    except (ValueError, RecursionError) as exc:
        raise corrupt(f"{member.name} is not JSON") from exc
    if not isinstance(paths, list) or not all(isinstance(path, str) for path in paths):
        raise corrupt(f"{member.name} is not a list of names")
    return tuple(tarindex.normal_name(path.lstrip("/"), "file") for path in paths)


def opened(source: Archive, member: Member, go_on: Callable[[], None] = lambda: None) -> BinaryIO:
    """The layer's tar as the runtime wrote it, unpacked; reading raises ``errors.Corrupt`` where
    it is damaged, and calls ``go_on``, as ``check``, while it unpacks.
    """
    raw = source.stream(member)
    if raw.read(len(_GZIP)) != _GZIP:
        return source.stream(member)
    raw.seek(0)
    return cast("BinaryIO", io.BufferedReader(_Unpacked(raw, member, go_on), _BUFFER_BYTES))


def converted(
    source: Archive,
    member: Member | None,
    layer: Layer,
    go_on: Callable[[], None] = lambda: None,
) -> BinaryIO:
    """The tar that an image holds, of a layer that was checked; ``go_on`` as for ``opened``."""
    return cast("BinaryIO", io.BufferedReader(_Pieces(_convert(source, member, layer, go_on))))


def _convert(
    source: Archive, member: Member | None, layer: Layer, go_on: Callable[[], None]
) -> Iterator[bytes]:
    if layer.adds_root:
        root = tarfile.TarInfo(".")
        root.type, root.mode = tarfile.DIRTYPE, 0o755
        yield root.tobuf(tarfile.PAX_FORMAT)
    if member is not None and member.size_bytes:
        stream = opened(source, member, go_on)
        try:
            with tarfile.open(
                fileobj=stream, mode="r|", encoding="utf-8", errors="surrogateescape"
            ) as tar:
                for info in tar:
                    # The library keeps every entry that it has seen.
                    cast("Any", tar).members.clear()
                    path = tarindex.normal_name(info.name, "directory" if info.isdir() else "file")
                    yield from _entry(tar, info, path, layer)
        except (tarfile.TarError, ValueError, OverflowError) as exc:
            raise corrupt(f"{member.name} has an impossible entry") from exc
    for path in layer.deleted:
        yield _head(path, tarfile.CHRTYPE)
    yield bytes(2 * tarfile.BLOCKSIZE)


def _entry(tar: tarfile.TarFile, info: tarfile.TarInfo, path: str, layer: Layer) -> Iterator[bytes]:
    folder, name = posixpath.split(path)
    if name == _OPAQUE_MARK:
        return
    if name.startswith(_WHITEOUT):
        deleted = posixpath.join(folder, name.removeprefix(_WHITEOUT))
        yield _head(deleted, tarfile.CHRTYPE)
        return
    if info.type not in _KEPT_KINDS:
        return  # a device: named by ``check``
    head = tarfile.TarInfo(path)
    head.type = tarfile.REGTYPE if info.type == tarfile.AREGTYPE else info.type
    head.mode, head.uid, head.gid = info.mode & 0o7777, info.uid, info.gid
    head.linkname = tarindex.normal_name(info.linkname, "file") if info.islnk() else info.linkname
    head.size = info.size if info.isreg() else 0
    head.mtime = int(info.mtime)
    head.pax_headers = {
        key: value
        for key, value in info.pax_headers.items()
        if key.startswith(_KEPT_XATTRS) or (key == "mtime" and _FRACTION.fullmatch(value))
    }
    if path in layer.emptied:
        head.pax_headers[_OPAQUE] = "y"
    yield head.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape")
    yield from _content(tar, info)


def as_layer(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """The other way round: the tar of an image as a layer, plain.

    Raises:
        errors.Corrupt: it is no such tar.
    """
    stream = io.BufferedReader(_Pieces(iter(pieces)), _BUFFER_BYTES)
    try:
        with tarfile.open(
            fileobj=stream, mode="r|", encoding="utf-8", errors="surrogateescape"
        ) as tar:
            for info in tar:
                cast("Any", tar).members.clear()
                yield from _layer_entry(tar, info)
    except (tarfile.TarError, ValueError, OverflowError) as exc:
        raise corrupt("the image's root file system cannot be read") from exc
    yield bytes(2 * tarfile.BLOCKSIZE)


def _layer_entry(tar: tarfile.TarFile, info: tarfile.TarInfo) -> Iterator[bytes]:
    path = tarindex.normal_name(info.name, "directory" if info.isdir() else "file")
    if path == ".":
        return
    if info.ischr():
        folder, name = posixpath.split(path)
        yield _head(posixpath.join(folder, _WHITEOUT + name))
        return
    opaque = _OPAQUE in info.pax_headers
    info.pax_headers = {key: info.pax_headers[key] for key in info.pax_headers if key != _OPAQUE}
    info.name = path
    yield info.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape")
    yield from _content(tar, info)
    if opaque:
        yield _head(posixpath.join(path, _OPAQUE_MARK))


def _content(tar: tarfile.TarFile, info: tarfile.TarInfo) -> Iterator[bytes]:
    content = tar.extractfile(info) if info.isreg() else None
    if content is not None:
        while piece := content.read(_PIECE_BYTES):
            yield piece
        yield bytes(-info.size % tarfile.BLOCKSIZE)


def _head(path: str, kind: bytes = tarfile.REGTYPE) -> bytes:
    """An entry without anything but a name."""
    head = tarfile.TarInfo(path)
    head.type, head.mode = kind, 0
    return head.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape")


class _Pieces(io.RawIOBase):
    """An iterator of bytes as a file."""

    def __init__(self, pieces: Iterable[bytes]) -> None:
        self._pieces = iter(pieces)
        self._rest = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, target: WriteableBuffer) -> int:
        view = memoryview(target)
        while not self._rest:
            piece = next(self._pieces, None)
            if piece is None:
                return 0
            self._rest = memoryview(piece)
        count = min(len(view), len(self._rest))
        view[:count] = self._rest[:count]
        self._rest = self._rest[count:]
        return count


class _Unpacked(io.RawIOBase):
    """Unpacks gzip, forward only."""

    def __init__(self, raw: BinaryIO, member: Member, go_on: Callable[[], None]) -> None:
        self._member = member
        self._go_on = go_on
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
        room = memoryview(bytearray(min(_BUFFER_BYTES, offset - self._at)))
        while self._at < offset and self.readinto(room[: offset - self._at]):
            pass
        return offset

    def tell(self) -> int:
        return self._at

    def readinto(self, target: WriteableBuffer) -> int:
        self._go_on()
        try:
            count = self._stream.readinto(target)
        except (EOFError, zlib.error, gzip.BadGzipFile) as exc:
            raise corrupt(f"{self._member.name} is not a whole gzip file") from exc
        self._at += count
        return count
