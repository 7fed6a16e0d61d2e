"""The files that travel with a container: what it changed in its root file system, and the volumes
that live and die with its pod.

Promises: ``look_ahead`` reads what of them nobody can be writing to; ``collect`` stores them as
they stand; ``inspect`` refuses a hostile or damaged one before
any file was touched; ``put_back`` leaves a volume with exactly what the image holds of it, whatever
init containers put there before, and can be repeated.
Does not: carry what others provide: the image, persistent volumes, config maps, secrets.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, BinaryIO, cast

from agent import errors
from agent.engines.container import charged, mountpoints, pack, unpack
from agent.engines.container.ahead import Ahead
from agent.engines.criu import feed, held
from agent.engines.criu.spool import Spool
from agent.host import cgroups, clock, confine, proc
from agent.model.container import (
    AGENT_DIRECTORY,
    HOLD_FILE,
    ROOTFS_DIFF,
    Container,
    volume_tar,
)
from agent.model.streams import FileEntry, MemberSink, MemberSource

# hold has some 50 KiB.
_HOLD_BYTES = 16 << 20
_NEW_HOLD = ".hold.restored"
# Less of files in memory is not worth a process that has them charged to the container.
_CHARGED_BYTES = 1 << 20
# That process, and CRIU after it.
_SPARE_BYTES = 48 << 20

# What of the files changed last is held beside what ``criu.held`` holds.
_CHANGED_BYTES = 8 << 20

Place = tuple[int, int]
"""The directory that is mounted as a volume, by device and inode number: the same for every
container that mounts it.
"""


def look_ahead(
    container: Container, init: proc.Identity, spool: Spool, deadline: clock.Deadline
) -> dict[str, Ahead]:
    """What of the files of a container whose processes run need not be read again by ``collect``,
    which tells what cannot be read.

    Raises:
        errors.DeadlineExceeded: in the middle.
    """
    found = {}
    with contextlib.suppress(errors.Refused):
        there = mountpoints.look(container)
        if there.upper:
            with _directory(there.upper) as fd:
                found[ROOTFS_DIFF] = Ahead(
                    fd, spool, deadline, without=there.points, whiteouts=True
                )
        for number, (path, mount) in enumerate(sorted(there.volumes.items())):
            with mountpoints.opened_volume(container, init, path, mount) as fd:
                inner = _below(mount.point, there.points)
                found[volume_tar(number)] = Ahead(fd, spool, deadline, without=inner)
    return found


def collect(
    container: Container,
    init: proc.Identity,
    stem: proc.Identity | None,
    sink: MemberSink,
    deadline: clock.Deadline,
    ahead: Mapping[str, Ahead],
    there: mountpoints.Mounted,
) -> dict[str, Any]:
    """Store the files of a container whose processes stand still; the facts about them. ``stem``
    is the one that hold made, if it did. What is known ``ahead`` must be there until the sink has
    read it, which can be when the processes run again; ``there`` is of when they stood still.

    Raises:
        errors.DumpFailed: one cannot be read.
        errors.VolumeError: from the sink.
    """
    found: dict[str, Any] = {"rootfs": None, "volumes": []}
    if there.upper:
        with _directory(there.upper) as fd:
            packed = pack.Pack(
                *(fd, deadline),
                without=there.points,
                whiteouts=True,
                known=ahead.get(ROOTFS_DIFF),
            )
            found["rootfs"] = _store(ROOTFS_DIFF, packed, sink)
    if stem is not None:
        _store_hold(stem, sink)
    for number, (path, mount) in enumerate(sorted(there.volumes.items())):
        with mountpoints.opened_volume(container, init, path, mount) as fd:
            inner = _below(mount.point, there.points)
            name = volume_tar(number)
            packed = pack.Pack(fd, deadline, without=inner, known=ahead.get(name))
            about = _store(name, packed, sink)
            read_only = mount.read_only
            found["volumes"].append({"destination": path, "read_only": read_only, **about})
    return found


def _store_hold(stem: proc.Identity, sink: MemberSink) -> None:
    """The stem's program, of which the placeholder may have another version."""
    with open(f"/proc/{stem.pid}/exe", "rb", buffering=0) as content:
        mtime_ns = os.fstat(content.fileno()).st_mtime_ns
        sink.file(FileEntry(HOLD_FILE, "file", 0o755, 0, 0, mtime_ns, 0, "include"), content)


def _put_hold(init: proc.Identity, source: MemberSource) -> None:
    """Put the image's own version of hold beside the one that runs, and in its place for the
    processes to come.
    """
    entry = next((each for each in source.files() if each.path == HOLD_FILE), None)
    if entry is None:
        return
    if entry.size_bytes > _HOLD_BYTES:
        raise errors.Corrupt("the image's version of hold is too large", part=HOLD_FILE)
    with confine.root_of(init) as root:
        flags = os.O_RDONLY | os.O_DIRECTORY
        folder = confine.open_inside(root, AGENT_DIRECTORY, flags)
    try:
        wanted = b"".join(source.file_content(HOLD_FILE))
        if _content(folder, "hold") == wanted:
            return
        with contextlib.suppress(FileNotFoundError):
            os.unlink(_NEW_HOLD, dir_fd=folder)
        create = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        with open(os.open(_NEW_HOLD, create, 0o755, dir_fd=folder), "wb") as out:
            out.write(wanted)
            os.fchmod(out.fileno(), 0o755)
        os.utime(_NEW_HOLD, ns=(entry.mtime_ns, entry.mtime_ns), dir_fd=folder)
        os.rename(_NEW_HOLD, "hold", src_dir_fd=folder, dst_dir_fd=folder)
    except OSError as exc:
        raise errors.RestoreFailed(
            f"cannot put the image's version of hold into the container: {exc.strerror}",
            hint="start the pod anew, and try again",
        ) from exc
    finally:
        os.close(folder)


