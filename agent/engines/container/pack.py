"""A directory tree as a tar stream: numeric owners, extended attributes, nanoseconds.

Promises: memory stays bounded by the number of directories and of files with several names;
nothing outside the tree is read, whatever its owner put into it; the same tree gives the same
bytes.
Does not: carry sockets, or devices but whiteouts (``skipped`` names them).
"""

from __future__ import annotations

import dataclasses
import io
import os
import stat
import tarfile
from collections.abc import Container, Iterator
from typing import Any

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


@dataclasses.dataclass
class Content:
    """What was packed so far."""

    entries: int = 0
    content_bytes: int = 0
    skipped: list[str] = dataclasses.field(default_factory=list)


class Pack(io.RawIOBase):
    """The tar of the directory ``root`` (a descriptor, which stays the caller's), to be read once.

    Paths of ``without``, relative to the root, are left out with all below them. With
    ``whiteouts``, the tree is an overlay's upper directory.

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
    ) -> None:
        super().__init__()
        self.content = Content()
        self._root = root
        self._deadline = deadline
        self._without = without
        self._whiteouts = whiteouts
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
            self._rest = memoryview(piece)
        count = min(len(target), len(self._rest))
        target[:count] = self._rest[:count]
        self._rest = self._rest[count:]
        return count

    def _all(self) -> Iterator[bytes]:
        try:
            yield from self._entry(self._root, ".", ".", os.fstat(self._root))
            # Every directory is opened anew from the root: neither its depth nor the number of
            # descriptors is limited by ours.
            waiting = [""]
            while waiting:
                prefix = waiting.pop()
                folder = confine.open_beneath(
                    self._root, prefix or ".", os.O_RDONLY | os.O_DIRECTORY, one_file_system=True
                )
                try:
                    yield from self._below(folder, prefix, waiting)
                finally:
                    os.close(folder)
        except OSError as exc:
            raise errors.DumpFailed(
                f"cannot read {exc.filename or 'a file of the container'}: {exc.strerror}",
                hint="try again",
            ) from exc
        yield bytes(2 * tarfile.BLOCKSIZE)

    def _below(self, folder: int, prefix: str, waiting: list[str]) -> Iterator[bytes]:
        # A listing needs a descriptor of its own: its position is shared with the original.
        for name in sorted(os.listdir(f"/proc/self/fd/{folder}")):
            path = prefix + name
            if path in self._without:
                continue
            self._deadline.check("the capture")
            info = os.stat(name, dir_fd=folder, follow_symlinks=False)
            yield from self._entry(folder, name, path, info)
            if stat.S_ISDIR(info.st_mode):
                waiting.append(path + "/")

    def _entry(self, folder: int, name: str, path: str, info: os.stat_result) -> Iterator[bytes]:
        head = tarfile.TarInfo(path)
        head.mode = stat.S_IMODE(info.st_mode)
        head.uid, head.gid = info.st_uid, info.st_gid
        seconds, rest = divmod(info.st_mtime_ns, 1_000_000_000)
        head.mtime = seconds
        # As text: a float has no room for nanoseconds.
        records = {"mtime": f"{seconds}.{rest:09d}"} if rest else {}
        again = self._first_names.get((info.st_dev, info.st_ino))
        if again is not None:
            head.type, head.linkname = tarfile.LNKTYPE, again
        elif not self._describe(head, folder, name, info):
            self.content.skipped.append(path)
            return
        elif not stat.S_ISDIR(info.st_mode) and info.st_nlink > 1 and not _whiteout(info):
            self._first_names[info.st_dev, info.st_ino] = path
        if again is None and not _whiteout(info):
            records.update(self._xattrs(folder, name, path))
        head.pax_headers = records
        self.content.entries += 1
        yield head.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape")
        if head.type == tarfile.REGTYPE:
            self.content.content_bytes += head.size
            yield from self._content(folder, name, path, head.size)

    def _describe(
        self, head: tarfile.TarInfo, folder: int, name: str, info: os.stat_result
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
        elif self._whiteouts and _whiteout(info):
            head.type = tarfile.CHRTYPE
        else:
            return False
        return True

    def _xattrs(self, folder: int, name: str, path: str) -> dict[str, str]:
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

    def _content(self, folder: int, name: str, path: str, size: int) -> Iterator[bytes]:
        fd = os.open(
            name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder
        )
        try:
            left = size
            while left:
                self._deadline.check("the capture")
                piece = os.read(fd, min(left, _PIECE_BYTES))
                if not piece:
                    raise errors.DumpFailed(
                        f"/{path} became shorter while it was read",
                        hint="a process outside of the dumped tree writes to it; try again",
                        path=f"/{path}",
                    )
                left -= len(piece)
                yield piece
        finally:
            os.close(fd)
        yield bytes(-size % tarfile.BLOCKSIZE)


def _whiteout(info: os.stat_result) -> bool:
    return stat.S_ISCHR(info.st_mode) and info.st_rdev == 0
