"""A volume that keeps each blob as one file below a directory, on a local disk or NFS.

Promises: what ``base.Volume`` promises, also after a power cut and with writers on several
machines. A blob is written under a hidden name, synced, and linked to its own name, which fails if
the name is taken (link(2) is atomic on NFS, where O_EXCL once was not, and works without flock);
then the folder is synced. Every path is walked from the root without following symbolic links, so
nothing planted inside leads out. No descriptor is held between calls, so the volume can be
unmounted; if something else is mounted in its place afterwards, that is noticed.
Does not: hash, compress, encrypt, retry or cache.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat
from collections.abc import Iterator

from agent import errors
from agent.host import clock
from agent.volumes import base, names

_UNFINISHED = ".unfinished"  # no valid name begins with a dot, so it is never listed
_NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT})
_GONE = frozenset(
    {errno.EROFS, errno.ESTALE, errno.ENOTCONN, errno.ENODEV, errno.ENXIO, errno.EHOSTDOWN}
    | {errno.ESHUTDOWN, errno.ETIMEDOUT, errno.EHOSTUNREACH}
)
# How much is written before the disk is set to work on it: late enough for large writes, early
# enough that the final sync has little left.
_WRITEBACK_BYTES = 8 << 20
_DONTNEED = os.POSIX_FADV_DONTNEED
_FOLDER_RACES = 8  # how often an empty folder may vanish before something is really wrong
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_INSIDE = os.O_NOFOLLOW | os.O_CLOEXEC


_Parts = list[str]


class DirectoryVolume:
    """Blobs as files below ``root``, which must exist unless ``create``."""

    def __init__(self, root: str, *, create: bool = False) -> None:
        """Open the directory.

        Raises:
            errors.VolumeGone: it is not there, or not a directory.
        """
        self._root = os.path.abspath(root)
        if create:
            with _understood(self._root):
                os.makedirs(self._root, mode=0o700, exist_ok=True)
        self._identity: tuple[int, int] | None = None
        with self._root_fd() as fd:
            status = os.fstat(fd)
            self._identity = (status.st_dev, status.st_ino)

    @property
    def url(self) -> str:
        """The absolute path."""
        return self._root

    @contextlib.contextmanager
    def create(self, name: str) -> Iterator[base.BlobWriter]:
        """Begin a blob; see ``base.Volume``."""
        parts = names.components(name)
        with contextlib.ExitStack() as stack:
            with _understood(name):
                root = stack.enter_context(self._root_fd())
                folder = stack.enter_context(_folder(root, [_UNFINISHED], create=True))
                hidden = secrets.token_hex(16)
                flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | _INSIDE
                fd = os.open(hidden, flags, 0o600, dir_fd=folder)
                stack.callback(os.close, fd)
                stack.callback(_remove_quietly, hidden, folder)
            yield _Writer(name, parts, root, folder, hidden, fd)

    def put(self, name: str, data: bytes) -> None:
        """Create a small blob; see ``base.Volume``."""
        with self.create(name) as writer:
            writer.write(data)
            writer.commit()

    def read(self, name: str, offset: int = 0, length: int | None = None) -> bytes:
        """Return part of a blob; see ``base.Volume``."""
        with self._opened(name) as fd, _understood(name):
            if length is None:
                length = max(0, os.fstat(fd).st_size - offset)
            first = os.pread(fd, length, offset)
            if len(first) == length or not first:
                return first
            pieces = [first]
            done = len(first)
            while done < length and (piece := os.pread(fd, length - done, offset + done)):
                pieces.append(piece)
                done += len(piece)
            return b"".join(pieces)

    def info(self, name: str) -> base.BlobInfo:
        """Return what a listing shows."""
        with self._opened(name) as fd, _understood(name):
            status = os.fstat(fd)
            return base.BlobInfo(name, status.st_size, status.st_mtime)

    def list(self, prefix: str = "") -> Iterator[base.BlobInfo]:
        """Yield blobs in order of names."""
        folders, rest = names.split_prefix(prefix)
        above = "".join(f"{part}/" for part in folders)
        found: list[base.BlobInfo] = []
        with _understood(prefix), self._root_fd() as root:
            try:
                with _folder(root, folders) as fd:
                    _gather(fd, above, rest, found)
            except FileNotFoundError:
                return
        found.sort(key=lambda info: info.name)
        yield from found

    def delete(self, name: str) -> None:
        """Remove a blob if it is there; the folder is synced either way."""
        *folders, last = names.components(name)
        with _understood(name), self._root_fd() as root:
            try:
                with _folder(root, folders) as fd:
                    with contextlib.suppress(FileNotFoundError):
                        os.unlink(last, dir_fd=fd)
                    os.fsync(fd)
            except FileNotFoundError:
                return
            self._drop_empty(root, folders)

    def sweep(self, older_than_s: float) -> int:
        """Remove unfinished files whose last write is that long ago."""
        removed = 0
        with _understood(_UNFINISHED), self._root_fd() as root:
            try:
                with _folder(root, [_UNFINISHED]) as fd:
                    for entry in sorted(os.listdir(fd)):
                        with contextlib.suppress(FileNotFoundError):
                            age_s = clock.wall_s() - os.lstat(entry, dir_fd=fd).st_mtime
                            if age_s >= older_than_s:
                                os.unlink(entry, dir_fd=fd)
                                removed += 1
            except FileNotFoundError:
                return 0
        return removed

    def space(self) -> base.Space:
        """Room for this user, as statvfs tells it."""
        with _understood(self._root), self._root_fd() as root:
            status = os.fstatvfs(root)
        if status.f_flag & os.ST_RDONLY:
            raise errors.VolumeGone("the volume is read-only", volume=self._root)
        return base.Space(status.f_blocks * status.f_frsize, status.f_bavail * status.f_frsize)

    @contextlib.contextmanager
    def _root_fd(self) -> Iterator[int]:
        try:
            fd = os.open(self._root, _FOLDER)
        except OSError as exc:
            raise errors.VolumeGone(
                f"the volume {self._root} cannot be opened: {exc.strerror}",
                hint="create the directory, or mount the volume",
                volume=self._root,
            ) from exc
        try:
            status = os.fstat(fd)
            if self._identity not in (None, (status.st_dev, status.st_ino)):
                raise errors.VolumeGone(
                    f"{self._root} is another directory than before",
                    hint="the volume was unmounted or replaced; mount it again",
                    volume=self._root,
                )
            yield fd
        finally:
            os.close(fd)

    @contextlib.contextmanager
    def _opened(self, name: str) -> Iterator[int]:
        *folders, last = names.components(name)
        with contextlib.ExitStack() as stack:
            with _understood(name):
                root = stack.enter_context(self._root_fd())
                try:
                    folder = stack.enter_context(_folder(root, folders))
                    # NONBLOCK: a FIFO planted under the name must not hold us up.
                    fd = os.open(last, os.O_RDONLY | os.O_NONBLOCK | _INSIDE, dir_fd=folder)
                except FileNotFoundError as exc:
                    raise errors.BlobNotFound(f"no blob {name}", blob=name) from exc
                stack.callback(os.close, fd)
                if not stat.S_ISREG(os.fstat(fd).st_mode):
                    raise errors.VolumeError(f"blob {name} is not a regular file", blob=name)
            yield fd

    def _drop_empty(self, root: int, folders: _Parts) -> None:
        for depth in range(len(folders), 0, -1):
            try:
                with _folder(root, folders[: depth - 1]) as fd:
                    os.rmdir(folders[depth - 1], dir_fd=fd)
            except OSError:  # not empty, or somebody else was first: both are fine
                return


class _Writer:
    """A hidden file on its way to a name."""

    def __init__(
        self, name: str, parts: list[str], root: int, unfinished: int, hidden: str, fd: int
    ) -> None:
        self._name = name
        self._parts = parts
        self._root = root
        self._unfinished = unfinished
        self._hidden = hidden
        self._fd = fd
        self._written = 0
        self._started = 0
        self._dropped = 0
        self._usable = True

    def write(self, data: bytes | memoryview) -> None:
        with self._use(), memoryview(data).cast("B") as view:
            done = 0
            while done < len(view):
                done += os.write(self._fd, view[done:])
            self._written += done
            if self._written - self._started >= _WRITEBACK_BYTES:
                self._write_back()

    def commit(self) -> None:
        with self._use():
            os.fsync(self._fd)
            if self._started:
                os.posix_fadvise(self._fd, 0, 0, _DONTNEED)
            for attempt in range(_FOLDER_RACES):
                try:
                    with _folder(self._root, self._parts[:-1], create=True) as folder:
                        self._appear(folder)
                    break
                except FileNotFoundError:
                    # A delete elsewhere removed the folder, empty until now, under our feet.
                    if attempt == _FOLDER_RACES - 1:
                        raise
        self._usable = False

    def _appear(self, folder: int) -> None:
        """Take the name. What was visible once is never taken back, for others may have acted on
        it: if the folder cannot be synced, then whoever finds the name taken syncs it.
        """
        try:
            self._link(folder)
        finally:
            os.fsync(folder)

    def _link(self, folder: int) -> None:
        try:
            os.link(
                self._hidden,
                self._parts[-1],
                src_dir_fd=self._unfinished,
                dst_dir_fd=folder,
                follow_symlinks=False,
            )
        except FileExistsError as exc:
            # An NFS server may have done it and lost the reply; the client's retry then fails.
            if os.fstat(self._fd).st_nlink == 2:
                return
            raise errors.BlobExists(f"blob {self._name} exists", blob=self._name) from exc

    def _write_back(self) -> None:
        """Set the disk to work on what was written since the last time, without waiting, and let
        go of the page cache of what it had written by then: nobody reads it soon, and recycled
        pages are cheaper than fresh ones, above all in a virtual machine. Linux starts writing
        dirty pages on DONTNEED (mm/fadvise.c) and drops those that are clean.
        """
        os.posix_fadvise(self._fd, self._dropped, self._written - self._dropped, _DONTNEED)
        self._dropped = max(0, self._started - _WRITEBACK_BYTES)
        self._started = self._written

    @contextlib.contextmanager
    def _use(self) -> Iterator[None]:
        if not self._usable:
            raise errors.VolumeError("the blob was given up", blob=self._name)
        self._usable = False
        with _understood(self._name):
            yield
        self._usable = True


@contextlib.contextmanager
def _folder(root: int, parts: list[str], *, create: bool = False) -> Iterator[int]:
    """Open the folder ``parts`` below ``root`` step by step, following no links."""
    fd = os.dup(root)
    try:
        for part in parts:
            try:
                below = os.open(part, _FOLDER | _INSIDE, dir_fd=fd)
            except FileNotFoundError:
                if not create:
                    raise
                with contextlib.suppress(FileExistsError):
                    os.mkdir(part, 0o700, dir_fd=fd)
                below = os.open(part, _FOLDER | _INSIDE, dir_fd=fd)
            if create:
                # Also where it was there: whoever made it may not have got so far.
                os.fsync(fd)
            os.close(fd)
            fd = below
        yield fd
    finally:
        os.close(fd)


def _gather(fd: int, above: str, start: str, found: list[base.BlobInfo]) -> None:
    with os.scandir(fd) as entries:
        for entry in entries:
            if not entry.name.startswith(start) or not names.is_component(entry.name):
                continue
            try:
                if entry.is_dir(follow_symlinks=False):
                    with _folder(fd, [entry.name]) as below:
                        _gather(below, f"{above}{entry.name}/", "", found)
                elif entry.is_file(follow_symlinks=False):
                    status = entry.stat(follow_symlinks=False)
                    name = above + entry.name
                    found.append(base.BlobInfo(name, status.st_size, status.st_mtime))
            except FileNotFoundError:  # deleted while we looked
                continue


def _remove_quietly(hidden: str, folder: int) -> None:
    # What cannot be removed now is found by ``sweep``.
    with contextlib.suppress(OSError):
        os.unlink(hidden, dir_fd=folder)


@contextlib.contextmanager
def _understood(name: str) -> Iterator[None]:
    """Turn an OSError into the condition that it means."""
    try:
        yield
    except OSError as exc:
        number = exc.errno or 0
        reason = exc.strerror or str(exc)
        if number in _NO_ROOM:
            raise errors.VolumeFull(
                f"no room on the volume: {reason}",
                hint="free space on the volume or prune the store",
                blob=name,
            ) from exc
        if number in _GONE:
            raise errors.VolumeGone(
                f"the volume is gone: {reason}", hint="check its mount", blob=name
            ) from exc
        raise errors.VolumeError(f"the volume failed: {reason}", blob=name, errno=number) from exc
