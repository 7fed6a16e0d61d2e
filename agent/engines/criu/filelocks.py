"""Locks on files that a tree held and somebody else holds now: CRIU would wait for them in silence,
until the restore's time is over.

Promises: who lets go of one within moments stops nothing; every lock that is in the way is named.
Does not: find locks on file systems that the kernel lists under another device than files show
(btrfs, some overlays), nor leases; change anything.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
from collections.abc import Iterator

from agent import errors
from agent.engines.criu import images
from agent.host import clock

# criu/include/file-lock.h
_POSIX, _FLOCK, _OFD = 1, 2, 4
# What the kernel calls them in /proc/locks; two kinds are in each other's way.
_FAMILIES = {_POSIX: "ranges", _OFD: "ranges", _FLOCK: "files"}
_LISTED = {b"POSIX": "ranges", b"OFDLCK": "ranges", b"FLOCK": "files"}
# include/uapi/asm-generic/fcntl.h
_READING = 0
# Who has just been killed lets go a moment later, and many hold a lock for no longer.
_MOMENT_S = 3.0


@dataclasses.dataclass(frozen=True)
class _Lock:
    """``start`` up to, not including, ``end``; ``holder`` is a pid, or what is known of it."""

    family: str
    file: tuple[int, int, int]
    reading: bool
    start: int
    end: int
    holder: str

    def bars(self, other: _Lock) -> bool:
        return (
            (self.family, self.file) == (other.family, other.file)
            and not (self.reading and other.reading)
            and self.start < other.end
            and other.start < self.end
        )


def refuse_taken(folder: str) -> None:
    """Refuse a restore of the images in ``folder`` while others hold locks that it needs.

    Raises:
        errors.RestoreConflict: they do; each is named.
        errors.Corrupt: the images cannot be understood.
    """
    wanted = dict(_wanted(folder))
    if not wanted or clock.wait_until(
        lambda: not _taken(wanted), clock.Deadline.after(_MOMENT_S), every_s=0.05
    ):
        return
    if reasons := _taken(wanted):
        raise errors.RestoreConflict(
            f"cannot restore here: {'; '.join(reasons[:3])}",
            hint="end what holds the lock, or wait until it lets go",
            reasons=reasons,
        )


def _taken(wanted: dict[_Lock, str]) -> list[str]:
    held = list(_held())
    return [
        f"{path} is locked by process {each.holder}"
        for lock, path in wanted.items()
        for each in held
        if each.bars(lock)
    ]


def _wanted(folder: str) -> Iterator[tuple[_Lock, str]]:
    """The locks of the tree, and the paths of their files."""
    if not os.path.exists(os.path.join(folder, "filelocks.img")):
        return
    locks = images.read(folder, "filelocks", "filelocks.img", images.messages.file_lock_entry)
    files = images.read(folder, "files", "files.img", images.messages.file_entry)
    paths = {each.id: each.reg.name for each in files if each.HasField("reg")}
    for lock in locks:
        family = _FAMILIES.get(lock.flag)
        name = f"ids-{lock.pid}.img"
        ids = images.read(folder, "ids", name, images.messages.task_kobj_ids_entry)
        if family is None or not ids:
            continue
        name = f"fdinfo-{ids[0].files_id}.img"
        table = images.read(folder, "fdinfo", name, images.messages.fdinfo_entry)
        path = next((paths.get(each.id, "") for each in table if each.fd == lock.fd), "")
        # One that is not there is told by others.
        with contextlib.suppress(OSError):
            info = os.stat(path)
            file = (os.major(info.st_dev), os.minor(info.st_dev), info.st_ino)
            end = lock.start + lock.len if lock.len else sys.maxsize
            yield _Lock(family, file, lock.type == _READING, lock.start, end, ""), path


def _held() -> Iterator[_Lock]:
    """The locks of this host."""
    with open("/proc/locks", "rb") as listed:
        for line in listed:
            words = line.split()
            # Behind an arrow are those that wait.
            if len(words) == 8 and words[1] in _LISTED:
                family, _, mode, pid, place, start, end = words[1:]
                major, minor, inode = place.split(b":")
                yield _Lock(
                    _LISTED[family],
                    (int(major, 16), int(minor, 16), int(inode)),
                    mode == b"READ",
                    int(start),
                    sys.maxsize if end == b"EOF" else int(end) + 1,
                    "?" if pid == b"-1" else pid.decode(),
                )