def _content(folder: int, name: str) -> bytes:
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    with open(os.open(name, flags, dir_fd=folder), "rb") as file:
        return file.read(_HOLD_BYTES)


@contextlib.contextmanager
def _directory(path: str) -> Iterator[int]:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


def _store(name: str, packed: pack.Pack, sink: MemberSink) -> dict[str, Any]:
    content = held.Content(packed, steady=packed.read_changed(_CHANGED_BYTES))
    entry = FileEntry(name, "file", 0o600, 0, 0, 0, 0, "include")
    sink.file(entry, cast("BinaryIO", content))
    return {
        "name": name,
        "entries": packed.content.entries,
        "content_bytes": packed.content.content_bytes,
        "skipped": packed.content.skipped,
    }


def _below(path: str, points: Collection[str]) -> set[str]:
    """Those of the mount points that lie in the volume at ``path``, relative to it."""
    prefix = path.strip("/") + "/"
    return {point.removeprefix(prefix) for point in points if point.startswith(prefix)}


def inspect(source: MemberSource, known: dict[str, Any]) -> None:
    """Refuse files that could do harm, or are damaged.

    Raises:
        errors.Corrupt | errors.Missing: and nothing was touched.
    """
    for about, whiteouts in _parts(known):
        name = about["name"]
        unpack.inspect(name, source.file_content(name), _limits(about), whiteouts=whiteouts)


def put_back(
    container: Container,
    init: proc.Identity,
    source: MemberSource,
    known: dict[str, Any],
    deadline: clock.Deadline,
    filled: set[Place],
) -> None:
    """Put the files into a placeholder; ``inspect`` has passed. Volumes that are ``filled``
    already, by way of another container of the pod, stay as they are; this one's are added.

    A volume that is mounted read-only has, by way of this container, what others put there.

    Raises:
        errors.RestoreFailed: they cannot be written.
    """
    there = mountpoints.look(container)
    _put_hold(init, source)
    for about, whiteouts in _parts(known):
        name = about["name"]
        pieces = source.file_content(name)
        if whiteouts:
            if about["entries"] <= 1:
                continue  # nothing but the root itself, which may well be read-only
            fd = os.open(container.rootfs, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                unpack.apply(
                    name, pieces, _limits(about), fd, deadline, whiteouts=True, mounts=there.points
                )
            finally:
                os.close(fd)
            continue
        path = about["destination"]
        mount = there.volumes[path]
        with mountpoints.opened_volume(container, init, path, mount) as fd:
            info = os.fstat(fd)
            place = info.st_dev, info.st_ino
            if mount.read_only or place in filled:
                continue
            inner = _below(mount.point, there.points)
            unpack.clear(name, pieces, _limits(about), fd, deadline, mounts=inner)
            pieces = source.file_content(name)
            limits = _limits(about)
            groups = cgroups.directories(init.pid) if mount.kind == "tmpfs" else []
            if _has_room(groups, source, limits):
                charged.apply(name, pieces, limits, fd, deadline, groups, mounts=inner)
            else:
                unpack.apply(name, pieces, limits, fd, deadline, whiteouts=False, mounts=inner)
            filled.add(place)


def _has_room(groups: Sequence[str], source: MemberSource, limits: unpack.Limits) -> bool:
    """Whether these control groups are to have the files charged, which are in memory: where their
    limit is too low for that, as that of a container that only shares the volume may be, the kernel
    would end the container.
    """
    if not groups or limits.content_bytes < _CHARGED_BYTES:
        return False
    limit = cgroups.memory_limit_bytes(groups)
    needed = limits.content_bytes + feed.memory_bytes(source) + _SPARE_BYTES
    return limit is None or needed <= limit


def _parts(known: dict[str, Any]) -> list[tuple[dict[str, Any], bool]]:
    rootfs = known["rootfs"]
    return [
        *([(rootfs, True)] if rootfs else []),
        *((volume, False) for volume in known["volumes"]),
    ]


def _limits(about: dict[str, Any]) -> unpack.Limits:
    return unpack.Limits(int(about["entries"]), int(about["content_bytes"]))


def fingerprint(known: dict[str, Any]) -> str:
    """Tells images apart, by their facts."""
    return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()


def content_bytes(known: dict[str, Any]) -> int:
    """How much content all of them have. Raises what a missing or odd fact raises."""
    return sum(_limits(about).content_bytes for about, _ in _parts(known) if about["name"])
