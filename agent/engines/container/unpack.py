"""A tar stream put into a directory tree that somebody else arranges.

The stream comes from an image and is not trusted: neither its names nor its links lead out of the
tree, it makes no devices, and it is no larger than it was said to be. The tree is a container's
and is not trusted either: no link in it is followed, no mount in it is entered or covered.

Promises: ``inspect`` changes nothing and refuses whatever ``apply`` would refuse for the stream's
own sake, so that a hostile stream is refused before anything is touched. Applying the same stream
again gives the same tree. Memory stays bounded by the number of directories.
Does not: undo what it did if it fails in the middle.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import io
import os
import stat
import tarfile
from collections.abc import Iterable, Iterator
from typing import Any, BinaryIO, cast

from agent import errors
from agent.engines.container.pack import OPAQUE, XATTR
from agent.host import clock, confine

# Names and attributes of one entry; the kernel's own limits are 4 KiB for a path and 64 KiB for an
# attribute.
_HEADER_BYTES = 1 << 20
_PATH_BYTES = 4096
_ALLOWED_XATTRS = ("user.", "system.posix_acl_", "security.capability")
_KINDS = {
    tarfile.REGTYPE: "file",
    tarfile.AREGTYPE: "file",
    tarfile.DIRTYPE: "directory",
    tarfile.SYMTYPE: "symlink",
    tarfile.LNKTYPE: "link",
    tarfile.FIFOTYPE: "fifo",
    tarfile.CHRTYPE: "whiteout",
}
_PATH_ONLY = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW
_PIECE_BYTES = 1 << 20


@dataclasses.dataclass(frozen=True)
class Limits:
    """What the image says of the stream: how many entries, and how much content, exactly."""

    entries: int
    content_bytes: int


@dataclasses.dataclass(frozen=True)
class _Entry:
    kind: str
    path: str
    info: tarfile.TarInfo
    xattrs: dict[str, bytes]
    mtime_ns: int

    @property
    def opaque(self) -> bool:
        return OPAQUE in self.xattrs


class _Pieces(io.RawIOBase):
    """An iterator of bytes as a file."""

    def __init__(self, pieces: Iterable[bytes]) -> None:
        super().__init__()
        self._pieces = iter(pieces)
        self._rest = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
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


class _Forward:
    """Pieces as a file that is read once, from front to end, and not much of it at a time: the
    library would read an extended header at once however long it says it is. Content is read in
    pieces.
    """

    def __init__(self, pieces: Iterable[bytes]) -> None:
        self._raw = io.BufferedReader(_Pieces(pieces), _PIECE_BYTES)
        self._at = 0

    def read(self, size: int) -> bytes:
        if size > max(_HEADER_BYTES, _PIECE_BYTES):
            raise tarfile.HeaderError("an extended header is too long")
        data = self._raw.read(size)
        self._at += len(data)
        return data

    def tell(self) -> int:
        return self._at

    def seek(self, position: int) -> None:
        if position < self._at:
            raise tarfile.StreamError("an entry lies before the one that it follows")
        while self._at < position and self.read(min(_PIECE_BYTES, position - self._at)):
            pass


def inspect(name: str, pieces: Iterable[bytes], limits: Limits, *, whiteouts: bool) -> None:
    """Refuse the stream called ``name`` if it could not be applied anywhere.

    Raises:
        errors.Corrupt: it is hostile or damaged; says why.
    """
    with _opened(name, pieces) as stream:
        for _ in _entries(name, stream, limits, whiteouts=whiteouts):
            pass


def apply(
    name: str,
    pieces: Iterable[bytes],
    limits: Limits,
    root: int,
    deadline: clock.Deadline,
    *,
    whiteouts: bool,
    mounts: Iterable[str] = (),
) -> None:
    """Put the stream called ``name`` into the directory ``root``, over what is there.

    ``mounts`` are paths relative to the root where something is mounted in the container: they
    and what is below them stay as they are.

    Raises:
        errors.Corrupt: it is hostile or damaged.
        errors.RestoreFailed: it cannot be written; what was written stays.
    """
    tree = _Tree(name, root, frozenset(path.strip("/") for path in mounts))
    try:
        with _opened(name, pieces) as stream:
            for entry in _entries(name, stream, limits, whiteouts=whiteouts):
                deadline.check("the restore")
                content = stream.extractfile(entry.info) if entry.kind == "file" else None
                tree.put(entry, content)
        tree.finish()
    except OSError as exc:
        raise errors.RestoreFailed(
            f"cannot write {exc.filename or 'a file'} of {name.strip('/')}: {exc.strerror}",
            hint="free space for the container's files, then try again",
        ) from exc
    except RecursionError as exc:
        raise errors.RestoreFailed(
            "directories that the image does not have are nested too deeply to be removed",
            hint="restore into another placeholder",
        ) from exc


def clear(
    name: str,
    pieces: Iterable[bytes],
    limits: Limits,
    root: int,
    deadline: clock.Deadline,
    *,
    mounts: Iterable[str] = (),
) -> None:
    """Remove from the directory ``root`` all but what ``apply`` of the same stream would keep: the
    stream's directories, ``mounts``, and sockets, which no stream has and somebody may listen on.

    Raises:
        errors.Corrupt: the stream is hostile or damaged.
        errors.RestoreFailed: something cannot be removed.
    """
    if not os.listdir(f"/proc/self/fd/{root}"):
        return
    with _opened(name, pieces) as stream:
        entries = _entries(name, stream, limits, whiteouts=False)
        kept = {entry.path for entry in entries if entry.kind == "directory"}
    mounted = {path.strip("/") for path in mounts}
    others: list[str] = []
    waiting = [""]
    try:
        while waiting:
            deadline.check("the restore")
            path = waiting.pop()
            if path and path not in kept:
                others.append(path)
            waiting += _cleared(root, path, mounted)
        # Each after all that it holds; one that holds a socket or a mount stays.
        for path in reversed(others):
            parent, _, last = path.rpartition("/")
            fd = _beneath(root, parent)
            try:
                os.rmdir(last, dir_fd=fd)
            except OSError as exc:
                if exc.errno not in (errno.ENOTEMPTY, errno.EBUSY):
                    raise
            finally:
                os.close(fd)
    except OSError as exc:
        raise errors.RestoreFailed(
            f"cannot remove {exc.filename or 'a file'} below {name.strip('/')}: {exc.strerror}",
            hint="restore into another placeholder",
        ) from exc


def _cleared(root: int, path: str, mounted: set[str]) -> list[str]:
    """The directories in the directory ``path``, of which all else but sockets was removed."""
    fd = _beneath(root, path)
    folders = []
    try:
        for last in os.listdir(f"/proc/self/fd/{fd}"):
            below = f"{path}/{last}" if path else last
            info = _lstat(fd, last)
            if info is None or stat.S_ISSOCK(info.st_mode) or below in mounted:
                continue
            if stat.S_ISDIR(info.st_mode):
                folders.append(below)
            else:
                os.unlink(last, dir_fd=fd)
    finally:
        os.close(fd)
    return folders


def _beneath(root: int, path: str) -> int:
    return confine.open_beneath(root, path or ".", _PATH_ONLY, one_file_system=True)


@contextlib.contextmanager
def _opened(name: str, pieces: Iterable[bytes]) -> Iterator[tarfile.TarFile]:
    raw = cast("BinaryIO", _Forward(pieces))
    try:
        with tarfile.open(
            fileobj=raw, mode="r:", encoding="utf-8", errors="surrogateescape"
        ) as stream:
            yield stream
    except (tarfile.TarError, EOFError, ValueError, OverflowError) as exc:
        raise _corrupt(name, f"it is not a tar archive, or is cut short ({exc})") from exc


def _entries(
    name: str, stream: tarfile.TarFile, limits: Limits, *, whiteouts: bool
) -> Iterator[_Entry]:
    count = content_bytes = 0
    for count, info in enumerate(stream, start=1):
        # The library keeps every entry that it has seen.
        cast("Any", stream).members.clear()
        content_bytes += info.size
        if count > limits.entries or content_bytes > limits.content_bytes:
            raise _corrupt(name, "it holds more than the image says")
        yield _checked(name, info, whiteouts=whiteouts)
    if count < limits.entries or content_bytes < limits.content_bytes:
        raise _corrupt(name, "it holds less than the image says")


def _checked(name: str, info: tarfile.TarInfo, *, whiteouts: bool) -> _Entry:
    path = _relative(name, info.name)
    kind = _KINDS.get(info.type)
    if kind is None or info.issparse():
        raise _corrupt(name, f"{info.name!r} is of a kind that does not travel")
    if kind == "whiteout" and not (whiteouts and info.devmajor == 0 and info.devminor == 0):
        raise _corrupt(name, f"{info.name!r} is a device")
    if path == "" and kind != "directory":
        raise _corrupt(name, "its root is no directory")
    if kind == "link" and not _relative(name, info.linkname):
        raise _corrupt(name, f"{info.name!r} is a link to the root")
    if kind == "symlink" and not 0 < len(os.fsencode(info.linkname)) < _PATH_BYTES:
        raise _corrupt(name, f"{info.name!r} is an impossible link")
    if not 0 <= info.uid < 2**32 - 1 or not 0 <= info.gid < 2**32 - 1:
        raise _corrupt(name, f"{info.name!r} has an impossible owner")
    xattrs = {
        key.removeprefix(XATTR): value.encode("utf-8", "surrogateescape")
        for key, value in info.pax_headers.items()
        if key.startswith(XATTR)
    }
    for key in xattrs:
        if not key.startswith(_ALLOWED_XATTRS) and not (whiteouts and key == OPAQUE):
            raise _corrupt(name, f"{info.name!r} has the attribute {key!r}")
    return _Entry(kind, path, info, xattrs, _mtime_ns(info))


def _mtime_ns(info: tarfile.TarInfo) -> int:
    text = info.pax_headers.get("mtime")
    if text is None:
        return int(info.mtime) * 1_000_000_000
    seconds, _, rest = text.partition(".")
    return int(seconds) * 1_000_000_000 + int(rest[:9].ljust(9, "0") or "0")


def _relative(name: str, path: str) -> str:
    """``path`` without a leading ``./``; "" for the root itself."""
    if path.startswith("/") or "\0" in path or len(os.fsencode(path)) >= _PATH_BYTES:
        raise _corrupt(name, f"{path!r} leads out of the container")
    parts = [part for part in path.split("/") if part not in ("", ".")]
    if ".." in parts:
        raise _corrupt(name, f"{path!r} leads out of the container")
    return "/".join(parts)


class _Tree:
    """The directory that is written to; every path is walked anew, without links."""

    def __init__(self, name: str, root: int, mounts: frozenset[str]) -> None:
        self._name = name
        self._root = root
        self._mounts = mounts
        # A directory's time changes with its content, and so is set last.
        self._times: list[tuple[str, int]] = []

    def put(self, entry: _Entry, content: Any) -> None:
        """Make one entry."""
        if entry.path == "":
            self._finish_directory(self._root, entry)
            return
        if self._mounted(entry.path):
            return
        folder, _, last = entry.path.rpartition("/")
        parent = self._folder(folder)
        try:
            self._make(parent, last, entry, content)
        finally:
            os.close(parent)

    def finish(self) -> None:
        """Set the times of directories, the innermost first."""
        for path, mtime_ns in reversed(self._times):
            try:
                fd = self._folder(path)
            except errors.Corrupt:
                continue  # a later entry took its place
            try:
                os.utime(f"/proc/self/fd/{fd}", ns=(mtime_ns, mtime_ns))
            finally:
                os.close(fd)

    def _mounted(self, path: str) -> bool:
        """Whether the path is a mount in the container, or below one."""
        return any(path == each or path.startswith(each + "/") for each in self._mounts)

    def _holds_mount(self, path: str) -> bool:
        return any(each == path or each.startswith(path + "/") for each in self._mounts)

    def _folder(self, path: str) -> int:
        try:
            return confine.open_beneath(self._root, path or ".", _PATH_ONLY, one_file_system=True)
        except OSError as exc:
            raise _corrupt(
                self._name, f"{path!r} is not a directory of the container ({exc.strerror})"
            ) from exc

    def _make(self, parent: int, last: str, entry: _Entry, content: Any) -> None:
        info = entry.info
        if entry.kind == "directory":
            self._make_directory(parent, last, entry)
            return
        self._remove(parent, last, entry.path)
        if entry.kind == "whiteout":
            return
        if entry.kind == "link":
            self._make_link(parent, last, _relative(self._name, info.linkname))
            return
        if entry.kind == "symlink":
            os.symlink(info.linkname, last, dir_fd=parent)
            os.chown(last, info.uid, info.gid, dir_fd=parent, follow_symlinks=False)
        elif entry.kind == "fifo":
            os.mkfifo(last, 0o600, dir_fd=parent)
            os.chown(last, info.uid, info.gid, dir_fd=parent, follow_symlinks=False)
            os.chmod(f"/proc/self/fd/{parent}/{last}", stat.S_IMODE(info.mode))
        else:
            self._write_file(parent, last, entry, content)
            return
        self._set_xattrs(f"/proc/self/fd/{parent}/{last}", entry, follow=False)
        times = (entry.mtime_ns, entry.mtime_ns)
        os.utime(last, ns=times, dir_fd=parent, follow_symlinks=False)

    def _make_directory(self, parent: int, last: str, entry: _Entry) -> None:
        found = _lstat(parent, last)
        if found is not None and not stat.S_ISDIR(found.st_mode):
            self._remove(parent, last, entry.path)
            found = None
        if found is None:
            os.mkdir(last, 0o700, dir_fd=parent)
        fd = confine.open_beneath(parent, last, _PATH_ONLY, one_file_system=True)
        try:
            if entry.opaque and found is not None:
                self._empty(fd, entry.path)
            self._finish_directory(fd, entry)
        finally:
            os.close(fd)

    def _finish_directory(self, fd: int, entry: _Entry) -> None:
        through = f"/proc/self/fd/{fd}"
        os.chown(through, entry.info.uid, entry.info.gid)
        os.chmod(through, stat.S_IMODE(entry.info.mode))
        self._set_xattrs(through, entry, follow=True)
        self._times.append((entry.path, entry.mtime_ns))

    def _make_link(self, parent: int, last: str, target: str) -> None:
        if self._mounted(target):
            raise _corrupt(self._name, f"{target!r} is a mount, and linked to")
        folder, _, name = target.rpartition("/")
        source = self._folder(folder)
        try:
            found = _lstat(source, name)
            if found is None or stat.S_ISDIR(found.st_mode):
                raise _corrupt(self._name, f"{target!r} is linked to, but not there")
            os.link(name, last, src_dir_fd=source, dst_dir_fd=parent, follow_symlinks=False)
        finally:
            os.close(source)

    def _write_file(self, parent: int, last: str, entry: _Entry, content: Any) -> None:
        # O_EXCL: whatever is put there after the old one was removed is not written to.
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        fd = os.open(last, flags, 0o600, dir_fd=parent)
        with open(fd, "wb", buffering=0) as out:
            while piece := content.read(_PIECE_BYTES):
                _write_sparse(out, piece)
            out.truncate(entry.info.size)
            os.fchown(fd, entry.info.uid, entry.info.gid)
            os.fchmod(fd, stat.S_IMODE(entry.info.mode))
            self._set_xattrs(f"/proc/self/fd/{fd}", entry, follow=True)
            os.utime(fd, ns=(entry.mtime_ns, entry.mtime_ns))

    def _set_xattrs(self, through: str, entry: _Entry, *, follow: bool) -> None:
        for key, value in entry.xattrs.items():
            if key != OPAQUE:
                os.setxattr(through, key, value, follow_symlinks=follow)

    def _remove(self, parent: int, last: str, path: str) -> None:
        """Remove what is there, with all below it; a no-op if there is nothing."""
        found = _lstat(parent, last)
        if found is None:
            return
        if self._holds_mount(path):
            # The kernel would take the container's mount away with it.
            raise errors.RestoreFailed(
                f"/{path} holds a mount in the new container, and something else in the image",
                hint="give the new container the same volumes",
                path=f"/{path}",
            )
        if not stat.S_ISDIR(found.st_mode):
            os.unlink(last, dir_fd=parent)
            return
        fd = confine.open_beneath(parent, last, _PATH_ONLY, one_file_system=True)
        try:
            self._empty(fd, path)
        finally:
            os.close(fd)
        os.rmdir(last, dir_fd=parent)

    def _empty(self, fd: int, path: str) -> None:
        for name in os.listdir(f"/proc/self/fd/{fd}"):
            below = f"{path}/{name}"
            if not self._holds_mount(below):
                self._remove(fd, name, below)


def _lstat(parent: int, last: str) -> os.stat_result | None:
    try:
        return os.stat(last, dir_fd=parent, follow_symlinks=False)
    except FileNotFoundError:
        return None


def _write_sparse(out: Any, piece: bytes) -> None:
    if not any(piece):
        out.seek(len(piece), os.SEEK_CUR)
        return
    view = memoryview(piece)
    while view:
        view = view[out.write(view) :]


def _corrupt(name: str, why: str) -> errors.Corrupt:
    return errors.Corrupt(
        f"{name.strip('/')} of the image is refused: {why}", hint="use another image", part=name
    )
