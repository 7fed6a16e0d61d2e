"""Which mappings of a process are copied by the agent itself, and by what its writes can escape.

Promises: only memory that belongs to one process and to no file: what is shared or backed by a
file can change without the process's page table showing it.
Does not: read memory.
"""

from __future__ import annotations

import contextlib

import numpy as np

from agent import errors
from agent.host import pagemap, proc
from agent.host.pagemap import Ranges

# Below this, CRIU's own way costs less than one more question about a mapping.
SMALLEST_BYTES = 1 << 20
_O_DIRECT = 0o40000
# Descriptors through which devices or the kernel write into pages that they have pinned.
_WRITERS = (
    *("anon_inode:[io_uring]", "anon_inode:[infiniband", "/dev/infiniband/", "/dev/vfio/"),
    *("/dev/nvidia", "/dev/kfd", "/dev/dri/"),
)


def eligible(pid: int) -> Ranges:
    """The large private anonymous mappings that hold no program: one row each.

    Raises:
        errors.NotFound: the process has ended.
    """
    rows = [
        (each.start, each.end)
        for each in proc.maps(pid)
        if each.end - each.start >= SMALLEST_BYTES
        and each.perms[3] == "p"
        # CRIU works in executable mappings of the process itself.
        and "x" not in each.perms
        and not each.inode
        and (each.path in ("", "[heap]") or each.path.startswith("[anon:"))
    ]
    return np.array(rows, dtype=np.int64).reshape(-1, 2) if rows else pagemap.none()


def escapes(pid: int) -> str:
    """By what pages of the process may change without a write through its page table: devices and
    kernel threads that work on pages pinned before; "" if by nothing.

    Raises:
        errors.NotFound: the process has ended.
    """
    if proc.pinned_bytes(pid):
        return "it has memory pinned for a device"
    if any(each.path == "/[aio]" for each in proc.maps(pid)):
        return "it uses asynchronous I/O"
    for number in proc.descriptors(pid):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            if proc.descriptor_flags(pid, number) & _O_DIRECT:
                return "it has a file open for direct I/O"
            if proc.descriptor_link(pid, number).startswith(_WRITERS):
                return "it uses a device or io_uring that writes memory by itself"
    return ""


def private_id(pid: int) -> int:
    """The number that the process has in its innermost pid namespace, by which CRIU knows it.

    Raises:
        errors.NotFound: the process has ended.
    """
    numbers = proc.status(pid).ns_pids
    if not numbers:
        raise errors.NotFound(f"there is no process {pid}", pid=pid)
    return numbers[-1]
