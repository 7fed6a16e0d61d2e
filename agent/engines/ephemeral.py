"""The files of a job that travel with its image: collected while it stands still, put back before
its processes start.

A process tree leans on files that are part of its state: those it holds open for writing, those it
maps shared and writable, and the directories a person names. CRIU records only their names.

Promises: ``collect`` stores them as they stood at the cut. ``put_back`` changes nothing unless
every file can be placed, keeps whatever it displaces under another name, and undoes all of it if
the restore does not come about.
Does not: carry files that are only read (binaries, libraries, data sets); the engine checks those
for change instead. Does not carry devices, sockets or FIFOs; ``collect`` names the ones it left.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
import stat
from collections.abc import Iterable, Iterator
from typing import BinaryIO, Literal

from agent import errors
from agent.engines.base import FilePolicy
from agent.model.streams import FileEntry, MemberSink, MemberSource

# Names of extended attributes that a privileged writer may set back; trusted.* and security.ima
# depend on the host and would fail or lie elsewhere.
_XATTR_PREFIXES = ("user.", "system.posix_acl")
# Regular by mode, but their content is the kernel's, not the job's.
_PSEUDO = ("/proc/", "/sys/")


@dataclasses.dataclass(frozen=True)
class Collected:
    """What ``collect`` stored. ``skipped`` are (path, reason) of things that cannot travel."""

    files: int
    content_bytes: int
    skipped: tuple[tuple[str, str], ...]


def open_files(pids: Iterable[int]) -> dict[str, str]:
    """Return ``{path: path to read it through}`` of the regular files that the processes hold
    open for writing or map shared and writable, and that still have their name.

    Unlinked ones are left out: CRIU carries those as ghost files.
    """
    found: dict[str, str] = {}
    for pid in pids:
        for number in _listdir(f"/proc/{pid}/fd"):
            link = f"/proc/{pid}/fd/{number}"
            if _opened_for_writing(pid, number):
                _note(found, pid, link)
        for line in _lines(f"/proc/{pid}/maps"):
            fields = line.split(None, 5)
            if len(fields) == 6 and fields[1][1] == "w" and fields[1][3] == "s":
                _note(found, pid, f"/proc/{pid}/map_files/{_map_name(fields[0])}")
    return found


def collect(pids: Iterable[int], include: Iterable[str], sink: MemberSink) -> Collected:
    """Store the open files of ``pids`` and everything below ``include`` into ``sink``.

    To be called while the processes stand still.

    Raises:
        errors.NotFound: an ``include`` does not exist.
        errors.DumpFailed: a file cannot be read.
        errors.VolumeError: from the sink.
    """
    files = content_bytes = 0
    skipped: list[tuple[str, str]] = []
    done: set[str] = set()
    sources: list[tuple[str, str, bool]] = [
        (path, through, False) for path, through in sorted(open_files(pids).items())
    ]
    for root in include:
        if not os.path.lexists(root):
            raise errors.NotFound(f"--include {root} does not exist", path=root)
        sources.extend((path, path, True) for path in _walk(root))
    for path, through, included in sources:
        if path in done:
            continue
        done.add(path)
        try:
            info = os.lstat(through) if included else os.stat(through)
            reason = _unfit(info)
            if reason:
                skipped.append((path, reason))
                continue
            entry = _entry(path, through, info, included)
            if entry.kind == "file":
                with open(through, "rb", buffering=0) as content:
                    sink.file(entry, content)
            else:
                sink.file(entry, None)
        except OSError as exc:
            raise errors.DumpFailed(
                f"cannot read {path}: {exc.strerror}",
                hint="close the file, or leave it out of --include",
                path=path,
            ) from exc
        files += 1
        content_bytes += entry.size_bytes if entry.kind == "file" else 0
    return Collected(files, content_bytes, tuple(skipped))


def differences(source: MemberSource) -> list[str]:
    """Say, one line each, where this host's files differ from the image's.

    A file that is missing here is no difference: it is simply put back. Content is compared byte
    by byte where sizes agree.
    """
    found = []
    entries = list(source.files())
    known = {entry.path for entry in entries}
    for entry in entries:
        difference = _difference(entry, source)
        if difference:
            found.append(f"{entry.path} {difference}")
        elif entry.kind == "directory" and entry.origin == "include" and os.path.isdir(entry.path):
            found.extend(
                f"{extra} is here, but not in the image" for extra in _extras(entry.path, known)
            )
    return found


@contextlib.contextmanager
def put_back(source: MemberSource, policy: FilePolicy, aside_suffix: str) -> Iterator[list[str]]:
    """Make this host's files those of the image; yields the paths kept aside.

    Leaving the context by an exception undoes everything. ``REFUSE`` and ``KEEP`` only create
    what is missing; ``ROLLBACK`` also replaces what differs, keeping the other as
    ``PATH + aside_suffix``.

    Raises:
        errors.RestoreConflict: ``REFUSE``, and something differs; every difference is listed.
        errors.RestoreFailed: a file cannot be written; undone.
    """
    if policy is FilePolicy.REFUSE:
        reasons = differences(source)
        if reasons:
            raise conflict(reasons)
    entries = list(source.files())
    with contextlib.ExitStack() as undo:
        try:
            aside = (
                _clear(entries, source, aside_suffix, undo) if policy is FilePolicy.ROLLBACK else []
            )
            for entry in entries:
                if not os.path.lexists(entry.path):
                    _create(entry, source, undo)
            for entry in reversed(entries):
                # Creating what lies inside a directory moved its time.
                if entry.kind == "directory" and policy is not FilePolicy.KEEP:
                    os.utime(entry.path, ns=(entry.mtime_ns, entry.mtime_ns))
        except OSError as exc:
            raise errors.RestoreFailed(
                f"cannot put back {exc.filename}: {exc.strerror}",
                hint="make the path writable, or restore with --files keep",
                path=str(exc.filename),
            ) from exc
        yield aside
        undo.pop_all()


def _clear(
    entries: list[FileEntry], source: MemberSource, suffix: str, undo: contextlib.ExitStack
) -> list[str]:
    """Set aside all that differs from the image, and what an included directory has besides."""
    known = {entry.path for entry in entries}
    aside = []
    for entry in entries:
        if entry.kind == "directory" and os.path.isdir(entry.path):
            aside += [_set_aside(path, suffix, undo) for path in _extras(entry.path, known)]
        elif os.path.lexists(entry.path) and _difference(entry, source):
            aside.append(_set_aside(entry.path, suffix, undo))
    return aside


def conflict(reasons: list[str]) -> errors.RestoreConflict:
    """The refusal for files that differ."""
    return errors.RestoreConflict(
        "files of the image differ from what is here: " + "; ".join(reasons[:3]),
        hint="--files rollback puts the image's files back and keeps these aside; "
        "--files keep leaves them as they are",
        reasons=reasons,
    )


def _difference(entry: FileEntry, source: MemberSource) -> str:
    try:
        info = os.lstat(entry.path)
    except FileNotFoundError:
        return ""
    except NotADirectoryError:
        return "cannot be there: a parent of it is no directory here"
    kind = _kind(info)
    if kind != entry.kind:
        return f"is a {kind or 'special file'} here, a {entry.kind} in the image"
    if entry.kind == "symlink":
        target = os.readlink(entry.path)
        return "" if target == entry.target else f"points to {target}, not to {entry.target}"
    if entry.kind == "directory":
        return ""
    if info.st_size != entry.size_bytes:
        return f"has {info.st_size} bytes here, {entry.size_bytes} in the image"
    at = 0
    with open(entry.path, "rb") as here:
        for piece in source.file_content(entry.path):
            there = here.read(len(piece))
            if there != piece:
                return f"has other content from byte {at + _first_difference(there, piece)} on"
            at += len(piece)
    return ""


def _first_difference(a: bytes, b: bytes) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), len(a))


def _extras(root: str, known: set[str]) -> list[str]:
    """Paths directly in ``root`` that the image does not have; deeper ones belong to known
    directories, which are visited themselves.
    """
    return [
        path
        for name in sorted(os.listdir(root))
        if (path := os.path.join(root, name)) not in known and not _own_leftover(name)
    ]


def _own_leftover(name: str) -> bool:
    return ".before-restore-" in name


def _set_aside(path: str, suffix: str, undo: contextlib.ExitStack) -> str:
    kept = path + suffix
    if os.path.lexists(kept):
        raise OSError(errno.EEXIST, "a file kept aside earlier is in the way", kept)
    os.rename(path, kept)
    undo.callback(os.rename, kept, path)
    return kept


def _create(entry: FileEntry, source: MemberSource, undo: contextlib.ExitStack) -> None:
    if entry.kind == "directory":
        os.mkdir(entry.path, 0o700)
        undo.callback(os.rmdir, entry.path)
    elif entry.kind == "symlink":
        os.symlink(entry.target, entry.path)
        undo.callback(os.unlink, entry.path)
    else:
        # O_EXCL: between the check and now somebody may have planted a link here.
        fd = os.open(entry.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        undo.callback(os.unlink, entry.path)
        with open(fd, "wb", buffering=0) as out:
            for piece in source.file_content(entry.path):
                _write_sparse(out, piece)
            out.truncate(entry.size_bytes)
    os.chown(entry.path, entry.uid, entry.gid, follow_symlinks=False)
    if entry.kind != "symlink":
        os.chmod(entry.path, entry.mode)
    for name, value in entry.xattrs:
        os.setxattr(entry.path, name, value, follow_symlinks=False)
    os.utime(entry.path, ns=(entry.mtime_ns, entry.mtime_ns), follow_symlinks=False)


def _write_sparse(out: BinaryIO, piece: bytes) -> None:
    if not any(piece):
        out.seek(len(piece), os.SEEK_CUR)
        return
    view = memoryview(piece)
    while view:
        view = view[out.write(view) :]


def _entry(path: str, through: str, info: os.stat_result, included: bool) -> FileEntry:
    kind = _kind(info)
    if kind is None:
        raise errors.DumpFailed(f"{path} changed its kind while it was read", path=path)
    names = [n for n in _xattr_names(through, included) if n.startswith(_XATTR_PREFIXES)]
    return FileEntry(
        path=path,
        kind=kind,
        mode=stat.S_IMODE(info.st_mode),
        uid=info.st_uid,
        gid=info.st_gid,
        mtime_ns=info.st_mtime_ns,
        size_bytes=info.st_size if kind == "file" else 0,
        origin="include" if included else "open",
        target=os.readlink(path) if kind == "symlink" else "",
        xattrs=tuple((n, os.getxattr(through, n, follow_symlinks=not included)) for n in names),
    )


def _xattr_names(through: str, included: bool) -> list[str]:
    try:
        return os.listxattr(through, follow_symlinks=not included)
    except OSError as exc:
        if exc.errno == errno.ENOTSUP:
            return []
        raise


def _kind(info: os.stat_result) -> Literal["file", "directory", "symlink"] | None:
    if stat.S_ISREG(info.st_mode):
        return "file"
    if stat.S_ISDIR(info.st_mode):
        return "directory"
    return "symlink" if stat.S_ISLNK(info.st_mode) else None


def _unfit(info: os.stat_result) -> str:
    return "" if _kind(info) else "not a regular file, directory or symbolic link"


def _walk(root: str) -> Iterator[str]:
    """``root`` and all below it, a directory before its content, links not followed."""
    yield root
    if os.path.isdir(root) and not os.path.islink(root):
        for name in sorted(os.listdir(root)):
            yield from _walk(os.path.join(root, name))


def _note(found: dict[str, str], pid: int, link: str) -> None:
    try:
        path = os.readlink(link)
        info = os.stat(link)
        if not path.startswith("/") or path.startswith(_PSEUDO):
            return
        if not stat.S_ISREG(info.st_mode) or info.st_nlink == 0:
            return
        named = os.stat(f"/proc/{pid}/root{path}")
    except FileNotFoundError:
        return  # closed, unlinked or renamed over: CRIU carries what has no name
    if (named.st_dev, named.st_ino) == (info.st_dev, info.st_ino):
        found.setdefault(path, link)


def _opened_for_writing(pid: int, number: str) -> bool:
    for line in _lines(f"/proc/{pid}/fdinfo/{number}"):
        if line.startswith("flags:"):
            return int(line.split()[1], 8) & os.O_ACCMODE != os.O_RDONLY
    return False


def _map_name(addresses: str) -> str:
    """``map_files`` drops the leading zeros that ``maps`` may have."""
    start, end = addresses.split("-")
    return f"{int(start, 16):x}-{int(end, 16):x}"


def _listdir(path: str) -> list[str]:
    try:
        return os.listdir(path)
    except FileNotFoundError:
        return []  # the process has ended; its own capture will say so


def _lines(path: str) -> list[str]:
    try:
        with open(path, encoding="utf-8", errors="surrogateescape") as file:
            return file.read().splitlines()
    except FileNotFoundError:
        return []
