"""A directory tree as a tar stream: numeric owners, extended attributes, nanoseconds.

Promises: memory stays bounded by the number of directories and of files with several names;
nothing outside the tree is read, whatever its owner put into it; the same tree gives the same
bytes, whether some of it was packed ahead (``ahead``) or nothing.
Does not: carry sockets, or devices but whiteouts (``skipped`` names them).
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import itertools
import os
import stat
import tarfile
from collections.abc import Callable, Container, Iterator
from typing import Any, Protocol

from agent import errors
from agent.host import clock, confine

OPAQUE = "trusted.overlay.opaque"
XATTR = "SCHILY.xattr."
# What can be set back on any host; of the overlay's own only what says that a directory is opaque.
_XATTRS = ("user.", "system.posix_acl_", "security.capability")
_OVERLAY = "trusted.overlay."
# What an overlay keeps for itself and does not need elsewhere.
_OVERLAY_OWN = ("origin", "impure", "nlink", "uuid", "upper", "opaque")
_PIECE_BYTES = 1 << 20


# Gives back content that was put aside.
Load = Callable[[], memoryview]


@dataclasses.dataclass(frozen=True, slots=True)
class Entry:
    """A member of the archive: its header, and its content with what fills the last block, if it
    has any.
    """

    head: bytes
    content: tuple[Load, ...] = ()


class Known(Protocol):
    """What was packed before."""

    def entry(self, path: str, info: os.stat_result) -> Entry | None:
        """What of ``path`` is as it was then, which ``info`` tells; None if nothing is known."""


@dataclasses.dataclass
class Content:
    """What was packed so far."""

    entries: int = 0
    content_bytes: int = 0
    skipped: list[str] = dataclasses.field(default_factory=list)


class Pack(io.RawIOBase):
    """The tar of the directory ``root`` (a descriptor, which stays the caller's), to be read once.

    Paths of ``without``, relative to the root, are left out with all below them. With
    ``whiteouts``, the tree is an overlay's upper directory. What is ``known`` is not read again.

    Raises, when read:
        errors.DumpFailed: something cannot be read, or is an overlay's and cannot be carried.
        errors.DeadlineExceeded: in the middle.
    """

    def __init__(
        self,
        root: int,
        deadline: clock.Deadline,
        *,
        without: Container[str] = (),
        whiteouts: bool = False,
        known: Known | None = None,
    ) -> None:
        super().__init__()
        self.content = Content()
        self._root = root
        self._deadline = deadline
        self._without = without
        self._whiteouts = whiteouts
        self._known = known
        self._first_names: dict[tuple[int, int], str] = {}
        self._pieces = self._all()
        self._rest = memoryview(b"")

    def readable(self) -> bool:
        """Always."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill ``buffer`` with what comes next; 0 at the end."""
        target = memoryview(buffer).cast("B")
        while not self._rest:
            piece = next(self._pieces, None)
            if piece is None:
                return 0
            self._rest = piece() if callable(piece) else memoryview(piece)
        count = min(len(target), len(self._rest))
        target[:count] = self._rest[:count]
        self._rest = self._rest[count:]
        return count

    def read_changed(self, most_bytes: int) -> bool:
        """Read now what was not known, and say whether that was all: not if it is more than
        ``most_bytes``. Then the tree is read on as the stream is.
        """
        found: list[bytes | Load] = []
        read_bytes = 0
        for piece in self._pieces:
            found.append(piece)
            read_bytes += 0 if callable(piece) else len(piece)
            if read_bytes > most_bytes:
                self._pieces = itertools.chain(found, self._pieces)
                return False
        self._pieces = iter(found)
        return True

    def _all(self) -> Iterator[bytes | Load]:
        try:
            for folder, name, path, info in walk(self._root, self._deadline, self._without):
                yield from self._entry(folder, name, path, info)
        except OSError as exc:
            raise errors.DumpFailed(
                f"cannot read {exc.filename or 'a file of the container'}: {exc.strerror}",
                hint="try again",
            ) from exc
        yield bytes(2 * tarfile.BLOCKSIZE)

    def _entry(
        self, folder: int, name: str, path: str, info: os.stat_result
    ) -> Iterator[bytes | Load]:
        again = self._first_names.get((info.st_dev, info.st_ino))
        known = self._known.entry(path, info) if self._known is not None and not again else None
        if known is not None:
            self._count(info)
            yield known.head
            yield from known.content
            return
        head = header(folder, name, path, info, again=again, whiteouts=self._whiteouts)
        if head is None:
            self.content.skipped.append(path)
            return
        if again is not None:
            self.content.entries += 1
            yield head
            return
        if several_names(info):
            self._first_names[info.st_dev, info.st_ino] = path
        self._count(info)
        yield head
        if stat.S_ISREG(info.st_mode):
            with opened(folder, name) as fd:
                yield from content(fd, path, info.st_size, self._deadline)

    def _count(self, info: os.stat_result) -> None:
        self.content.entries += 1
        self.content.content_bytes += info.st_size if stat.S_ISREG(info.st_mode) else 0


def walk(
    root: int, deadline: clock.Deadline, without: Container[str]
) -> Iterator[tuple[int, str, str, os.stat_result]]:
    """Everything in the tree, the root first, in an order of its own: a descriptor of the directory
    that it is in, good until the next is asked for, its name in there, its path and what it is.

    Raises:
        OSError: a directory cannot be read.
        errors.DeadlineExceeded: in the middle.
    """
    yield root, ".", ".", os.fstat(root)
    # Every directory is opened anew from the root: neither its depth nor the number of descriptors
    # is limited by ours.
    waiting = [""]
    while waiting:
        prefix = waiting.pop()
        folder = confine.open_beneath(
            root, prefix or ".", os.O_RDONLY | os.O_DIRECTORY, one_file_system=True
        )
        try:
            # A listing needs a descriptor of its own: its position is shared with the original.
            for name in sorted(os.listdir(f"/proc/self/fd/{folder}")):
                path = prefix + name
                if path in without:
                    continue
                deadline.check("the capture")
                info = os.stat(name, dir_fd=folder, follow_symlinks=False)
                yield folder, name, path, info
                if stat.S_ISDIR(info.st_mode):
                    waiting.append(path + "/")
        finally:
            os.close(folder)


def header(
    folder: int,
    name: str,
    path: str,
    info: os.stat_result,
    *,
    again: str | None = None,
    whiteouts: bool,
) -> bytes | None:
    """The header of what ``name`` is in ``folder``, a link to ``again`` if that is the same file;
    None if it does not travel.

    Raises:
        OSError: it cannot be read.
        errors.DumpFailed: it is an overlay's and cannot be carried.
    """
    head = tarfile.TarInfo(path)
    head.mode = stat.S_IMODE(info.st_mode)
    head.uid, head.gid = info.st_uid, info.st_gid
    seconds, rest = divmod(info.st_mtime_ns, 1_000_000_000)
    head.mtime = seconds
    # As text: a float has no room for nanoseconds.
    records = {"mtime": f"{seconds}.{rest:09d}"} if rest else {}
    if again is not None:
        head.type, head.linkname = tarfile.LNKTYPE, again
    elif not _describe(head, folder, name, info, whiteouts=whiteouts):
        return None
    elif not _whiteout(info):
        records.update(_xattrs(folder, name, path))
    head.pax_headers = records
    return head.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape")


def several_names(info: os.stat_result) -> bool:
    """Whether it may come again under another name, as the same file."""
    return not stat.S_ISDIR(info.st_mode) and info.st_nlink > 1 and not _whiteout(info)


@contextlib.contextmanager
def opened(folder: int, name: str) -> Iterator[int]:
    """A descriptor of the file ``name`` in ``folder``. Raises ``OSError``: it cannot be read."""
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    fd = os.open(name, flags, dir_fd=folder)
    try:
        yield fd
    finally:
        os.close(fd)


def content(fd: int, path: str, size: int, deadline: clock.Deadline) -> Iterator[bytes]:
    """The first ``size`` bytes of a file, and what fills the last block.

    Raises:
        OSError: it cannot be read.
        errors.DumpFailed: there are not so many.
        errors.DeadlineExceeded: in the middle.
    """
    left = size
    while left:
        deadline.check("the capture")
        piece = os.read(fd, min(left, _PIECE_BYTES))
        if not piece:
            raise errors.DumpFailed(
                f"/{path} became shorter while it was read",
                hint="a process outside of the dumped tree writes to it; try again",
                path=f"/{path}",
            )
        left -= len(piece)
        yield piece
    yield bytes(-size % tarfile.BLOCKSIZE)


def _describe(
    head: tarfile.TarInfo, folder: int, name: str, info: os.stat_result, *, whiteouts: bool
) -> bool:
    """Set the kind of the entry; False if it does not travel."""
    if stat.S_ISDIR(info.st_mode):
        head.type = tarfile.DIRTYPE
    elif stat.S_ISREG(info.st_mode):
        head.type, head.size = tarfile.REGTYPE, info.st_size
    elif stat.S_ISLNK(info.st_mode):
        head.type, head.linkname = tarfile.SYMTYPE, os.readlink(name, dir_fd=folder)
    elif stat.S_ISFIFO(info.st_mode):
        head.type = tarfile.FIFOTYPE
    elif whiteouts and _whiteout(info):
        head.type = tarfile.CHRTYPE
    else:
        return False
    return True


def _xattrs(folder: int, name: str, path: str) -> dict[str, str]:
    through = f"/proc/self/fd/{folder}/{name}"
    found = {}
    for key in sorted(os.listxattr(through, follow_symlinks=False)):
        value = os.getxattr(through, key, follow_symlinks=False)
        if key.startswith(_XATTRS) or (key == OPAQUE and value == b"y"):
            found[XATTR + key] = value.decode("utf-8", "surrogateescape")
        elif key.startswith(_OVERLAY) and (
            key.removeprefix(_OVERLAY) not in _OVERLAY_OWN or key == OPAQUE
        ):
            raise errors.DumpFailed(
                f"/{path} cannot be carried: the container's overlay keeps it as {key}",
                hint="turn redirect_dir and metacopy off for overlay file systems (the "
                "kernel's module parameters, or the runtime's mount options)",
                path=f"/{path}",
            )
    return found


def _whiteout(info: os.stat_result) -> bool:
    return stat.S_ISCHR(info.st_mode) and info.st_rdev == 0
