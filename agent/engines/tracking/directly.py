"""Through which descriptors of a process the kernel may read past the page cache, into its pages:
where it was asked to (O_DIRECT), and where the file system does as it likes (FUSE, 9p, Ceph).

Promises: what is not known counts: kinds of file systems that are not listed here, mounts that the
process does not see (detached, of another mount namespace, outside its root), and overlays of what
is one of these, or may be.
Does not: touch a file system, whose server may not answer; know devices, nor descriptors of a
thread that does not share those of its process.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable

from agent import errors
from agent.host import mounts, proc

_O_DIRECT = 0o40000
# Memory without a mount that anybody could see.
_MEMORY = "/memfd:"
# Unless O_DIRECT says otherwise these read from the page cache, or copy as any write does.
_CACHED = frozenset(
    (
        *("ext2", "ext3", "ext4", "xfs", "btrfs", "f2fs", "bcachefs", "jfs", "nilfs2", "reiserfs"),
        *("tmpfs", "ramfs", "rootfs", "hugetlbfs", "nfs", "nfs4"),
        *("squashfs", "erofs", "cramfs", "iso9660", "udf", "vfat", "msdos", "exfat", "ntfs3"),
        *("proc", "sysfs", "devtmpfs", "devpts", "cgroup", "cgroup2", "cpuset", "mqueue", "nsfs"),
        *("debugfs", "tracefs", "securityfs", "configfs", "pstore", "bpf", "autofs", "fusectl"),
        *("efivarfs", "selinuxfs", "binfmt_misc", "rpc_pipefs", "nfsd", "resctrl"),
    )
)
_OVERLAY = "overlay"
# The process that has the mount namespace in which container runtimes mount.
_FIRST = 1


class Directly:
    """What is mounted for one process, looked at when it is first needed."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._cached: frozenset[int] | None = None

    def reads(self, number: int, link: str) -> bool:
        """Whether reads through this descriptor, which is ``link``, may go past the page cache.

        Raises:
            FileNotFoundError | ProcessLookupError: it has been closed.
            errors.NotFound: the process has ended.
        """
        # What begins otherwise is no file: a pipe, a socket, an object of the kernel's.
        if not link.startswith("/"):
            return False
        info = proc.descriptor_info(self._pid, number)
        if info.flags & os.O_ACCMODE == os.O_WRONLY:
            return False
        if info.flags & _O_DIRECT:
            return True
        if link.startswith(_MEMORY):
            return False
        if self._cached is None:
            self._cached = _cached(mounts.of(self._pid))
        return info.mount_id not in self._cached


def _cached(table: Iterable[mounts.Mount]) -> frozenset[int]:
    """Which of these mounts are sure to read through the page cache."""
    found, overlays = set[int](), list[mounts.Mount]()
    for each in table:
        if each.kind in _CACHED:
            found.add(each.id)
        elif each.kind == _OVERLAY:
            overlays.append(each)
    if overlays:
        plain = _plain_overlays()
        found.update(each.id for each in overlays if each.device in plain)
    return frozenset(found)


def _plain_overlays() -> frozenset[str]:
    """The devices of overlays none of whose layers can be on anything else than what is cached: of
    those that were mounted where all others are, too, if nothing else is mounted there.

    An overlay passes reads on to the file below. The paths of its layers say where they were when
    it was mounted, in a namespace that may be gone.
    """
    with contextlib.suppress(errors.NotFound):
        table = mounts.of(_FIRST)
        if all(each.kind in _CACHED or each.kind == _OVERLAY for each in table):
            return frozenset(each.device for each in table if each.kind == _OVERLAY)
    return frozenset()
