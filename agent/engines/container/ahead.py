"""What of a tree of files is packed before its owner stands still, so that the stop need only look
whether it is still so.

A file is packed ahead if nobody can be writing to it (``host.leases``) and its last change lies
back. Whoever writes to it later opens it later, and that moves its change time: a write and a
change of its length when they begin, a write through a mapping by the fault that makes the page
writable. So where the change time is the same at the cut, so is the content. On file systems that
are not known for that (tmpfs is known for the contrary) nothing is packed ahead. Directories, links
and the like have no content, and what else is told of them is compared at the cut.

Promises: ``entry`` gives what packing it at the cut would give; what cannot be had ahead is left
for the cut. Content rests in a ``Spool``, what is known of it takes some 2 KiB an entry, of at most
``_MOST_ENTRIES``.
Does not: fail for what is in the tree: the cut tells.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Container

from agent import errors
from agent.engines.container import pack
from agent.engines.criu.spool import Spool
from agent.host import clock, leases

# Times of files have the resolution of the kernel's tick (10 ms at most), and who changes an
# attribute sets the time right after: what changed so long ago cannot change without being seen.
_SETTLED_NS = 2_000_000_000
_MOST_ENTRIES = 20_000

_Seen = tuple[int, ...]


class Ahead:
    """What is known of the tree ``root``, a descriptor, which is needed no longer; ``without`` and
    ``whiteouts`` as for ``pack.Pack``.

    Raises:
        errors.DeadlineExceeded: in the middle.
    """

    def __init__(
        self,
        root: int,
        spool: Spool,
        deadline: clock.Deadline,
        *,
        without: Container[str] = (),
        whiteouts: bool = False,
    ) -> None:
        self._spool = spool
        self._deadline = deadline
        self._whiteouts = whiteouts
        self._known: dict[str, tuple[_Seen, pack.Entry]] = {}
        if not leases.tells_of_writes(root):
            return
        try:
            for each in pack.walk(root, deadline, without):
                if len(self._known) >= _MOST_ENTRIES:
                    break
                self._look(*each)
        except OSError:
            return  # a directory that is gone by now, or cannot be read: the cut tells

    def entry(self, path: str, info: os.stat_result) -> pack.Entry | None:
        """See ``pack.Known``."""
        known = self._known.get(path)
        return known[1] if known is not None and known[0] == _seen(info) else None

    def _look(self, folder: int, name: str, path: str, info: os.stat_result) -> None:
        settled = info.st_ctime_ns < clock.wall_s() * 1e9 - _SETTLED_NS
        if not settled or pack.several_names(info):
            return
        try:
            entry = self._packed(folder, name, path, info)
        except (OSError, errors.DumpFailed):
            return  # it has changed, or cannot travel: the cut tells
        if entry is not None:
            self._known[path] = _seen(info), entry

    def _packed(self, folder: int, name: str, path: str, info: os.stat_result) -> pack.Entry | None:
        head = pack.header(folder, name, path, info, whiteouts=self._whiteouts)
        if head is None:
            return None
        if not stat.S_ISREG(info.st_mode):
            return pack.Entry(head)
        with pack.opened(folder, name) as fd:
            if _seen(os.fstat(fd)) != _seen(info) or not leases.unwritten(fd):
                return None
            loads = []
            for piece in pack.content(fd, path, info.st_size, self._deadline):
                load = self._spool.put(memoryview(piece))
                if load is None:
                    return None  # no room
                loads.append(load)
            return pack.Entry(head, tuple(loads))


def _seen(info: os.stat_result) -> _Seen:
    return (
        *(info.st_dev, info.st_ino, info.st_ctime_ns, info.st_mtime_ns, info.st_size),
        *(info.st_mode, info.st_uid, info.st_gid, info.st_nlink, info.st_rdev),
    )
